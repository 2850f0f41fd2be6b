"""What batches show of where norms stand: axes, single elements, one value per channel, dropout before a norm."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

import torch.nn as nn

from ...surgery.accelerate import accelerate
from ...surgery.convert import convert
from ..check import Check, Finding, Repair
from ..facts import Facts, NormFacts
from .repairs import make_recalibration

TURNS = ("transpose", "permute", "swapaxes", "movedim", "moveaxis", "rearrange", "mT", "T")
FEATURES_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention, nn.TransformerEncoderLayer)


class WrongAxis(Check):
    id = "channels-on-the-last-axis"
    title = "the norm takes positions for channels"
    severity = "error"
    needs = "data"
    fault = (
        "torch's batch, group and instance norm read channels from axis 1; behind a linear layer they are on the "
        "last. The norm then has a gamma for each position, mixes features, and refuses every other length."
    )
    evidence = (
        "The layer before the norm gives (N, L, C), and the norm counts L channels; behind a linear layer a warning, "
        "since one over positions is possible."
    )
    cure = "transpose before and behind it, or say the axes: anynorm.AnyNorm('n l c -> c', ...)"

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.norms:
            seen = facts.evaluation.seen.get(norm.name)
            before = [step for step in norm.around.before if not step.activation and not is_dropout(step.module)]
            is_turned = any(step.function in TURNS for step in before[1:])  # of positions, as in a mixer
            if norm.kind not in ("batch", "group", "instance") or seen is None or not before or not seen.shapes:
                continue
            shape, layer = seen.shapes[0], before[0].module
            if len(shape) >= 3 and isinstance(layer, FEATURES_LAST) and not is_turned:
                yield self.find(
                    norm.name,
                    f"{norm.said} takes axis 1 of {shape} for channels; {before[0].said} has its {shape[-1]} "
                    "features last",
                    severity="warning" if isinstance(layer, nn.Linear) else "error",
                    positions=shape[1],
                    features=shape[-1],
                )


def is_dropout(module: nn.Module | None) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd)


class OneElement(Check):
    id = "groups-of-one-element"
    title = "each mean is of one element: the output is beta"
    severity = "error"
    needs = "data"
    fault = (
        "Group norm with as many groups as channels, or instance norm, on maps of 1x1: x minus itself. The output "
        "is beta for every input, and no gradient passes."
    )
    evidence = "Channels of a group times positions, in the shapes that the model was called with."
    cure = "fewer groups, so that each has two channels or more"
    threads = ("pytorch#19250", "opacus#567")

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.norms:
            seen = facts.evaluation.seen.get(norm.name)
            if norm.kind not in ("group", "instance") or seen is None or not seen.shapes or norm.has_averages:
                continue
            shape = seen.shapes[0]
            groups = norm.module.num_groups if norm.kind == "group" else shape[1]
            if len(shape) >= 2 and shape[1] // groups * prod(shape[2:]) == 1:
                yield self.find(
                    norm.name,
                    f"{norm.said}: {groups} groups of {shape[1]} channels on "
                    f"{'x'.join(map(str, shape[2:])) or '1'} positions",
                    repair=make_larger_groups(facts, norm, shape[1]),
                    groups=groups,
                    channels=shape[1],
                )


def make_larger_groups(facts: Facts, norm: NormFacts, channels: int) -> Repair | None:
    """Groups of two channels or more, by the same gamma and beta."""
    fewer = max((g for g in range(1, channels // 2 + 1) if channels % g == 0), default=0)
    if not fewer:
        return None
    if norm.kind == "group":
        perform = partial(setattr, norm.module, "num_groups", fewer)
        return Repair(f"{norm.path}.num_groups = {fewer}", perform, needs_training=True)
    code = f"anynorm.convert(model, 'group', num_groups={fewer}, where={norm.name!r})"
    change = partial(convert, facts.model, "group", num_groups=fewer, where=lambda _, each: each is norm.module)
    return Repair(code, change, needs_training=True)


class OneValue(Check):
    id = "one-value-per-channel"
    title = "a batch of one has one value per channel"
    severity = "error"
    needs = "data"
    fault = (
        "'Expected more than 1 value per channel when training': of one value the mean is the value and the "
        "variance 0. It comes with the last batch of a loader, with batches of one, or with one node or "
        "observation."
    )
    evidence = (
        "What a batch in training raises, or what is left over when the loader's samples are divided by its batch size."
    )
    cure = (
        "drop_last=True in the loader, or on_single='running' of anynorm's batch norms, which then use their averages"
    )
    threads = ("pytorch#4534", "pytorch#7716", "pytorch#156051", "stable-baselines3#614", "tianshou#773", "PyG#5529")

    def run(self, facts: Facts) -> Iterator[Finding]:
        left = find_left_over(facts.inputs.loader)
        size = facts.evaluation.size
        for norm in facts.averaging:
            seen = facts.training.seen.get(norm.name)
            if norm.kind != "batch" or seen is None or not seen.shapes or norm.frozen is not None:
                continue
            tolerant = getattr(norm.module, "on_single", "error") != "error"
            single = any(len(shape) >= 2 and shape[0] * prod(shape[2:]) == 1 for shape in seen.shapes)
            coming = left == 1 and any(
                shape[0] == size and prod(shape[2:]) == 1 for shape in seen.shapes if len(shape) >= 2
            )
            if (single or coming) and not tolerant:
                said = "a batch has" if single else "the loader's last batch will have"
                yield self.find(
                    norm.name,
                    f"{norm.said}: {said} one value per channel",
                    repair=make_tolerant(facts, norm),
                    left_over=left,
                )


def find_left_over(loader: Any) -> int:
    """Samples in a DataLoader's last batch; -1 where nobody knows, or where it is dropped."""
    size: Any = getattr(loader, "batch_size", None)
    dataset: Any = getattr(loader, "dataset", None)
    if not isinstance(size, int) or not hasattr(dataset, "__len__") or getattr(loader, "drop_last", False):
        return -1
    return len(dataset) % size or size


