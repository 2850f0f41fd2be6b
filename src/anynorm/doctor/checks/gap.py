"""Fine in training and useless in evaluation: the layer, the cost and the cause."""

from __future__ import annotations

from collections.abc import Iterator

from ..causes import FEW_CLASSES, Cause, find_causes
from ..check import Check, Effect, Finding
from ..facts import Facts
from ..gaps import Gap, Share, find_gaps, find_shares, put_populations
from ..passes import Pass, find_excess, run_pass
from .repairs import make_recalibration, make_retraining

LARGE = 0.5  # std: reported even where no loss is known
MENDED = 0.3  # share of the loss that comes back with other averages, below which these are not what is wrong


class TrainEvalGap(Check):
    id = "train-eval-gap"
    title = "evaluation is worse than training on the same data"
    severity = "error"
    needs = "data"
    fault = (
        "In training a batch norm uses its batch, in evaluation its running averages. Where these are not the "
        "statistics of the data, the network computes something else in evaluation: the loss on the training data "
        "itself is higher."
    )
    evidence = (
        "The loss on the same batches in both modes, without dropout. For each layer the gap between the statistics of "
        "the batches and its averages in standard deviations, with its error; and how far the loss rises where that "
        "layer alone has its averages. Causes are ruled out one by one: never updated, momentum, batches of few "
        "classes, dropout, padding, small batches; what is left is other data or other weights. Whether the statistics "
        "of the data bring the loss back is measured, too: where they do not, it is not the averages."
    )
    cure = "anynorm.recalibrate(model, loader) finds the averages of the data; the cause says what else"
    threads = (
        "keras#7265",
        "keras#12851",
        "pytorch#4741",
        "timm#106",
        "timm#224",
        "ema-pytorch#29",
        "Person_reID#218",
        "swa#8",
        "ignite#2590",
    )

    def run(self, facts: Facts) -> Iterator[Finding]:
        if facts.training.problem or facts.evaluation.problem:
            return
        gaps = find_gaps(facts, facts.undropped)
        excess, error = find_excess(facts.evaluation, facts.undropped)
        loss = facts.undropped.loss
        if loss is None:
            yield from self.find_without_loss(facts, [gap for gap in gaps if gap.is_significant])
        elif gaps and excess > max(0.1 * abs(loss), 0.02) and excess > 3 * error:
            yield self.find_worst(facts, gaps, excess)

    def find_worst(self, facts: Facts, gaps: list[Gap], excess: float) -> Finding:
        """The layer that costs most."""
        shares = find_shares(facts, gaps)
        worst = shares[0]
        restored = run_pass(facts.inputs, training=False, prepare=put_populations(gaps), records=False)
        regained = find_excess(facts.evaluation, restored)[0] / excess
        fell = find_fall(facts.evaluation, facts.undropped)
        is_error = excess > 0.5 * max(facts.undropped.loss or 0.0, 0.2) or fell > 0.05
        ruled_out, cause = find_cause(facts, worst.gap)
        said = f"{worst.gap.norm.said} {describe(worst.gap)}; alone it costs {worst.harm:.3g} of the loss"
        said += f", all together {excess:.3g}. Cause: {cause.name} ({cause.said})"
        repair, advice = make_recalibration(facts), cause.cure
        if regained < MENDED:
            said += f". The statistics of the data bring back {100 * max(regained, 0.0):.0f} % of that: "
            if cause.name == FEW_CLASSES:
                said += "the weights need such batches"
                repair, advice = make_retraining(facts), f"train on with shuffled data; {cause.cure}"
            else:
                said += "something else than averages differs between the modes"
                repair, advice = None, "look for what else asks for the mode: a forward that reads self.training"
        return self.find(
            worst.gap.norm.name,
            said,
            advice=advice,
            severity="error" if is_error else "warning",
            repair=repair,
            effects=find_effects(facts, restored),
            gap=worst.gap.size,
            worst_channel=worst.gap.worst,
            error=worst.gap.error,
            loss_of_this_layer=worst.harm,
            loss_of_all=excess,
            regained=regained,
            cause=cause.name,
            ruled_out="; ".join(f"{each.name}: {each.said}" for each in ruled_out),
            others="; ".join(describe_share(share) for share in shares[1:]),
        )

    def find_without_loss(self, facts: Facts, gaps: list[Gap]) -> Iterator[Finding]:
        """Without a loss nobody knows what it costs."""
        for gap in gaps:
            if gap.size > LARGE:
                ruled_out, cause = find_cause(facts, gap)
                yield self.find(
                    gap.norm.name,
                    f"{gap.norm.said} {describe(gap)}. Cause: {cause.name} ({cause.said})",
                    advice=f"{cause.cure}; give loss_fn or targets to learn what it costs",
                    severity="warning",
                    repair=make_recalibration(facts),
                    gap=gap.size,
                    worst_channel=gap.worst,
                    error=gap.error,
                    cause=cause.name,
                    ruled_out="; ".join(f"{each.name}: {each.said}" for each in ruled_out),
                )


def describe(gap: Gap) -> str:
    return f"is {gap.size:.2g} std off in the median channel, {gap.worst:.2g} in the worst (error {gap.error:.1g})"


def describe_share(share: Share) -> str:
    return f"{share.gap.norm.name or 'the model'} {share.harm:.3g}"


def find_cause(facts: Facts, gap: Gap) -> tuple[list[Cause], Cause]:
    """Those ruled out, and the one that holds."""
    ruled_out: list[Cause] = []
    for cause in find_causes(facts, gap):
        if cause.holds:
            return ruled_out, cause
        ruled_out.append(cause)
    raise AssertionError("the last cause holds always")


def find_fall(one: Pass, other: Pass) -> float:
    """How much lower the accuracy of one pass is."""
    return 0.0 if one.accuracy is None or other.accuracy is None else other.accuracy - one.accuracy


def find_effects(facts: Facts, restored: Pass) -> list[Effect]:
    """Loss and accuracy in evaluation, by the averages as they are and by the statistics of the batches."""
    now = facts.evaluation
    found = []
    if now.loss is not None and restored.loss is not None:
        found.append(Effect("loss", now.loss, restored.loss))
    if now.accuracy is not None and restored.accuracy is not None:
        found.append(Effect("accuracy", now.accuracy, restored.accuracy, "higher"))
    return found
