"""Numbers that arithmetic cannot hold: NaN, overflow in half precision, lost digits, and channels that died."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from ... import reference
from ...functional.batch import batch_norm
from ...surgery.accelerate import accelerate
from ...surgery.report import is_ours
from ..check import Check, Effect, Finding, Repair
from ..facts import Facts, NormFacts
from ..passes import Seen
from .neighbours import find_source

HALF = torch.finfo(torch.float16).max
NEAR = 0.25  # of what float16 holds
FLAT = 1e3  # |mean| / std, from where float32 sums lose digits
LOST = 1e-3  # of the largest output
ENOUGH = 256  # values: a channel that fires in 2 % of them is 0 in all of so many with a chance of 0.6 %


class NonFiniteInput(Check):
    id = "input-not-finite"
    title = "NaN or Inf reaches a norm"
    severity = "error"
    needs = "data"
    fault = (
        "One NaN in a batch makes the mean of its channel NaN, and with it the channel of all samples; the "
        "running averages keep it for ever."
    )
    evidence = "The first norm that NaN or Inf reaches, and how many values."
    cure = (
        "look for the layer before it that overflows, or for NaN in the data; on_nonfinite='skip' of anynorm's "
        "norms keeps the averages clean"
    )
    threads = ("pytorch#90342", "pytorch#115500")

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.norms:
            for mode, run in (("training", facts.training), ("evaluation", facts.evaluation)):
                seen = run.seen.get(norm.name)
                if seen is not None and seen.nonfinite:
                    yield self.find(
                        norm.name, f"{norm.said}: {seen.nonfinite} values of its input are NaN or infinite in {mode}",
                        values=seen.nonfinite,
                    )  # fmt: skip
                    return


class OverflowRisk(Check):
    id = "overflow-in-half"
    title = "values near the end of float16"
    needs = "data"
    fault = (
        "Under autocast to float16 everything above 65,504 becomes Inf before the norm can scale it down. Nothing "
        "warns, the averages keep it."
    )
    evidence = (
        "The largest absolute value at the norm's input, as a share of 65,504; above a quarter it is a note where the "
        "input is float32, and a warning where it is float16."
    )
    cure = "scale the layer before down, which the norm undoes; or run in bfloat16"
    threads = ("pytorch#90342",)

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.norms:
            seen = facts.training.seen.get(norm.name)
            if seen is not None and seen.largest > NEAR * HALF and seen.dtypes != {torch.bfloat16}:
                yield self.find(
                    norm.name,
                    f"{norm.said}: values up to {seen.largest:.3g}, float16 holds {HALF:.0f}",
                    severity="warning" if torch.float16 in seen.dtypes else "note",
                    repair=make_smaller(norm, seen.largest),
                    largest=seen.largest,
                    share=seen.largest / HALF,
                )


def make_smaller(norm: NormFacts, largest: float) -> Repair | None:
    """Divide the layer before by a power of two; BN(x / k) = BN(x), as long as the variance is far above eps."""
    source = find_source(norm)
    if source is None or norm.kind != "batch" or not norm.has_averages or norm.var is None:
        return None
    layer: Any = source.module
    k = 2.0 ** np.ceil(np.log2(largest / 100))
    if float(norm.var.min()) / k**2 < 1e3 * norm.module.eps or not isinstance(layer.weight, nn.Parameter):
        return None

    def perform() -> None:
        with torch.no_grad():
            for t in (layer.weight, layer.bias, norm.module.running_mean):
                if t is not None:
                    t.div_(k)
            norm.module.running_var.div_(k * k)

    code = f"layer, norm, k = model.get_submodule({source.name!r}), {norm.path}, {k:g}\nwith torch.no_grad():\n"
    code += "    for t in (layer.weight, layer.bias, norm.running_mean):\n"
    code += "        if t is not None:\n            t.div_(k)\n"
    return Repair(code + "    norm.running_var.div_(k * k)", perform, is_exact=False)


class LostDigits(Check):
    id = "digits-lost"
    title = "torch's norm loses digits: the mean is large beside the spread"
    needs = "data"
    fault = (
        "Where |mean| / std is above 1,000 the sums of float32 keep few digits of the variance; torch's group "
        "norm on channels_last is off by 300 at 10,000."
    )
    evidence = (
        "The norm's output in training on a batch against the formula in float64, as a share of the largest output."
    )
    cure = "anynorm.accelerate(model): the same layers, exact to 1e-6"
    threads = ("flax#1491",)

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.averaging:
            seen = facts.training.seen.get(norm.name)
            if norm.kind != "batch" or seen is None or seen.example is None or is_ours(type(norm.module)):
                continue
            flat = find_flatness(seen)
            if flat < FLAT or type(norm.module).forward is not nn.modules.batchnorm._BatchNorm.forward:
                continue
            off, ours = find_errors(norm, seen.example)
            if off > LOST:
                yield self.find(
                    norm.name,
                    f"{norm.said}: |mean| / std is {flat:.2g}, and its output is off by {off:.1e} of the largest",
                    repair=Repair("anynorm.accelerate(model)", partial(accelerate, facts.model)),
                    effects=[Effect("error of the norm", off, ours)],
                    mean_by_std=flat,
                    error=off,
                    error_after=ours,
                )


def find_flatness(seen: Seen) -> float:
    """The largest |mean| / std of a channel in the first batch; 0 for channels that are constant."""
    if not seen.moments or seen.moments[0].mean is None:
        return 0.0
    moments = seen.moments[0]
    assert moments.mean is not None
    return float((moments.mean.abs() / (moments.m2 / int(moments.count)).sqrt()).nan_to_num(0.0, 0.0, 0.0).max())


def find_errors(norm: NormFacts, x: torch.Tensor) -> tuple[float, float]:
    """How far torch's output in training, and this library's, are from the formula's."""
    axes = tuple(axis for axis in range(x.dim()) if axis != 1)
    exact = reference.forward(x.double().cpu().numpy(), axes, eps=norm.module.eps)
    given = (x, None, None, None, None, True, 0.0, norm.module.eps)
    found = (F.batch_norm(*given), batch_norm(*given))
    off, ours = (float(np.abs(y.double().cpu().numpy() - exact).max() / max(np.abs(exact).max(), 1e-30)) for y in found)
    return off, ours


class DeadChannels(Check):
    id = "channels-dead"
    title = "channels that the ReLU behind the norm switches off for all data"
    severity = "note"
    needs = "data"
    fault = (
        "Where beta is far below 0 beside gamma, the ReLU behind the norm gives 0 for every sample: no output, no "
        "gradient, and nothing brings the channel back."
    )
    evidence = "Channels of the norm's output that are at most 0 on all batches in evaluation, of 256 values or more."
    cure = "prune them; a smaller learning rate or a LeakyReLU keeps others alive"

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.norms:
            seen = facts.evaluation.seen.get(norm.name)
            behind = norm.around.after[0] if norm.around.after else None
            relu = behind is not None and (isinstance(behind.module, nn.ReLU) or behind.function.startswith("relu"))
            if seen is None or seen.highest is None or not relu or len(facts.inputs.batches) < 2 or seen.nonfinite:
                continue
            few = int((seen.highest <= 0).sum())
            if few and seen.values >= ENOUGH:
                yield self.find(
                    norm.name,
                    f"{norm.said}: {few} of {len(seen.highest)} channels are 0 behind the ReLU for all samples",
                    severity="warning" if few > len(seen.highest) / 4 else "note",
                    channels=few,
                    of=len(seen.highest),
                )
