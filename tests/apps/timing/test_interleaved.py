"""Calls that are timed in turn are timed fairly, and within their time."""

from __future__ import annotations

import time

import pytest

from anynorm.apps.timing.interleaved import InterleavedTimings, time_interleaved

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert time.perf_counter() - start < 30.0  # six calls on a busy machine, and not 100
    start = time.perf_counter()
    rounds = time_interleaved(calls, seconds=60.0, longest=4.0)
    assert 2 <= len(rounds.seconds["a"]) < 20  # on a busy machine a round takes a second
    assert time.perf_counter() - start < 30.0
