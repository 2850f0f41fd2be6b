"""Geometric means, each with its worst case and its losses."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from .results import Row

MOST_LONGER = 1.05  # a case is lost where anynorm takes longer than so many times the peer's time
BOTH = "forward+backward"


class Rated(Protocol):
    """What has a ratio."""

    @property
    def ratio(self) -> float: ...


@dataclass(frozen=True)
class Summary:
    """The geometric mean of ratios; the least of them, whose it is, and how many are losses."""

    mean: float
    worst: float
    worst_name: str
    losses: int
    count: int

    def __str__(self) -> str:
        lost = f"{self.losses} of {self.count} lost"
        return f"{self.mean:.2f} (worst {self.worst:.2f}: {self.worst_name}; {lost})"


def is_lost(row: Rated) -> bool:
    """Whether anynorm takes longer than the peer, beyond noise."""
    return row.ratio * MOST_LONGER < 1


def mean_ratio(rows: Iterable[Rated]) -> float:
    """The geometric mean of ratios."""
    return statistics.geometric_mean([row.ratio for row in rows])


def mean_over_limit(rows: Iterable[Row]) -> float:
    """The geometric mean of times over their limits."""
    return 1 / statistics.geometric_mean([row.share for row in rows])


def summarize(rows: Iterable[Row]) -> Summary | None:
    """The ratios of these rows; None where there are none."""
    rows = list(rows)
    if not rows:
        return None
    worst = min(rows, key=lambda row: row.ratio)
    return Summary(mean_ratio(rows), worst.ratio, f"{worst.name}, {worst.mode}", sum(map(is_lost, rows)), len(rows))


def find_best_others(rows: list[Row]) -> list[Row]:
    """Of each comparison the faster one of torch.compile and JAX, as peer "best"."""
    best: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.peer in ("compile", "jax") and (row.key not in best or row.ratio < best[row.key].ratio):
            best[row.key] = row
    return [replace(row, peer="best") for row in best.values()]


def write_time(microseconds: float) -> str:
    """Three digits, in microseconds or milliseconds."""
    return f"{microseconds / 1e3:.3g} ms" if microseconds >= 1e3 else f"{microseconds:.3g} us"
