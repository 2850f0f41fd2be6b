"""`anynorm speed` runs and says what it measured; calls that are timed in turn are timed fairly."""

from __future__ import annotations

import io
import time

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import anynorm
from anynorm.apps import cli, speed
from anynorm.apps.timing.cases import MODES, Case, make_call
from anynorm.apps.timing.interleaved import InterleavedTimings, time_interleaved
from anynorm.engine.allocator import AllocatorReport

TINY = Case("tiny", "BatchNorm2d", (4,), (6, 4, 2, 2), channels_last=True)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_rounds_are_interleaved_in_changing_order_and_the_slower_call_takes_longer():
    order = []

    def make(name: str, seconds: float):
        def call():
            order.append(name)
            time.sleep(seconds)

        return call

    rounds = time_interleaved({"slow": make("slow", 0.012), "fast": make("fast", 0.006)}, seconds=0.0, fewest=4)
    assert {name: len(times) for name, times in rounds.seconds.items()} == {"slow": 4, "fast": 4}
    timed = order[4:]  # the first two calls of each are estimates; calls this long need no untimed one
    assert all(set(timed[i : i + 2]) == {"slow", "fast"} for i in range(0, 8, 2))
    assert len({tuple(timed[i : i + 2]) for i in range(0, 8, 2)}) == 2
    assert rounds.ratio("slow", "fast") > 1.2


def test_ratio_is_the_median_over_rounds_and_not_the_ratio_of_medians():
    rounds = InterleavedTimings({"a": [1.0, 2.0, 30.0], "b": [1.0, 4.0, 10.0]})
    assert rounds.ratios("a", "b") == [1.0, 0.5, 3.0]
    assert rounds.ratio("a", "b") == 1.0
    assert rounds.median("a") == 2.0
    assert rounds.quartiles("b") == (2.5, 7.0)


def test_cheap_calls_are_timed_many_at_once_and_in_seconds_of_one():
    calls = []
    rounds = time_interleaved({"cheap": lambda: calls.append(time.sleep(1e-4))}, seconds=0.0, fewest=3)
    assert len(calls) > 3 * 2
    assert 1e-4 <= rounds.median("cheap") < 5e-3


def test_time_is_kept_within_limits():
    rounds = time_interleaved({"cheap": lambda: None}, seconds=60.0, fewest=1, most=7)
    assert len(rounds.seconds["cheap"]) == 7


def test_the_longest_time_is_kept_whatever_a_call_takes():
    """A slow call is not called once more to estimate it, and the fewest rounds need not be complete."""
    start, calls = time.perf_counter(), {name: lambda: time.sleep(0.1) for name in "ab"}
    rounds = time_interleaved(calls, seconds=60.0, fewest=50, longest=0.35)
    assert len(rounds.seconds["a"]) == 2
    assert time.perf_counter() - start < 3.0  # six calls and a busy machine
    start = time.perf_counter()
    rounds = time_interleaved(calls, seconds=60.0, longest=4.0)
    assert 2 < len(rounds.seconds["a"]) < 20
    assert time.perf_counter() - start < 5.0


def test_a_slow_machine_gets_fewer_images():
    asked = []

    def step(each: float):
        return lambda count: asked.append(count) or each * count

    assert [speed.find_count(16, 50.0, step(each)) for each in (0.1, 0.9, 0.5, 30.0)] == [16, 2, 5, 2]
    assert speed.find_count(1, 50.0, step(9.0)) == 1
    assert speed.find_count(16, -1.0, step(0.1)) == 2
    assert asked == [2, 2, 2, 2, 1, 2]


def test_what_is_left_of_the_time_is_shared():
    end = time.perf_counter() + 10.0
    assert 4.0 < speed.find_share(end, 0.2, 0.4) <= 5.0
    assert speed.find_share(end - 60.0, 0.2, 0.4) == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_a_case_is_the_same_layer_in_both_libraries(mode):
    """Equals torch: parameters, running averages and results are the same, so the same work is timed."""
    results = []
    for library in (nn, anynorm):
        module = TINY.make(library).train(mode != "evaluation")
        result = make_call(module, module.parameters(), mode, *TINY.draw())()
        results.append(result if isinstance(result, tuple) else (result,))
    assert len(results[0]) == (3 if mode == "forward+backward" else 1)
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_case_says_where_it_lies_in_memory():
    x, g = TINY.draw()
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert g.stride() == x.stride()
    assert (TINY.norm, TINY.name, TINY.layout, TINY.size) == ("batch", "batch 6x4x2x2", "channels_last", 384)


class Small(nn.Module):
    """Two norms, one of them before an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Tanh())

    def forward(self, x):
        return self.layers(x)


def test_speed_prints_layers_and_steps(monkeypatch):
    monkeypatch.setattr(speed, "CASES", (TINY, Case("tiny", "LayerNorm", (16,), (8, 16))))
    monkeypatch.setattr(speed, "MODELS", {"small": Small})
    tuned = AllocatorReport({"M_MMAP_MAX": 0}, False, "tuned, as it were")  # cannot be undone, so not in a test
    monkeypatch.setattr(anynorm, "tune_allocator", lambda keep_large: tuned)
    arguments = ["speed", "--seconds", "0.1", "--threads", "1", "--batch", "2", "--side", "32"]
    printed = CliRunner().invoke(cli.app, arguments)
    assert printed.exit_code == 0, printed.exception
    for text in ("batch 6x4x2x2, last", "layer 8x16", "geometric mean", "worst", "slower by more than 5 %"):
        assert text in printed.stdout
    for text in (
        "This takes about 0 seconds",
        "the median over rounds",
        "2x3x32x32",
        "small: 2 norms, 1 of them fused",
        "accelerate, fuse=True",
        "tuned, as",
        "It cannot be undone",
    ):
        assert text in printed.stdout
    assert printed.stdout.count("torch.nn ") >= 2
    assert max(map(len, printed.stdout.splitlines())) <= 80
    assert "…" not in printed.stdout


@pytest.mark.parametrize(("times", "busy"), [([1.0, 1.1, 1.2], False), ([1.0, 2.0, 1500.0], True)])
def test_a_table_measured_on_a_busy_machine_says_so_and_fits(monkeypatch, times, busy):
    monkeypatch.setattr(speed, "_time_case", lambda *_: InterleavedTimings({"torch": times, "anynorm": [1.0] * 3}))
    console = Console(file=io.StringIO(), width=80)
    speed._print_cases(console, [TINY], 0.0)
    printed = console.file.getvalue()
    assert ("The machine was busy" in printed) == busy
    assert "…" not in printed


def test_the_usual_layers_are_a_dozen_different_ones_of_every_norm():
    assert len(speed.CASES) == 12
    assert {case.norm for case in speed.CASES} == {"batch", "group", "instance", "layer", "rms"}
    names = [case.name + (", channels_last" if case.channels_last else "") for case in speed.CASES]
    assert len(set(names)) == len(names)
