"""How far running averages are from what the batches say, what that costs, and whose fault it is.

    gap = |mean of the batches - running mean| / running std, and |std of the batches / running std - 1|, the larger
    error = sqrt(error of the batches' mean^2 + (spread of a batch's mean)^2 * momentum / (2 - momentum))

for each channel, both in standard deviations. An average with a momentum m wanders about its mean by the second term. A
layer's gap is the median over its channels, and counts where it is more than three errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..surgery.recalibration.norms import put
from ..surgery.recalibration.statistics import Population
from .facts import Facts, NormFacts
from .passes import Pass, Seen, find_excess, run_pass

SIGNIFICANT = 3.0  # errors
MOST_LAYERS = 8  # whose part is measured
LIMIT = 8  # batches, for that


@dataclass(frozen=True)
class Gap:
    """Of one layer, in standard deviations.

    Attributes:
        norm: the layer.
        size, worst: over its channels in the median, and the largest.
        error: of the median channel.
        population: what the batches say.
    """

    norm: NormFacts
    size: float
    worst: float
    error: float
    population: Population

    @property
    def is_significant(self) -> bool:
        """Whether it is more than chance and than the wandering of an average."""
        return self.size > SIGNIFICANT * self.error and self.size > 0.05


def find_gap(norm: NormFacts, seen: Seen | None) -> Gap | None:
    """Of one layer; None where it was not called, or its averages are no numbers."""
    population = None if seen is None else seen.merge()
    mean, var = norm.mean, norm.var
    if seen is None or population is None or mean is None or var is None:
        return None
    if not (mean.isfinite().all() and var.isfinite().all() and (var >= 0).all()) or len(mean) != len(population.mean):
        return None
    eps = norm.module.eps
    std = (var + eps).sqrt()
    gap = torch.maximum((population.mean - mean).abs() / std, ((population.var + eps).sqrt() / std - 1).abs())
    error = find_error(norm, seen, population)
    return Gap(norm, float(gap.median()), float(gap.max()), float(error.median()), population)


def find_error(norm: NormFacts, seen: Seen, population: Population) -> Tensor:
    """Of the gap, for each channel; see the head of this file."""
    momentum = getattr(norm.module, "momentum", None)
    wanders = momentum / (2 - momentum) if isinstance(momentum, float) and 0 < momentum < 1 else 0.0
    means = torch.stack([each.mean for each in seen.moments if each.mean is not None])
    std = (population.var + norm.module.eps).sqrt()
    spread = means.std(0) / std if len(means) > 1 else torch.zeros_like(std)
    of_batches = population.mean_error.nan_to_num(0.0, 0.0, 0.0)
    return (of_batches.square() + spread.square() * wanders).sqrt()


def find_gaps(facts: Facts, run: Pass) -> list[Gap]:
    """Of all layers, in the order of the model, but those that training leaves in evaluation, as frozen ones: they
    normalize by their averages in both modes."""
    norms = [norm for norm in facts.averaging if norm.kind == "batch" and norm.name in facts.trains]
    found = [find_gap(norm, run.seen.get(norm.name)) for norm in norms]
    return [gap for gap in found if gap is not None]


@dataclass(frozen=True)
class Share:
    """One layer's part in the difference of the losses.

    Attributes:
        gap: the layer's.
        harm: what the loss rises by, where this layer alone has its running averages, and the others their batch.
        error: its standard error.
    """

    gap: Gap
    harm: float
    error: float


def find_shares(facts: Facts, gaps: list[Gap]) -> list[Share]:
    """For the layers with the largest gaps: give that layer alone the other statistics. The largest harm first."""
    base = run_pass(facts.inputs, training=True, dropout=False, records=False, limit=LIMIT)
    found = []
    for gap in sorted(gaps, key=lambda gap: -gap.size)[:MOST_LAYERS]:
        module = gap.norm.module
        alone = run_pass(facts.inputs, True, False, partial(evaluate, module), records=False, limit=LIMIT)
        found.append(Share(gap, *find_excess(alone, base)))
    return sorted(found, key=lambda share: -share.harm)


def evaluate(module: Any) -> None:
    """One norm in evaluation."""
    module.training = False


def put_populations(gaps: list[Gap]) -> Callable[[], None]:
    """What gives layers the statistics of the batches."""

    def prepare() -> None:
        for gap in gaps:
            put(gap.norm.module, gap.population.mean, gap.population.var)

    return prepare
