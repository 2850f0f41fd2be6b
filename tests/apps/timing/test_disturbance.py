"""A disturbed measurement is taken again, and marked where that does not help. Times are made up."""

from types import SimpleNamespace

import pytest

from anynorm.apps.timing.disturbance import find_disturbance, time_undisturbed
from anynorm.apps.timing.interleaved import InterleavedTimings, find_interval

CALM = {"torch": [1.0, 1.1, 1.2], "again": [1.0, 1.1, 1.2], "anynorm": [0.5, 0.5, 0.5]}


def make(**changes):
    return InterleavedTimings(CALM | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"anynorm": [0.5, 0.51, 4.0]}, "the same call of anynorm differed by 347 %"),
        ({"anynorm": [1.0, 1.2, 1.48]}, ""),  # quartiles 1.1 and 1.34, which is 22 % more
        ({"anynorm": [1.0, 1.2, 1.58]}, "the same call of anynorm differed by 26 %"),
        ({"again": [1.09, 1.2, 1.31]}, ""),
        ({"again": [1.11, 1.23, 1.34]}, "torch differed from itself by 12 %"),
        ({"again": [0.8, 0.9, 1.0]}, "torch differed from itself by 18 %"),
        (
            {"again": [1.0, 2.2, 9.0]},
            "the same call of again differed by 250 % and torch differed from itself by 100 %",
        ),
    ],
)
def test_a_spread_over_a_quarter_or_a_drift_over_a_tenth_disturbs(changes, words):
    assert find_disturbance(make(**changes), "torch", "again") == words


@pytest.mark.parametrize("calm", [0, 1, 2, None])
def test_it_is_measured_until_it_is_calm_and_else_the_calmest_is_marked(calm):
    asked = []
    unrest = [3.0, 2.0, 4.0]  # the second is the calmest of those that are disturbed

    def measure(attempt):
        asked.append(attempt)
        return make() if attempt == calm else make(anynorm=[1.0, 1.0, unrest[attempt]])

    timings, words = time_undisturbed(measure, "torch", "again", attempts=3)
    assert asked == list(range(3 if calm is None else calm + 1))
    assert bool(words) == (calm is None)
    assert timings == (make(anynorm=[1.0, 1.0, 2.0]) if calm is None else make())


def test_no_attempt_is_made_that_does_not_fit_into_the_time(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr("anynorm.apps.timing.disturbance.time", clock)

    def measure(attempt):
        clock.now += 0.5 if attempt else 1.0
        return make(anynorm=[1.0, 1.0, 9.0])

    for longest, spent in ((1.4, 1.0), (1.5, 1.5), (2.2, 1.5), (2.25, 2.0)):
        clock.now = 0.0
        time_undisturbed(measure, "torch", "again", 3, longest)
        assert clock.now == spent


def test_few_values_bound_no_median():
    assert find_interval([1.0] * 5) == (0.0, float("inf"))
    assert find_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1.0, 6.0)
