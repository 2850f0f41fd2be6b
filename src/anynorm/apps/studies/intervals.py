"""Intervals of means over seeds, and of differences that are taken seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
# Two seeds have a single difference between them: an interval, but no notion of how differences are spread.
LEAST_SEEDS = 3

Seeds = Mapping[int, float]  # values by seed


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % t-interval; low and high are None with fewer than two seeds."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def verdict(self) -> str:
        """`higher`, `lower`, `no clear difference`, or `not judged` with fewer than three seeds."""
        if self.low is None or self.high is None or self.seeds < LEAST_SEEDS:
            return "not judged"
        if self.low > 0:
            return "higher"
        return "lower" if self.high < 0 else "no clear difference"


def find_interval(values: Sequence[float], least: float = 0.0, confidence: float = CONFIDENCE) -> Interval | None:
    """Mean and t-interval, of 95 % if not said, of values from different seeds; None without values.

    Their standard deviation counts as `least` where it is smaller.
    """
    count = len(values)
    if count == 0:
        return None
    mean = float(np.mean(values))
    if count == 1:
        return Interval(mean, None, None, 1)
    # scipy.stats has the same quantile, but takes seconds to import.
    from scipy.special import stdtrit

    deviation = max(float(np.std(values, ddof=1)), least)
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * deviation / count**0.5
    return Interval(mean, mean - half, mean + half, count)


def compare_pair(first: Seeds, second: Seeds, least: float = 0.0, confidence: float = CONFIDENCE) -> Interval | None:
    """First minus second, seed by seed, over the seeds that both have.

    Where scores move in steps, equal differences over few seeds may be chance: the standard deviation of the
    differences counts as `least`, one step, at least.
    """
    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    return find_interval(differences, least, confidence)


def share_confidence(count: int) -> float:
    """The confidence that each of `count` intervals needs, so that all hold together at 95 % (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(1, count)
