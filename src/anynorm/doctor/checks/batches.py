"""What batches are like: how many samples, of which classes, in which order, with how much padding."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, erfc
from typing import Any

import torch
from torch import Tensor

from ...surgery.convert import convert
from ..causes import find_padding, find_purity, has_pure_batches
from ..check import Check, Finding, Repair
from ..facts import Facts, NormFacts
from ..passes import Seen
from .dependence import find_call

SETTLED = 100  # batches
NOISY, GOOD = 0.3, 0.1  # std: the standard error of a batch's mean
FEWEST_BATCHES = 8  # before an order means something
DRIFT = 0.9  # rank correlation of a batch's mean with its place
CHANCE = 1e-3  # that any channel of any norm is in such an order by chance
PADDED = 0.1  # share of positions


class NoisyStatistics(Check):
    id = "statistics-noisy"
    title = "the batch is too small for its statistics"
    needs = "data"
    fault = (
        "The mean of a small batch is far from the mean of all. What a sample becomes in training depends on its "
        "batch mates; a little of this regularizes, much of it makes training slow and evaluation different."
    )
    evidence = (
        "The standard error of a batch's mean as its samples differ, in standard deviations, for the median "
        "channel; and the batch size at which it would be 0.1."
    )
    cure = (
        "larger batches, anynorm.sync over processes, anynorm.accumulate over micro-batches; or another norm: "
        "anynorm.convert(model, 'group' or 'renorm')"
    )
    threads = ("keras#15790", "tabnet#243")

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.averaging:
            seen = facts.training.seen.get(norm.name)
            if norm.kind != "batch" or seen is None or not seen.noise or not is_plain(norm):
                continue
            noise = float(torch.stack(seen.noise).median(0).values.median())
            if noise > NOISY:
                size = seen.shapes[0][0]
                good = ceil(size * (noise / GOOD) ** 2)
                yield self.find(
                    norm.name,
                    f"{norm.said}: of {size} samples the mean is known to {noise:.2f} std; {good} samples "
                    f"would give {GOOD}",
                    repair=make_renorm(facts, norm),
                    noise=noise,
                    samples=size,
                    good_samples=good,
                )


def is_plain(norm: NormFacts) -> bool:
    """Whether it normalizes by its batch alone in training: no renormalization, no synchronization, not frozen."""
    kind = type(norm.module).__name__
    return norm.frozen is None and "Renorm" not in kind and "Sync" not in kind


def make_renorm(facts: Facts, norm: NormFacts) -> Repair:
    """Batch renormalization, whose training is as its evaluation but for gradients."""

    call = find_call(facts)
    example = None if call is None else (dict(call.kwargs) or call.args)

    # Averages that are trained need no warm-up, in which it would go on as batch norm.
    options: dict[str, Any] = {"warmup": (0, 0, 0)} if (norm.count or 0) >= SETTLED else {}

    def perform() -> None:
        convert(facts.model, "renorm", where=lambda _, module: module is norm.module, example=example, **options)

    # The classes for (N, C) and (N, C, L) are one in torch: a call says which it is.
    batch = ", example=next(iter(loader))" if call is not None and call.kwargs else ", example=next(iter(loader))[0]"
    given = ("" if call is None else batch) + "".join(f", {key}={value}" for key, value in options.items())
    return Repair(f"anynorm.convert(model, 'renorm', where={norm.name!r}{given})", perform, is_exact=True)


class PureBatches(Check):
    id = "batches-of-few-classes"
    title = "batches hold few of the classes"
    needs = "data"
    fault = (
        "In a file sorted by class, without shuffling, every batch is of one class. Its statistics tell the "
        "class, the network learns to need that, and evaluation, which has one set of statistics, collapses."
    )
    evidence = (
        "The entropy of the targets in a batch as a share of what it is in shuffled batches of the same sizes, and how "
        "much of the variance at the norm lies between batches."
    )
    cure = "shuffle=True in the loader; train on for a little, then anynorm.recalibrate(model, loader)"

    def run(self, facts: Facts) -> Iterator[Finding]:
        if not has_pure_batches(facts) or facts.training.problem:
            return
        purity = find_purity(facts)
        assert purity is not None
        shares = {norm: find_between(facts.training.seen.get(norm.name)) for norm in facts.averaging}
        if shares:
            norm = max(shares, key=lambda each: shares[each])
            yield self.find(
                norm.name,
                f"a batch's targets have {100 * purity:.0f} % of the entropy that they had in shuffled batches; at "
                f"{norm.said} {100 * shares[norm]:.0f} % of the variance lies between batches",
                severity="warning" if shares[norm] > 0.05 else "note",
                entropy_share=purity,
                between_batches=shares[norm],
            )


def find_between(seen: Seen | None) -> float:
    """The share of the variance that lies between batches, in the median channel."""
    population = None if seen is None else seen.merge()
    if seen is None or population is None or len(seen.moments) < 2:
        return 0.0
    within = sum(each.m2 for each in seen.moments) / population.count
    return float((1 - within / population.var.clamp_min(1e-30)).clamp_min(0).median())


class Drift(Check):
    id = "batches-drift"
    title = "the statistics drift from batch to batch"
    needs = "data"
    fault = (
        "The data change along the loader (sorted by time, by size, by patient) and are not shuffled: running "
        "averages are those of its end."
    )
    evidence = (
        "The rank correlation of a batch's mean with its place in the loader, for each channel of a norm; and how "
        "far the mean goes, in std."
    )
    cure = "shuffle the data; where that cannot be, anynorm.recalibrate(model, loader) weighs all batches alike"

    def run(self, facts: Facts) -> Iterator[Finding]:
        found = []
        norms = [norm for norm in facts.averaging if norm.kind == "batch"]
        for norm in norms:
            seen = facts.training.seen.get(norm.name)
            population = None if seen is None else seen.merge()
            if seen is None or population is None or len(seen.moments) < FEWEST_BATCHES:
                continue
            means = torch.stack([each.mean for each in seen.moments if each.mean is not None])
            std = (population.var + norm.module.eps).sqrt()
            spread = (means[-len(means) // 4 :].mean(0) - means[: len(means) // 4].mean(0)).abs() / std
            order = find_order(means).abs()
            # The channel that went farthest of many: the chance of its order counts for all that it was chosen from.
            chance = find_chance(order, len(means)) * means.shape[1] * len(norms)
            spread = spread.where((order > DRIFT) & (chance < CHANCE), torch.zeros_like(spread))
            worst = int(spread.argmax())
            if float(spread[worst]) > 0.5:
                found.append((float(spread[worst]), float(order[worst]), norm))
        if found and not has_pure_batches(facts):
            distance, correlation, norm = max(found, key=lambda each: each[0])
            yield self.find(
                norm.name,
                f"{norm.said}: a channel's mean goes {distance:.2g} std from the first batches to the last (rank "
                f"correlation {correlation:.2f})",
                distance=distance,
                correlation=correlation,
                layers=len(found),
            )


def find_order(means: Tensor) -> Tensor:
    """The rank correlation of each column with its rows' places."""
    ranks = means.argsort(0).argsort(0).double()
    places = torch.arange(len(means), dtype=torch.float64, device="cpu")[:, None]
    ranks, places = ranks - ranks.mean(0), places - places.mean(0)
    return (ranks * places).sum(0) / (ranks.square().sum(0) * places.square().sum(0)).sqrt().clamp_min(1e-30)


