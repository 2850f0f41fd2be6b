"""What `recalibrate` returns and prints: how far each norm moved, and what was left."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

from torch import Tensor

from ..report import Entry, SurgeryReport, describe, write_left
from .statistics import Population

WIDEST_NAME = 32


@dataclass(frozen=True, eq=False)
class Moved:
    """How far one batch norm moved, and how well its new statistics are known.

    Attributes:
        name, kind: its first name in the model, and its class.
        count: values per channel that its statistics are of.
        batches: how many they came in, on all ranks.
        shift: (C,), float64, (new mean - old mean) / sqrt(old var + eps).
        ratio: (C,), float64, (new var + eps) / (old var + eps).
        mean_error, var_error: (C,), float64, estimated standard errors: of the mean in std, of the variance relative.
    """

    name: str
    kind: str
    count: int
    batches: int
    shift: Tensor = field(repr=False)
    ratio: Tensor = field(repr=False)
    mean_error: Tensor = field(repr=False)
    var_error: Tensor = field(repr=False)

    @property
    def error(self) -> float:
        """The larger of both errors, each as root mean square over channels; inf where it is not known."""
        return find_error(self)


def find_error(found: Population | Moved) -> float:
    """Return the larger of the mean's error and the variance's, each as root mean square over channels."""
    return max(float(t.square().mean().sqrt()) for t in (found.mean_error, found.var_error))


def find_move(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Return `Moved.shift` and `Moved.ratio` of (mean, var) before and after."""
    (mean, var), (new_mean, new_var) = ((t.detach().cpu().double() for t in pair) for pair in (old, new))
    return (new_mean - mean) / (var + eps).sqrt(), (new_var + eps) / (var + eps)


def find_distance(old: Population | None, new: Population, eps: float) -> float:
    """Return the farthest that any channel moved, its mean in std or its variance relative; inf without old ones."""
    if old is None:
        return inf
    shift, ratio = find_move((old.mean, old.var), (new.mean, new.var), eps)
    return max(float(shift.abs().max()), float((ratio - 1).abs().max()))


def make_moved_entry(name: str, norm: Any, new: Population) -> Moved:
    """Return a norm's entry of the report; to be called before the norm is changed."""
    shift, ratio = find_move((norm.running_mean, norm.running_var), (new.mean, new.var), norm.eps)
    return Moved(name, describe(type(norm)), new.count, new.batches, shift, ratio, new.mean_error, new.var_error)


@dataclass
class Recalibration(SurgeryReport):
    """What `recalibrate` did: an `anynorm.SurgeryReport`, and how far each norm moved.

    Attributes:
        moved: every batch norm that has new statistics; `changed` names the same.
        left: what else keeps running averages, and why it was left.
        earlier: ``"batch"`` or ``"population"``.
        batches: taken from the loader in a pass, on this rank.
        passes: over the loader.
        unsettled: with ``"population"``, how far the last pass still moved any statistic: the mean in std, the
            variance relative. 0 with ``"batch"``.
    """

    changed: list[Entry] = field(default_factory=list)
    moved: list[Moved] = field(default_factory=list)
    earlier: str = "batch"
    batches: int = 0
    passes: int = 0
    unsettled: float = 0.0

    def __post_init__(self) -> None:
        self.changed = [Entry(entry.name, entry.kind, became=f"{entry.kind}, recalibrated") for entry in self.moved]

    def __str__(self) -> str:
        passes = f"{self.passes} pass{'es' if self.passes > 1 else ''} of {self.batches} batches"
        lines = [
            f"{len(self.moved)} batch norms recalibrated, {len(self.left)} left; earlier={self.earlier!r}, {passes}"
        ]
        width = min(max([len(shorten_name(entry.name)) for entry in self.moved] + [5]), WIDEST_NAME)
        head = f"{'largest':>9} {'variance, new / old':>21} {'values':>11} {'standard':>9}"
        lines.append(f"  {'':<{width}} {head}")
        lines.append(f"  {'layer':<{width}} {'shift':>9} {'least':>10} {'most':>10} {'per channel':>11} {'error':>9}")
        lines += [f"  {shorten_name(entry.name):<{width}} {write_row(entry)}" for entry in self.moved]
        lines += write_left(self.left)
        return "\n".join(lines)


def shorten_name(name: str) -> str:
    """Return a name that fits the column: of a long one its end, which says more than its beginning."""
    name = name or "the model"
    return name if len(name) <= WIDEST_NAME else f"…{name[1 - WIDEST_NAME :]}"


def write_row(entry: Moved) -> str:
    """Return a norm's row: largest shift in old std, least and largest ratio of variances, values, standard error."""
    shift = float(entry.shift[entry.shift.abs().argmax()])
    low, high = float(entry.ratio.min()), float(entry.ratio.max())
    error = "unknown" if entry.error == float("inf") else f"{entry.error:.1e}"
    return f"{shift:>+9.3g} {low:>10.3g} {high:>10.3g} {entry.count:>11,} {error:>9}"
