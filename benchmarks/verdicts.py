"""Means, each with its worst case and its losses, and whether the goals are met."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from .results import Row

NOISE = 0.05  # a case is lost where anynorm takes more than this share longer
SMALL_FORWARD = 1.5  # how many times as long as torch a small layer or group norm may take in forward alone
NEAR_LIMIT = 1.5
BOTH = "forward+backward"
Where = Callable[[Row], bool]


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


@dataclass(frozen=True)
class Verdict:
    """A goal, what was found, and whether that is enough."""

    goal: str
    found: str
    result: str


def summarize(rows: Iterable[Row]) -> Summary | None:
    """The ratios of these rows; None where there are none."""
    rows = list(rows)
    if not rows:
        return None
    worst = min(rows, key=lambda row: row.ratio)
    losses = sum(row.ratio < 1 - NOISE for row in rows)
    mean = statistics.geometric_mean([row.ratio for row in rows])
    return Summary(mean, worst.ratio, f"{worst.name}, {worst.mode}", losses, len(rows))


def find_best_others(rows: list[Row]) -> list[Row]:
    """Of each comparison the faster one of torch.compile and JAX, as peer "best"."""
    best: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.peer in ("compile", "jax") and (row.key not in best or row.ratio < best[row.key].ratio):
            best[row.key] = row
    return [replace(row, peer="best") for row in best.values()]


def is_small_forward(row: Row) -> bool:
    """Whether the goals allow a case to be slower: forward alone, of a tiny layer or group norm."""
    return row.place == "tiny" and row.norm in ("layer", "group") and row.mode != BOTH


def judge(rows: list[Row]) -> list[Verdict]:
    """Every goal on the float32 rows."""
    rows = [row for row in rows if row.dtype == "float32"]
    rows += find_best_others(rows)
    eager: Where = lambda row: row.peer == "torch"  # noqa: E731
    both: Where = lambda row: eager(row) and row.mode == BOTH  # noqa: E731
    last: Where = lambda row: both(row) and row.layout == "channels_last"  # noqa: E731
    return [
        judge_mean("forward + backward, torch eager", 3, filter(both, rows)),
        judge_mean(
            "forward + backward, the better of torch.compile and JAX",
            2,
            (row for row in rows if row.peer == "best" and row.mode == BOTH),
        ),
        judge_mean("forward in training, torch eager", 3, (r for r in rows if eager(r) and r.mode == "training")),
        judge_losses([row for row in rows if eager(row) and not is_small_forward(row)]),
        judge_small([row for row in rows if eager(row) and is_small_forward(row)]),
        judge_limit([row for row in rows if row.peer == "anynorm" and row.out_of_cache]),
        judge_mean(
            "group norm, channels_last, forward + backward", 5, (r for r in rows if last(r) and r.norm == "group")
        ),
        judge_mean(
            "instance norm, channels_last, forward + backward", 5, (r for r in rows if last(r) and r.norm == "instance")
        ),
        judge_mean("RMS norm, forward + backward", 10, (row for row in rows if both(row) and row.norm == "rms")),
    ]


def judge_mean(what: str, wanted: float, rows: Iterable[Row]) -> Verdict:
    """A geometric mean of at least `wanted`."""
    goal = f"{what}: at least {wanted:g} times as fast"
    summary = summarize(rows)
    if summary is None:
        return Verdict(goal, "-", "not measured")
    short = 1 - summary.mean / wanted
    return Verdict(goal, str(summary), "met" if short <= 0 else f"missed by {100 * short:.0f} %")


def judge_losses(rows: list[Row]) -> Verdict:
    """No case slower than torch eager beyond noise."""
    goal = f"no case slower than torch eager by more than {100 * NOISE:.0f} %, small layer and group forwards aside"
    summary = summarize(rows)
    if summary is None:
        return Verdict(goal, "-", "not measured")
    found = f"{summary.losses} of {summary.count} lost, worst {summary.worst:.2f}: {summary.worst_name}"
    return Verdict(goal, found, "met" if not summary.losses else f"missed by {summary.losses} cases")


def judge_small(rows: list[Row]) -> Verdict:
    """Small layer and group norms in forward alone: at most 1.5 times torch's time."""
    goal = f"small layer and group forwards: at most {SMALL_FORWARD:g} times torch's time"
    if not rows:
        return Verdict(goal, "-", "not measured")
    worst = min(rows, key=lambda row: row.ratio)
    times = 1 / worst.ratio
    found = f"at most {times:.2f} times: {worst.name}, {worst.mode}; {len(rows)} cases"
    over = times / SMALL_FORWARD - 1
    return Verdict(goal, found, "met" if over <= 0 else f"missed by {100 * over:.0f} %")


def judge_limit(rows: list[Row]) -> Verdict:
    """Cases out of cache: within 1.5 times the time of their bytes."""
    goal = f"cases out of cache: at most {NEAR_LIMIT:g} times their limit"
    if not rows:
        return Verdict(goal, "-", "not measured")
    worst = min(rows, key=lambda row: row.share)
    over = [row for row in rows if row.share * NEAR_LIMIT < 1]
    mean = 1 / statistics.geometric_mean([row.share for row in rows])
    found = (
        f"{mean:.2f} times on average, {1 / worst.share:.2f} at worst: {worst.name}, {worst.mode}; "
        f"{len(over)} of {len(rows)} over"
    )
    return Verdict(goal, found, "met" if not over else f"missed by {len(over)} cases")
