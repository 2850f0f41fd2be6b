"""The effects that stand out in a study, in sentences: small batches, the two modes, a norm or none, learning rates."""

from __future__ import annotations

from statistics import fmean

from anynorm.apps.terminal import join_words

from .findings import Findings, plain_sizes
from .sentences import name_norm, say_batch, say_interval


def say_effects(findings: Findings) -> list[str]:
    """The visible effects in a fixed order: what diverged, small batches, modes, normalization or none, rates."""
    kinds = (say_divergence, say_batch_effect, say_mode_effect, say_gain, say_rates)
    # The network where batch norm depends most on the batch size comes first.
    effects = {model: findings.batch_effect(model, "batch") for model in findings.plan.models}
    models = sorted(effects, key=lambda model: -abs(effect.mean) if (effect := effects[model]) else 0.0)
    return [sentence for say in kinds for model in models if (sentence := say(findings, model))]


def say_divergence(findings: Findings, model: str) -> str:
    """Which norms diverged in full runs, at the rate that was chosen for them."""
    parts = [
        f"{name_norm(norm)} at {say_batch(batch)} in {bad} of {len(findings.finals[model, batch, norm])} full runs"
        for batch in findings.plan.batches
        for norm in findings.plan.norms
        if (bad := findings.diverged((model, batch, norm)))
    ]
    if not parts:
        return ""
    return f"Diverged: in the {model}, {join_words(parts)}; they count with what their networks reached on test."


def say_batch_effect(findings: Findings, model: str) -> str:
    """Test score of batch norm at the smallest against the largest batch, beside the other norms."""
    sizes, effect = plain_sizes(findings.plan), findings.batch_effect(model, "batch")
    if effect is None:
        return ""
    metric = findings.metric
    verbs = {"lower": "loses", "higher": "gains"}
    unjudged = "shows no clear change" if effect.verdict == "no clear difference" else "is not judged"
    verb = f"{verbs[effect.verdict]} {metric.name}" if effect.verdict in verbs else unjudged
    change = say_interval(effect, metric)
    text = f"Small batches: batch norm in the {model} {verb} from batch {sizes[0]} to {sizes[-1]} ({change})"
    others = [
        f"{name_norm(norm)} {metric.write_gain(other.mean)}"
        for norm in findings.plan.norms
        if norm != "batch" and (other := findings.batch_effect(model, norm)) is not None
    ]
    return text + (f"; for comparison: {join_words(others)}." if others else ".")


def say_mode_effect(findings: Findings, model: str) -> str:
    """Batch norm on the same images with running statistics and with the batch's own, where they differ most."""
    cells = [(model, batch, "batch") for batch in findings.plan.batches]
    found = [(cell, effect) for cell in cells if (effect := findings.mode_effect(cell)) is not None]
    if not found:
        return ""
    judged = [pair for pair in found if pair[1].verdict != "not judged"] or found
    (_, batch, norm), effect = max(judged, key=lambda pair: abs(pair[1].mean))
    loss = findings.mode_effect((model, batch, norm), "loss")
    lower = {"lower": "worse", "higher": "better"}.get(effect.verdict)
    relation = (
        f"{lower} in evaluation mode than in training mode" if lower else "not clearly different in the two modes"
    )
    if effect.verdict == "not judged":
        relation = "seen in evaluation mode less training mode"
    change = f"; mean loss {loss.mean:+.2f}".replace("-", "−") if loss is not None else ""
    return (
        f"Two modes: batch norm in the {model} at {say_batch(batch)}, where the modes differ most, is {relation} "
        f"on the same validation images (evaluation less training: {say_interval(effect, findings.metric)}{change})."
    )


def say_gain(findings: Findings, model: str) -> str:
    """The best norm against none, batch size by batch size."""
    parts = []
    for batch in findings.plan.batches:
        values = {
            norm: findings.values((model, batch, norm), "validation_score") for norm in findings.norms(model, batch)
        }
        norms = [norm for norm in values if norm != "none"]
        if "none" not in values or not norms:
            continue
        choose = max if findings.metric.higher else min
        best = choose(norms, key=lambda norm: fmean(values[norm].values()))
        gain = findings.compare((model, batch, best), (model, batch, "none"))
        if gain is not None:
            verdict = "" if gain.verdict in ("higher", "lower") else f", {gain.verdict}"
            parts.append(f"{findings.metric.say_gain(gain.mean)} at {say_batch(batch)} ({name_norm(best)}{verdict})")
    return (
        f"Against no normalization: the norm that is best on validation brings the {model} {join_words(parts)}."
        if parts
        else ""
    )


def say_rates(findings: Findings, model: str) -> str:
    """How many learning rates work without a norm and with the most tolerant one."""
    parts = []
    for batch in findings.plan.batches:
        counts = {
            norm: len(working[0])
            for norm in findings.plan.norms
            if (model, batch, norm) in findings.rates
            and (working := findings.working_rates((model, batch, norm))) is not None
        }
        none = counts.pop("none", None)
        if none is not None and counts:
            low, high = min(counts.values()), max(counts.values())
            norms = f"{low} to {high}" if low != high else f"{low}"
            parts.append(f"{none} without and {norms} with a norm at {say_batch(batch)}")
    if not parts:
        return ""
    return (
        f"Learning rates: of {len(findings.plan.rates)} tried in the {model}, those that work are "
        f"{join_words(parts)} (short runs of one seed, not judged)."
    )
