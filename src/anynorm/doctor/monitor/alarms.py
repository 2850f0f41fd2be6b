"""What is warned of, when, and the remedy; each problem of a layer once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...surgery.report import describe
from .measure import Evidence
from .norms import moves_averages
from .record import Record

# Name of each problem, as it stands in the file, and what it is.
PROBLEMS: dict[str, str] = {
    "nonfinite-input": "NaN or infinity reached the norm",
    "nonfinite-averages": "the running averages are NaN or infinite",
    "nonfinite-gamma": "gamma is NaN or infinite",
    "half-averages": "the running averages are kept in half precision",
    "not-following": "the running averages do not follow the batches",
    "constant": "channels hardly vary",
    "noise": "the batch's mean is noisy",
    "no-gradient": "hardly any gradient reaches gamma",
    "unmeasured": "the norm's input could not be measured",
}

NOISY = 0.5  # std: the standard error of the mean, beyond which outputs are a matter of chance
TWICE = 2  # records in a row, so that one small batch is no alarm
LAG = 0.25  # std: a gap below it costs little
ERRORS = 5.0  # standard errors, below which a gap may be chance
ALIKE = 0.8  # cosine between the gaps of two records: averages that follow are not off in the same way
LAGGING = 3  # records in a row
SETTLED = 5.0  # time constants of the averages, after which nothing of their first values is left
LONGEST = 200  # steps until averages are expected to have settled, however slowly they move
FAINT = 1e-7  # of the median over layers
NAMED = 8  # other layers with the same problem


@dataclass(frozen=True)
class Alarm:
    """A problem of one layer, the first time that it is there."""

    problem: str
    record: Record
    text: str


class Alarms:
    """Looks at the records of each measured step, marks them, and finds what to say."""

    def __init__(self) -> None:
        self.said: set[tuple[str, str]] = set()
        self.rows: dict[tuple[str, str], int] = {}  # how many records in a row show a problem
        self.gaps: dict[str, Evidence] = {}

    def look(
        self, records: Sequence[Record], norms: dict[str, Any], evidence: dict[str, Evidence | None]
    ) -> list[Alarm]:
        """Mark the records of one step, in the order in which the norms were called."""
        found: list[Alarm] = []
        for record in records:
            norm, words = norms[record.layer], record.nonfinite.split()
            wrong = [word for word in words if word.startswith("running_")]
            found += self.repeat(record, "nonfinite-input", "input" in words, 1, INPUT)
            found += self.repeat(record, "nonfinite-averages", bool(wrong), 1, AVERAGES)
            found += self.repeat(record, "nonfinite-gamma", "gamma" in words, 1, GAMMA)
            found += self.look_at_averages(record, norm, evidence.get(record.layer))
            found += self.repeat(record, "constant", record.constant > 0, TWICE, partial(say_constant, record, norm))
            found += self.repeat(record, "noise", record.noise > NOISY, TWICE, partial(say_noise, record))
        return found

    def look_at_averages(self, record: Record, norm: Any, now: Evidence | None) -> list[Alarm]:
        """Averages in half precision, and those that lag behind the batches in the same way at every record."""
        before = self.gaps.pop(record.layer, None)
        if not moves_averages(norm):
            return []
        kind = norm.running_mean.dtype
        is_half = kind in (torch.bfloat16, torch.float16)
        found = self.repeat(record, "half-averages", is_half, 1, partial(say_half, kind))
        if now is None:
            return found
        self.gaps[record.layer] = now
        lags = before is not None and is_settled(record, norm) and lag(before, now)
        return found + self.repeat(record, "not-following", lags, LAGGING - 1, partial(say_lag, record, norm))

    def look_at_gradients(self, records: Sequence[Record]) -> list[Alarm]:
        """Mark the layers that hardly any gradient reaches."""
        found: list[Alarm] = []
        known = [record.gradient for record in records if math.isfinite(record.gradient)]
        usual = statistics.median(known) if known else 0.0
        for record in records:
            if math.isfinite(record.gradient):
                is_faint = record.gradient == 0 or record.gradient < FAINT * usual
                found += self.repeat(record, "no-gradient", is_faint, LAGGING, partial(say_faint, record, usual))
        return found

    def note_unmeasured(self, layer: str, norm: Any, problem: Exception) -> list[Alarm]:
        """A norm whose input raised an error while it was measured."""
        record = Record(-1, layer, describe(type(norm)))
        return self.repeat(record, "unmeasured", True, 1, f"its input could not be measured: {problem!r}")

    def repeat(
        self, record: Record, problem: str, is_so: bool, times: int, text: str | Callable[[], str]
    ) -> list[Alarm]:
        """Mark a record whose problem is the last of `times` in a row; an alarm the first time."""
        key = (record.layer, problem)
        self.rows[key] = self.rows.get(key, 0) + 1 if is_so else 0
        if self.rows[key] < times:
            return []
        record.note("warned", problem)
        if key in self.said:
            return []
        self.said.add(key)
        return [Alarm(problem, record, text if isinstance(text, str) else text())]


def write_messages(alarms: Sequence[Alarm]) -> list[str]:
    """One message for each problem: of the layer that was called first, with the names of the others that have it."""
    found: dict[str, list[Alarm]] = {}
    for alarm in alarms:
        found.setdefault(alarm.problem, []).append(alarm)
    return [write_message(group[0], [alarm.record.layer for alarm in group[1:]]) for group in found.values()]


def write_message(first: Alarm, others: Sequence[str]) -> str:
    """Where, when and what, the remedy, and who else."""
    record = first.record
    when = f"step {record.step}, " if record.step >= 0 else ""
    named = ", ".join(others[:NAMED]) + (f" and {len(others) - NAMED} more" if len(others) > NAMED else "")
    too = f". The same of {named}" if others else ""
    return f"anynorm.Monitor: {when}{record.layer or 'the model'} ({record.kind}): {first.text}{too}"


def is_settled(record: Record, norm: Any) -> bool:
    """Whether the averages have had time to forget their first values."""
    counter = getattr(norm, "num_batches_tracked", None)
    seen = max(record.step, 0 if counter is None else int(counter))
    return seen >= min(SETTLED / norm.momentum if norm.momentum else LONGEST, LONGEST)


def lag(before: Evidence, now: Evidence) -> bool:
    """Whether averages are off now by more than chance and drift explain, and in the same way as before."""
    if now.gap.shape != before.gap.shape:
        return False
    for was, is_now in ((before.gap, now.gap), (before.spread, now.spread)):
        size = is_now.abs().median()
        alike = torch.nn.functional.cosine_similarity(was, is_now, 0)
        if size > max(LAG, ERRORS * float(now.error.median())) and alike > ALIKE:
            return True
    return False


INPUT = (
    "NaN or infinity reached it; look at the layers before it for an overflow of half precision, and at the data; "
    "anynorm's batch norms keep their running averages with on_nonfinite='skip' (pytorch#90342)"
)
AVERAGES = (
    "its running averages are NaN or infinite and will stay so, and evaluation gives NaN (pytorch#90342, #115500); "
    "anynorm.recalibrate(model, loader) finds them anew, and on_nonfinite='skip' of anynorm's batch norms leaves such "
    "batches out"
)
GAMMA = (
    "gamma is NaN or infinite, and so is every output from now on; go back to a checkpoint; clip gradients, lower the "
    "rate, or let torch.amp.GradScaler skip such steps"
)


def say_half(kind: torch.dtype) -> str:
    """Why that stalls."""
    return (
        f"its running averages are {str(kind).removeprefix('torch.')}, where a step smaller than the spacing of "
        "numbers is lost, so that they stall (Model-Optimizer#738); keep the norm in float32, which takes inputs of "
        "half precision too: norm.float(), or leave the model in float32 and train with torch.autocast"
    )


def say_lag(record: Record, norm: Any) -> str:
    """How far, and what may be the cause."""
    return (
        f"the running averages do not follow the batches: for {LAGGING} records in a row the median channel is off by "
        f"{record.gap:.2g} std in its mean, or by a factor of {record.ratio:.2g} in its variance, always in the same "
        f"way (keras#7265); momentum is {norm.momentum}, the weight of the new batch: raise it, give data of one kind "
        "to one norm (anynorm.DomainBatchNorm2d), or call anynorm.recalibrate(model, loader) before evaluation"
    )


def say_constant(record: Record, norm: Any) -> str:
    """How many, and what that means."""
    total = "" if norm.running_mean is None else f" of {len(norm.running_mean)}"
    return (
        f"{record.constant}{total} channels hardly vary: their variance is below a hundredth of eps ({norm.eps:g}), so "
        "that they carry nothing; dead units before it (lower the rate, look at the layers before), inputs so small "
        "that eps outweighs them (scale them, or lower eps), or features that are constant in the data, which is "
        "harmless"
    )


def say_noise(record: Record) -> str:
    """How noisy, and what helps."""
    return (
        f"the mean of a batch is noisy: its standard error is {record.noise:.2g} std, as of {record.noise**-2:.2g} "
        "independent values; use a larger batch, anynorm.accumulate or anynorm.sync to share statistics, or "
        "anynorm.convert(model, to='group')"
    )


def say_faint(record: Record, usual: float) -> str:
    """How little."""
    return (
        f"hardly any gradient reaches gamma: its norm is {record.gradient:.1g} where that of the median layer is "
        f"{usual:.1g}, {LAGGING} records in a row; look for detach(), no_grad() or dead activations behind it, or "
        "freeze it"
    )
