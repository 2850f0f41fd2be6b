"""Two models timed in turn: the ratio, its interval, the verdict, and the time that it takes."""

import pytest
import torch
from torch import nn

from anynorm.apps.timing.steps import FEWEST_PAIRS, PairedTimings, time_steps
from anynorm.apps.try_model.sentences import describe_speed
from anynorm.doctor.call import Call

pytestmark = pytest.mark.usefixtures("one_thread")


def test_ratio_interval_and_verdict():
    slow, fast = [2.0, 2.1, 1.9, 2.0, 2.2, 2.0, 2.1, 1.8], [1.0] * 8
    for timing, verdict in (
        (PairedTimings(slow, fast), "faster"),
        (PairedTimings(fast, slow), "slower"),
        (PairedTimings(slow, slow[::-1]), "no difference"),
    ):
        assert dict(describe_speed(timing))["verdict"].startswith(verdict)
        low, high = timing.interval
        assert low <= timing.middle_half[0] <= timing.ratio <= timing.middle_half[1] <= high
    assert PairedTimings(slow, fast).ratio == 2.0


def test_interval_of_the_median_is_that_of_the_binomial_table():
    # For 20 values the 6th and the 15th bound the median with 95.9 % (the 7th and the 14th with 88.5 %).
    values = [float(value) for value in range(1, 21)]
    assert PairedTimings(values, [1.0] * 20).interval == (6.0, 15.0)


class Clock:
    """Stands in for the module `time`: only what a `Slow` model spends passes on it."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Slow(nn.Module):
    """A model whose steps take a known time, by a clock of the test's own: a busy machine cannot change it."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.clock, self.seconds = clock, seconds

    def forward(self, x):
        self.clock.now += self.seconds
        return self.linear(x)


@pytest.fixture
def time_slow(monkeypatch):
    """Time two models that take these seconds per step, for a given time."""

    def measure(before, after, seconds):
        clock = Clock()
        monkeypatch.setattr("anynorm.apps.timing.steps.time", clock)
        call = Call((torch.randn(2, 3),))
        return time_steps(Slow(clock, before), Slow(clock, after), call, seconds), clock.now

    return measure


def test_a_slower_model_is_seen_to_be_slower(time_slow):
    timing, _ = time_slow(0.002, 0.02, seconds=0.2)
    assert timing.ratio == pytest.approx(0.1)
    assert dict(describe_speed(timing))["verdict"] == "slower, on this model and machine"


def test_timing_takes_as_long_as_asked_and_thrice_that_for_the_fewest_pairs(time_slow):
    pair = 0.1 + 0.1
    for seconds, pairs in ((2.0, 10), (0.5, FEWEST_PAIRS), (0.1, 2), (0.01, 2)):
        timing, spent = time_slow(0.1, 0.1, seconds)
        assert pairs <= len(timing.before) == len(timing.after) <= pairs + 1
        assert spent <= (len(timing.before) + 2) * pair + 1e-9, "two steps of each to warm up"
