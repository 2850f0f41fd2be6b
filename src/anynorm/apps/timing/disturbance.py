"""Did other work disturb a measurement? Then it is taken again, and marked where that does not help."""

import math
import time
from collections.abc import Callable

from anynorm.apps.timing.interleaved import InterleavedTimings

MOST_SPREAD = 0.25  # of one contestant: how far the third quartile may lie above the first
MOST_DRIFT = 0.10  # of a contestant that takes part twice: how far the median of the ratios may lie from 1


def find_disturbance(timings: InterleavedTimings, base: str, again: str) -> str:
    """Return what says that other work disturbed the rounds, in words; an empty string where nothing does.

    Args:
        base, again: two contestants that do the same.
    """
    name, spread = _find_widest(timings)
    drift = abs(timings.ratio(again, base) - 1)
    found = [f"the same call of {name} differed by {100 * spread:.0f} %"] if spread > MOST_SPREAD else []
    if drift > MOST_DRIFT:
        found.append(f"{base} differed from itself by {100 * drift:.0f} %")
    return " and ".join(found)


def time_undisturbed(
    measure: Callable[[int], InterleavedTimings], base: str, again: str, attempts: int, longest: float = math.inf
) -> tuple[InterleavedTimings, str]:
    """Measure until nothing disturbs it, `attempts` times at most; return the calmest timings, and what disturbed them.

    Args:
        measure: takes the number of the attempt, from 0.
        base, again: two contestants that do the same, by name.
        attempts: at least 1.
        longest: seconds. Another attempt is made only where half of the time that they took so far is left of them.
    """
    found: list[InterleavedTimings] = []
    start = time.perf_counter()
    for attempt in range(attempts):
        if found and 1.5 * (time.perf_counter() - start) > longest:
            break
        found.append(measure(attempt))
        if not find_disturbance(found[-1], base, again):
            return found[-1], ""
    calmest = min(found, key=lambda timings: _measure_unrest(timings, base, again))
    return calmest, find_disturbance(calmest, base, again)


def _measure_unrest(timings: InterleavedTimings, base: str, again: str) -> float:
    """Return how near spread and drift are to their limits; above 1 at least one is beyond it."""
    return max(_find_widest(timings)[1] / MOST_SPREAD, abs(timings.ratio(again, base) - 1) / MOST_DRIFT)


def _find_widest(timings: InterleavedTimings) -> tuple[str, float]:
    """Return the contestant whose quartiles lie furthest apart, and how far, as a share of the first."""
    spreads = {name: (high - low) / low for name in timings.seconds for low, high in [timings.quartiles(name)]}
    name = max(spreads, key=lambda name: spreads[name])
    return name, spreads[name]
