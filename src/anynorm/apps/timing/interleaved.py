"""Time several calls in turn, round by round, so that whatever disturbs the machine disturbs all of them alike."""

import contextlib
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

CHUNK = 5e-4  # seconds: cheaper calls are timed many at once, or the clock would be what is measured
CHEAP = 5e-3  # seconds: a cheaper call runs once untimed first, because its predecessor emptied the caches
PAUSE = 0.01  # seconds until threads of another runtime, which wait for work by spinning, have gone to sleep
LONGEST = 12.0  # seconds after which the fewest rounds need not be complete
FEWEST_VALUES = 6  # fewer say nothing about their median with 95 %
SLOW = 0.5  # of the time there is: a first call that takes more is not called once more to estimate it

TimedCall = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class InterleavedTimings:
    """Seconds of one call by contestant; those of one round stand at one place in all lists."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median of a contestant's seconds."""
        return statistics.median(self.seconds[name])

    def quartiles(self, name: str) -> tuple[float, float]:
        """Return the seconds between which half of the rounds lie."""
        return find_quartiles(self.seconds[name])

    def ratios(self, name: str, base: str) -> list[float]:
        """Return, for each round, how many times as long as `base` a contestant took."""
        return [one / other for one, other in zip(self.seconds[name], self.seconds[base])]

    def ratio(self, name: str, base: str) -> float:
        """Return the median of the ratios; above 1 `base` is the faster one."""
        return statistics.median(self.ratios(name, base))

    def interval(self, name: str, base: str) -> tuple[float, float]:
        """Return a 95 % interval of that median."""
        return find_interval(self.ratios(name, base))


def find_quartiles(values: list[float]) -> tuple[float, float]:
    """Return the first and the third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def find_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % interval of the median, from order statistics: no shape is assumed. Of few values it is endless."""
    values = sorted(values)
    n = len(values)
    if n < FEWEST_VALUES:
        return 0.0, math.inf
    # Below the k-th smallest value lies the median with probability P(Binomial(n, 1/2) < k).
    chance, k = 0.0, 0
    while chance + math.comb(n, k) / 2**n <= 0.025:
        chance += math.comb(n, k) / 2**n
        k += 1
    lower = max(k - 1, 0)
    return values[lower], values[n - 1 - lower]


def time_interleaved(
    calls: Mapping[str, TimedCall],
    seconds: float,
    fewest: int = 5,
    most: int = 100,
    apart: Collection[str] = (),
    longest: float | None = None,
) -> InterleavedTimings:
    """Time calls in turn, in another order every round.

    Args:
        calls: by name; each is called twice first, to allocate, compile and estimate.
        seconds: how long to go on, at least `fewest` rounds (two, where those take too long), at most `most`.
        longest: seconds for everything, the first calls included, unless two rounds take longer.
        apart: names of calls with a thread pool of their own, kept from the others by a pause.
    """
    began = time.perf_counter()
    slow = math.inf if longest is None else SLOW * longest / len(calls) / 2
    counts = {name: _find_count(call, slow) for name, call in calls.items()}
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    start, before = time.perf_counter(), names[-1]
    end = start + max(LONGEST, seconds) if longest is None else began + longest
    with _no_collector():
        while _goes_on(len(found[names[0]]), start, seconds, (fewest, most), end):
            for name in _find_order(names, len(found[names[0]])):
                if (name in apart) != (before in apart):
                    time.sleep(PAUSE)
                found[name].append(_time_chunk(calls[name], counts[name]))
                before = name
    return InterleavedTimings(found)


def _find_order(names: list[str], turn: int) -> list[str]:
    """Return the names from another first one each turn, and backwards every second time round."""
    first = turn % len(names)
    order = names[first:] + names[:first]
    return order if turn // len(names) % 2 == 0 else order[::-1]


def _goes_on(rounds: int, start: float, seconds: float, limits: tuple[int, int], end: float) -> bool:
    """Return whether to time another round: up to `end` for the fewest, and `seconds` from `start` for the others."""
    fewest, most = limits
    now = time.perf_counter()
    if rounds < fewest:
        return rounds < 2 or now + (now - start) / rounds < end
    return now - start < seconds and now < end and rounds < most


def _find_count(call: TimedCall, slow: float) -> int:
    """Return how many calls make a chunk that the clock can time; 0 for a call that needs no untimed one first."""
    start = time.perf_counter()
    call()
    if time.perf_counter() - start > slow:
        return 0
    start = time.perf_counter()
    call()
    spent = time.perf_counter() - start
    return 0 if spent > CHEAP else max(1, math.ceil(CHUNK / max(spent, 1e-7)))


def _time_chunk(call: TimedCall, count: int) -> float:
    """Return the seconds of one call, on average over a chunk."""
    if count:
        call()
    start = time.perf_counter()
    for _ in range(max(count, 1)):
        call()
    return (time.perf_counter() - start) / max(count, 1)


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Keep Python's cycle collector from running in the middle of a measurement."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
