"""Running variances that cannot be right, and the eps beside them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from ..check import Check, Effect, Finding, Repair
from ..facts import Facts
from ..inputs import Inputs, are_classes, find_targets
from ..passes import Pass, find_excess, find_gain, run_pass
from .repairs import make_recalibration

SMALL = 0.05  # a variance beside which an eps of 1e-3 is felt
SCALES = [2.0 ** (each / 4) for each in range(-8, 9)]  # of outputs, 1/4 to 4
OTHERS = {1e-3: "Keras", 1e-5: "torch", 1e-6: "Darknet"}  # eps of batch norm in frameworks


class ImpossibleAverages(Check):
    id = "averages-impossible"
    title = "running averages that no data have: NaN, infinite, negative or denormal"
    severity = "error"
    fault = (
        "One infinite batch under mixed precision makes the averages NaN for ever, though the loss recovers; "
        "a variance "
        "computed as E[x^2] - E[x]^2 turns negative. Evaluation is then NaN."
    )
    evidence = "How many channels have a variance or mean that is NaN or infinite, negative, or denormal."
    cure = "find the averages anew (anynorm.recalibrate); anynorm's norms refuse such batches with on_nonfinite='skip'"
    threads = ("pytorch#90342", "pytorch#115500", "flax#1491", "keras#18795", "pytorch#178123")

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.averaging:
            assert norm.mean is not None and norm.var is not None
            nonfinite = int((~norm.mean.isfinite() | ~norm.var.isfinite()).sum())
            negative = int((norm.var < 0).sum())
            tiny = torch.finfo(torch.float32).tiny  # of float16 it is 6e-5, and a variance of less is no fault there
            denormal = int(((norm.var > 0) & (norm.var < tiny)).sum())
            if nonfinite + negative + denormal:
                counts = {"NaN or infinite": nonfinite, "negative": negative, "denormal": denormal}
                said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
                yield self.find(
                    norm.name,
                    f"{norm.said}: of {len(norm.var)} channels {said}",
                    severity="error" if nonfinite + negative else "warning",
                    repair=make_recalibration(facts),
                    nonfinite=nonfinite,
                    negative=negative,
                    denormal=denormal,
                )


class ZeroEps(Check):
    id = "eps-zero"
    title = "eps is 0: a channel without variance divides by 0"
    fault = (
        "The first channel that is constant over a batch gives NaN, in forward or in backward; newer versions of torch "
        "refuse to train such a batch norm."
    )
    evidence = "eps, and the smallest running variance."
    cure = "set eps to 1e-5"

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.norms:
            if getattr(norm.module, "eps", None) == 0:
                smallest = float(norm.var.min()) if norm.var is not None else float("nan")
                if norm.normalizes_by_averages and smallest > 0:
                    continue  # it never divides by anything else
                perform = partial(setattr, norm.module, "eps", 1e-5)
                yield self.find(
                    norm.name,
                    f"{norm.said}: eps is 0",
                    repair=Repair(f"{norm.path}.eps = 1e-5", perform),
                    smallest_variance=smallest,
                )


class ForeignEps(Check):
    id = "eps-of-another-framework"
    title = "with the eps of another framework the model is better"
    needs = "data"
    fault = (
        "Keras uses an eps of 1e-3, Darknet 1e-6, torch 1e-5. Weights that were carried over without their eps "
        "compute another function wherever a channel's variance is small."
    )
    evidence = (
        "Loss and accuracy in evaluation with each of the usual values for all batch norms, on the same batches: both "
        "must be better, the loss also when outputs have their best scale; the smallest running variance."
    )
    cure = "set eps to the value that the weights were trained with"

    def run(self, facts: Facts) -> Iterator[Finding]:
        norms = facts.averaging
        least = {norm: float(norm.var.nan_to_num(0.0).min()) for norm in norms if norm.var is not None}
        small = [norm for norm, var in least.items() if var < SMALL]
        now = {norm.module.eps for norm in norms}
        if not small or len(now) != 1 or facts.evaluation.loss is None:
            return
        own, best, gain = now.pop(), None, 0.0
        for eps, framework in OTHERS.items():
            if eps == own or not facts.evaluation.losses:
                continue
            before = [(norm.module, norm.module.eps) for norm in norms]
            try:
                for module, _ in before:
                    module.eps = eps
                other = run_pass(facts.inputs, training=False, records=False)
            finally:
                for module, value in before:
                    module.eps = value
            excess, error = find_excess(facts.evaluation, other)
            if excess > max(0.05 * facts.evaluation.loss, 3 * error, gain) and is_better(
                facts.inputs, facts.evaluation, other
            ):
                best, gain = (eps, framework, other), excess
        if best is not None:
            eps, framework, other = best
            worst = min(small, key=lambda norm: least[norm])

            def perform() -> None:
                for norm in norms:
                    norm.module.eps = eps

            code = f"for norm in model.modules():\n    if hasattr(norm, 'running_var'):\n        norm.eps = {eps:g}"
            assert other.loss is not None
            yield self.find(
                worst.name,
                f"{worst.said}: eps is {own:g}; with {eps:g}, that of {framework}, the loss falls by {gain:.3g}",
                repair=Repair(code, perform),
                effects=[Effect("loss", facts.evaluation.loss, other.loss)],
                eps=own,
                other_eps=eps,
                smallest_variance=least[worst],
            )


def is_better(inputs: Inputs, one: Pass, other: Pass) -> bool:
    """Whether not only the loss is lower.

    Another eps scales outputs, too. A network that is not sure enough, or too sure on other data, gains by that in its
    loss, whatever eps it was trained with. Where outputs are of classes both are given their best scale first: what
    is left is not scale. Elsewhere the loss must fall by half.
    """
    losses = find_scaled_loss(inputs, one), find_scaled_loss(inputs, other)
    if losses[0] is None or losses[1] is None:
        return other.loss is not None and one.loss is not None and other.loss < 0.5 * one.loss
    gain, error = find_gain(one, other)
    return losses[1] < 0.95 * losses[0] and gain > 2 * error


def find_scaled_loss(inputs: Inputs, run: Pass) -> float | None:
    """The cross entropy of a pass's outputs at the scale where it is least; None where they are not of classes."""
    pairs = []
    for score, batch in zip(run.scores, inputs.batches, strict=False):
        output, targets = score.output, find_targets(batch)
        if output is None or not are_classes(output, targets):
            return None
        pairs.append((output.float().cpu(), targets.cpu()))
    losses = [sum(float(F.cross_entropy(scale * output, targets)) for output, targets in pairs) for scale in SCALES]
    return min(losses) / len(pairs) if pairs else None


class ConstantChannels(Check):
    id = "channels-constant"
    title = "channels that were constant in training"
    severity = "note"
    fault = (
        "A channel whose running variance is far below eps was the same for all samples: the norm gives beta "
        "there, and the channel carries nothing."
    )
    evidence = "How many channels have a running variance below eps / 1000, after training."
    cure = "prune them, or look for the dead ReLU or zero weights before the norm"

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.averaging:
            assert norm.var is not None
            few = int(((norm.var >= 0) & (norm.var < norm.module.eps / 1000)).sum())
            if few and norm.is_trained:
                yield self.find(
                    norm.name,
                    f"{norm.said}: {few} of {len(norm.var)} channels have a running variance below eps / 1000",
                    severity="warning" if few > len(norm.var) / 2 else "note",
                    channels=few,
                    of=len(norm.var),
                )
