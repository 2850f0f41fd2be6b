"""Where the time of anynorm's layer goes: its kernels, new memory for the results, and the call around them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from .results import Row
from .summaries import write_time

WORST = 3  # cases that are named where a goal is missed
PARTS = ("kernel", "memory", "call")
Causes = dict[tuple[str, ...], "Parts"]


@dataclass(frozen=True)
class Parts:
    """Microseconds of a layer's call; together they are the whole.

    Attributes:
        kernel: of the kernels alone, into the same memory each time.
        memory: that they take longer into new memory: page faults, and making tensors.
        call: all else of the module's call: Python, checks, autograd.
        limit: of the fewest bytes at the bandwidth of a copy.
    """

    kernel: float
    memory: float
    call: float
    limit: float

    @property
    def whole(self) -> float:
        """Microseconds of the call."""
        return self.kernel + self.memory + self.call

    @property
    def shares(self) -> tuple[float, ...]:
        """Of `PARTS`, in the whole."""
        return tuple(part / self.whole for part in (self.kernel, self.memory, self.call))

    def __str__(self) -> str:
        return f"{write_shares(self.shares)} of {write_time(self.whole)}, limit {write_time(self.limit)}"


def find_causes(rows: Iterable[Row]) -> Causes:
    """The parts of each case in each mode whose kernels were timed alone.

    Each is from the medians of ratios taken round by round. What takes less time than its part alone did, by chance,
    counts as nothing.
    """
    peers: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        peers.setdefault(row.key, {})[row.peer] = row
    return {key: find_parts(found) for key, found in peers.items() if {"anynorm", "kernel", "fresh"} <= set(found)}


def find_parts(peers: dict[str, Row]) -> Parts:
    """The parts of one case in one mode."""
    whole = peers["anynorm"].median_us
    kernel = min(peers["kernel"].ratio, 1.0)
    fresh = min(max(peers["fresh"].ratio, kernel), 1.0)
    return Parts(kernel * whole, (fresh - kernel) * whole, (1 - fresh) * whole, peers["anynorm"].limit_us)


def name_worst(rows: Iterable[Row], causes: Causes, *, over_limit: bool = False) -> str:
    """The worst cases in words, each with its ratio, or with its time over the limit, and its parts; then the average.

    Cases whose kernels were not timed alone are named without parts, and kernels alone have none.
    """
    rows = list(rows)
    words = []
    for row in sorted(rows, key=lambda row: row.share if over_limit else row.ratio)[:WORST]:
        number = 1 / row.share if over_limit else row.ratio
        words.append(f"{number:.2f} {row.name}, {row.mode}{say_parts(row, causes)}")
    known = [causes[row.key].shares for row in rows if row.key in causes and row.peer != "kernel"]
    if len(known) > WORST:
        words.append(f"all {len(known)} on average: {write_shares([fmean(shares) for shares in zip(*known)])}")
    return "; ".join(words)


def say_parts(row: Row, causes: Causes) -> str:
    """Where the time of a row goes, behind a colon."""
    if row.peer == "kernel":
        return f": {write_time(row.median_us)}, limit {write_time(row.limit_us)}"
    return f": {causes[row.key]}" if row.key in causes else ""


def write_shares(shares: Iterable[float]) -> str:
    """Shares of `PARTS` in percent."""
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in zip(PARTS, shares, strict=True))
