"""Running averages and what moves them: momentum, the counter, and the dtype that they are kept in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import ceil

import torch

from ..check import Check, Finding, Repair
from ..facts import Facts, NormFacts
from ..gaps import find_gap
from .repairs import make_recalibration, set_attribute

STALE = 0.05  # share of where averages began that is left in them


class ZeroMomentum(Check):
    id = "momentum-zero"
    title = "momentum is 0: training never moves the running averages"
    fault = (
        "With momentum 0 the averages stay what they were loaded with, or mean 0 and variance 1, however long the "
        "model is trained."
    )
    evidence = "The norm's momentum, and whether its averages have left mean 0 and variance 1."
    cure = (
        "set momentum to 0.1 before training goes on, or freeze the norm so that this is meant: anynorm.freeze(model)"
    )

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.averaging:
            if getattr(norm.module, "momentum", None) == 0 and norm.frozen is None:
                repair = set_attribute(norm, "momentum", 0.1)
                yield self.find(norm.name, f"{norm.said}: momentum is 0", repair=repair, momentum=0.0)


class InvertedMomentum(Check):
    id = "momentum-inverted"
    title = "momentum has the meaning of another framework"
    severity = "error"
    fault = (
        "In torch momentum is the share of the new batch; in Keras, Flax and papers it is the share that is kept. "
        "0.99 taken over as it is makes the running averages those of the last batch: evaluation depends on "
        "which that was."
    )
    evidence = "A momentum of 0.9 or more."
    cure = "set momentum to 1 minus the value of the other framework"

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.averaging:
            momentum = getattr(norm.module, "momentum", None)
            if isinstance(momentum, (int, float)) and 0.9 <= momentum <= 1 and norm.frozen is None:
                right = round(1 - momentum, 6) or 0.1
                yield self.find(
                    norm.name,
                    f"{norm.said}: momentum {momentum:g} gives the newest batch {100 * momentum:.0f} % of the running "
                    "averages",
                    advice=(
                        f"in torch momentum is the share of the new batch: {right:g} is what Keras and Flax call "
                        f"{1 - right:g}"
                    ),
                    repair=make_recalibration(facts, set_attribute(norm, "momentum", right)),
                    momentum=momentum,
                )


class SlowMomentum(Check):
    id = "momentum-slow"
    title = "momentum is too small for the batches there were: the averages still hold mean 0 and variance 1"
    fault = (
        "After n batches a share (1 - momentum)^n of the running averages is what they began with. A short "
        "training with a small momentum is evaluated with statistics of nothing."
    )
    evidence = (
        "(1 - momentum)^n with n from num_batches_tracked; above 5 % it is reported, above 50 % as an error. A running "
        "variance below that share, or averages that agree with the data, refute it."
    )
    cure = "take out what they began with, and set momentum to None, which weighs all batches alike; or train longer"
    threads = ("keras#7265",)

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.averaging:
            share = norm.begun
            if share > STALE and norm.frozen is None and not is_refuted(facts, norm):
                momentum, count = norm.module.momentum, norm.count or 0
                yield self.find(
                    norm.name,
                    f"{norm.said}: {100 * share:.0f} % of the running averages are still mean 0 and variance 1, "
                    f"after {count} batches with momentum {momentum:g}",
                    severity="error" if share > 0.5 else "warning",
                    repair=make_unbiasing(norm, share),
                    share=share,
                    batches=count,
                    momentum=momentum,
                )


def is_refuted(facts: Facts, norm: NormFacts) -> bool:
    """Whether data are there, and say that the averages are theirs."""
    if not facts.has_data or facts.undropped.problem or norm.kind != "batch":
        return False
    gap = find_gap(norm, facts.undropped.seen.get(norm.name))
    return gap is not None and not gap.is_significant


def make_unbiasing(norm: NormFacts, share: float) -> Repair:
    """Take a share of mean 0 and variance 1 out of averages."""
    code = (
        f"norm = {norm.path}\nleft = (1 - norm.momentum) ** int(norm.num_batches_tracked)\n"
        "norm.running_mean.div_(1 - left)\nnorm.running_var.sub_(left).div_(1 - left).clamp_(min=0)\n"
        "norm.momentum = None"
    )

    def perform() -> None:
        with torch.no_grad():
            norm.module.running_mean.div_(1 - share)
            norm.module.running_var.sub_(share).div_(1 - share).clamp_(min=0)
        norm.module.momentum = None

    return Repair(code, perform)


class ZeroCounter(Check):
    id = "counter-zero"
    title = "the averages are trained, and their counter of batches is 0"
    fault = (
        "num_batches_tracked is 0 though the averages are not where they begin, as in checkpoints that were ported, "
        "averaged or written before torch 0.4.1. With momentum=None the next batch would replace them; batch "
        "renormalization would begin its warm-up anew."
    )
    evidence = "The counter, and how far the averages are from mean 0 and variance 1."
    cure = "set the counter to the number of batches of the training, or to any number that is large"
    threads = ("HierFL#1",)

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.averaging:
            assert norm.mean is not None and norm.var is not None
            far = float(torch.maximum(norm.mean.abs(), (norm.var - 1).abs()).max())
            if norm.count == 0 and far > 0:
                momentum = getattr(norm.module, "momentum", None) or 0.001
                many = ceil(10 / momentum)
                code = f"{norm.path}.num_batches_tracked.fill_({many})"
                perform = partial(norm.module.num_batches_tracked.fill_, many)
                yield self.find(
                    norm.name,
                    f"{norm.said}: the averages are up to {far:.3g} from mean 0 and variance 1, and "
                    "num_batches_tracked is 0",
                    repair=Repair(code, perform, is_exact=True),
                    distance=far,
                )


class NeverUpdated(Check):
    id = "never-updated"
    title = "the norm is trained, and its averages are still mean 0 and variance 1"
    severity = "error"
    fault = (
        "Evaluation normalizes by mean 0 and variance 1, that is, not at all: fine in training and useless in "
        "evaluation. It was trained with momentum 0, without track_running_stats, or its buffers were not in the "
        "checkpoint."
    )
    evidence = "Averages that are exactly 0 and 1, and a counter above 0 or betas that differ; how far gamma moved."
    cure = "find the averages from data: anynorm.recalibrate(model, loader)"
    threads = ("keras#12851", "pytorch#4741")

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.averaging:
            assert norm.mean is not None and norm.var is not None
            if norm.is_trained and not norm.mean.any() and bool((norm.var == 1).all()):
                gamma = norm.gamma
                moved = 0.0 if gamma is None else float((gamma - 1).abs().max())
                yield self.find(
                    norm.name,
                    f"{norm.said}: running mean and variance are exactly 0 and 1, though the norm was trained "
                    f"(gamma moved by {moved:.2g})",
                    repair=make_recalibration(facts),
                    gamma_moved=moved,
                    batches=norm.count or 0,
                )


class HalfAverages(Check):
    id = "averages-in-half"
    title = "running averages in half precision stall"
    fault = (
        "An average in bfloat16 has 8 bits: an update of less than 1/512 of it is rounded away, so that with "
        "momentum 0.1 it stops about 2 % before where it should be, and a mean near 100 at 64."
    )
    evidence = "The dtype of the averages, and the smallest step that they can take, as a share of them."
    cure = "keep the norm in float32 (norm.float()); its input may stay in half precision"
    threads = ("Model-Optimizer#738",)

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.averaging:
            dtype = norm.module._buffers["running_mean"].dtype
            # A network that is only evaluated in half precision moves no averages.
            is_used = norm.moves or facts.inputs.optimizer is not None
            if dtype in (torch.float16, torch.bfloat16) and norm.frozen is None and is_used:
                step = torch.finfo(dtype).eps
                yield self.find(
                    norm.name,
                    f"{norm.said}: averages in {str(dtype).removeprefix('torch.')} cannot move by less than "
                    f"{step:.2g} of their value",
                    repair=Repair(f"{norm.path}.float()", norm.module.float, is_exact=False),
                    step=step,
                )