def make_tolerant(facts: Facts, norm: NormFacts) -> Repair:
    """Ours, which uses its averages for such a batch."""

    def perform() -> None:
        accelerate(facts.model)
        if "on_single" in vars(norm.module) or hasattr(type(norm.module), "on_single"):
            norm.module.on_single = "running"

    return Repair(f"anynorm.accelerate(model)\n{norm.path}.on_single = 'running'", perform, is_exact=True)


class DropoutBeforeNorm(Check):
    id = "dropout-before-batch-norm"
    title = "dropout before batch norm: the averages are of what evaluation never sees"
    needs = "data"
    fault = (
        "Dropout multiplies what is kept by 1 / (1 - p), which leaves the mean and raises the variance; in "
        "evaluation there is none, and the running variance is too large. Accuracy differs between the modes on "
        "the same data."
    )
    evidence = (
        "The variance before the norm with and without dropout, against the running variance; all as shares of "
        "it, over channels in the median."
    )
    cure = (
        "find the averages without dropout: model.eval(), then anynorm.recalibrate(model, loader); or put dropout "
        "behind the last norm"
    )

    def run(self, facts: Facts) -> Iterator[Finding]:
        if not facts.drops:
            return
        for norm in facts.averaging:
            dropped, whole = (run.seen.get(norm.name) for run in (facts.training, facts.undropped))
            one = None if dropped is None else dropped.merge()
            other = None if whole is None else whole.merge()
            if one is None or other is None or norm.var is None or norm.kind != "batch":
                continue
            eps = norm.module.eps
            ratio = float(((one.var + eps) / (other.var + eps)).median())
            kept = float(((norm.var + eps) / (other.var + eps)).median())
            error = float(other.var_error.nan_to_num(1.0, 1.0, 1.0).median())
            if ratio > 1.1 and kept > 1 + (ratio - 1) / 2 and kept - 1 > 3 * error:
                yield self.find(
                    norm.name,
                    f"{norm.said}: dropout makes the variance {ratio:.2f} times as large, and the running variance is "
                    f"{kept:.2f} times what evaluation sees",
                    repair=make_recalibration(facts),
                    ratio=ratio,
                    running=kept,
                )