def find_chance(order: Tensor, count: int) -> Tensor:
    """How likely a rank correlation of at least this size is without any order, by Fisher's transformation."""
    score = order.clamp_max(1 - 1e-12).atanh() * ((count - 3) / 1.06) ** 0.5
    return torch.tensor([erfc(each / 2**0.5) for each in score.tolist()], dtype=torch.float64, device="cpu")


class PaddingCounted(Check):
    id = "padding-in-statistics"
    title = "padding counts in the statistics"
    needs = "data"
    fault = (
        "Zeros behind the end of short samples pull the mean to 0 and shrink the variance of batch, instance and "
        "group norm: what a sample becomes depends on how far it was padded, in training and, but for batch norm, "
        "in evaluation."
    )
    evidence = (
        "The share of positions at the end of samples that are 0 in all channels, and how many norms pool over them "
        "without a mask."
    )
    cure = (
        "after anynorm.accelerate(model) call it within anynorm.masked(mask, model=model), whose mask is 1 at real "
        "positions; padding then changes nothing"
    )
    threads = (
        "pytorch#70529",
        "pytorch#81985",
        "pytorch#30414",
        "pytorch#118580",
        "tensorflow#30161",
        "Multilingual_Text_to_Speech#81",
    )

    def run(self, facts: Facts) -> Iterator[Finding]:
        share = find_padding(facts)
        norms = [norm for norm in facts.norms if norm.kind in ("batch", "instance", "group") and norm.frozen is None]
        if share > PADDED and norms and not is_masked(facts):
            norm = norms[0]
            yield self.find(
                norm.name,
                f"{100 * share:.0f} % of the positions are padding, and {len(norms)} norms count them, "
                f"{norm.said} first",
                padding=share,
                norms=len(norms),
            )


def is_masked(facts: Facts) -> bool:
    """Whether the norms were given masks or lengths."""
    return any(seen.masked for seen in facts.training.seen.values())
