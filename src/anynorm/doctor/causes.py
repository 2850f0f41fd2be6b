"""Why running averages are not those of the batches: the causes in the order in which they can be ruled out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from .facts import Facts
from .gaps import Gap, find_gap
from .inputs import find_targets

PURE = 0.5  # of the entropy of all targets: a batch below is of few classes


@dataclass(frozen=True)
class Cause:
    """One cause, and what speaks for or against it.

    Attributes:
        name: short.
        holds: whether it explains the gap.
        said: why, in words.
        cure: what to do about it.
    """

    name: str
    holds: bool
    said: str
    cure: str


def find_causes(facts: Facts, gap: Gap) -> Iterator[Cause]:
    """Each cause in turn; the first that holds is taken, and those before it are ruled out."""
    norm, momentum, count = gap.norm, getattr(gap.norm.module, "momentum", None), gap.norm.count
    assert norm.mean is not None and norm.var is not None
    untouched = not norm.mean.any() and bool((norm.var == 1).all())
    yield Cause(
        "never updated",
        untouched,
        "the averages are exactly 0 and 1" if untouched else "the averages have moved from 0 and 1",
        "anynorm.recalibrate(model, loader)",
    )
    is_last = isinstance(momentum, (int, float)) and momentum >= 0.9
    yield Cause(
        "momentum inverted",
        is_last,
        f"momentum is {momentum}",
        "set momentum to 1 minus this, then anynorm.recalibrate(model, loader)",
    )
    share = (1 - momentum) ** count if isinstance(momentum, float) and 0 < momentum < 1 and count else 0.0
    yield Cause(
        "momentum too slow",
        share > 0.05,
        f"{100 * share:.2g} % of the averages are what they began with",
        "anynorm.recalibrate(model, loader), and momentum=None",
    )
    purity = find_purity(facts)
    yield Cause(
        "batches of few classes",
        purity is not None and purity < PURE,
        "no targets of classes are known"
        if purity is None
        else f"the targets of a batch have {100 * purity:.0f} % of the entropy of all",
        "shuffle the training data (shuffle=True), then anynorm.recalibrate(model, loader)",
    )
    yield find_dropout_cause(facts, gap)
    padding = find_padding(facts)
    yield Cause(
        "padding",
        padding > 0.1,
        f"{100 * padding:.0f} % of the positions at the end of samples are zeros",
        "run the model within anynorm.masked, so that padding counts in no statistic; then recalibrate",
    )
    is_noise = gap.size <= 5 * gap.error and gap.error > 0.1
    yield Cause(
        "batches too small",
        is_noise,
        f"an average wanders by {gap.error:.2g} std at this batch size",
        "a smaller momentum, larger batches, or anynorm.recalibrate(model, loader)",
    )
    yield Cause(
        "other data or other weights",
        True,
        "the averages are of data that differ from these (another domain, other augmentation), or of other weights "
        "(an average of weights, a checkpoint without its buffers, updates since)",
        "anynorm.recalibrate(model, loader) on data as in evaluation",
    )


def find_purity(facts: Facts) -> float | None:
    """The entropy of targets within a batch as a share of that over all batches; None without targets of classes."""
    targets = [find_targets(batch) for batch in facts.inputs.batches]
    known = [t.flatten() for t in targets if isinstance(t, Tensor) and not t.is_floating_point() and t.dim() == 1]
    if len(known) < 2 or min(map(len, known)) < 2 or len(known) != len(targets):
        return None
    whole = find_entropy(torch.cat(known))
    return fmean(map(find_entropy, known)) / whole if whole > 0 else None


def find_entropy(values: Tensor) -> float:
    """In nats."""
    share = values.unique(return_counts=True)[1].double() / values.numel()
    return float(-(share * share.log()).sum())


def find_dropout_cause(facts: Facts, gap: Gap) -> Cause:
    """Whether the gap is there without dropout and not with it."""
    with_it = find_gap(gap.norm, facts.training.seen.get(gap.norm.name)) if facts.drops else None
    holds = with_it is not None and with_it.size < gap.size / 2
    said = "the model has no dropout" if with_it is None else f"with dropout the gap is {with_it.size:.2g} std"
    return Cause(
        "dropout", holds, said, "model.eval(), then anynorm.recalibrate(model, loader): averages without dropout"
    )


def find_padding(facts: Facts) -> float:
    """The share of positions at the end of the first input's samples that are 0 in all channels; 0 for no sequence."""
    found = []
    for batch in facts.inputs.batches:
        x = batch[0] if type(batch) in (tuple, list) else batch
        if isinstance(x, Tensor) and x.dim() == 3 and x.numel():
            for axis in (1, 2):
                empty = ~x.ne(0).any(3 - axis)
                found.append(float(empty.flip(1).long().cumprod(1).double().mean()))
    return max(fmean(found[::2]), fmean(found[1::2])) if found else 0.0
