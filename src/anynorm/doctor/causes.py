"""Why running averages are not those of the batches: the causes in the order in which they can be ruled out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn as nn
from torch import Tensor

from .facts import Facts
from .gaps import Gap, find_gap
from .inputs import find_targets

PURE = 0.5  # of the entropy of shuffled batches: a batch below is of few classes
FEW_CLASSES = "batches of few classes"
SHUFFLES = 50  # orders to compare with


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
    norm, momentum = gap.norm, getattr(gap.norm.module, "momentum", None)
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
    share = norm.begun
    yield Cause(
        "momentum too slow",
        share > 0.05,
        f"{100 * share:.2g} % of the averages are what they began with",
        "anynorm.recalibrate(model, loader), and momentum=None",
    )
    purity = find_purity(facts)
    yield Cause(
        FEW_CLASSES,
        purity is not None and purity < PURE,
        "no targets of classes are known"
        if purity is None
        else f"the targets of a batch have {100 * purity:.0f} % of the entropy that they had if shuffled",
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


def has_pure_batches(facts: Facts) -> bool:
    """Whether batches hold few of the classes, by more than chance."""
    purity = find_purity(facts)
    return purity is not None and purity < PURE


def find_purity(facts: Facts) -> float | None:
    """The entropy of targets within a batch as a share of what it is in shuffled batches of the same sizes.

    A batch of two samples holds no more than two of many classes: only the comparison with other orders of the same
    targets says that this order is to blame. None without targets of classes; 1 where any of the shuffled orders is
    as pure.
    """
    targets = [find_targets(batch) for batch in facts.inputs.batches]
    known = [t.cpu() for t in targets if isinstance(t, Tensor) and not t.is_floating_point() and t.dim() == 1]
    if len(known) < 2 or len(known) != len(targets):
        return None
    sizes, whole, generator = [len(t) for t in known], torch.cat(known), torch.Generator().manual_seed(0)
    now = fmean(map(find_entropy, known))
    others = [
        fmean(map(find_entropy, whole[torch.randperm(len(whole), generator=generator, device="cpu")].split(sizes)))
        for _ in range(SHUFFLES)
    ]
    return now / fmean(others) if max(others) > 0 and now < min(others) else 1.0


def find_entropy(values: Tensor) -> float:
    """In nats."""
    if not values.numel():
        return 0.0
    share = values.unique(return_counts=True)[1].double() / values.numel()
    return abs(float((share * share.log()).sum()))


def find_dropout_cause(facts: Facts, gap: Gap) -> Cause:
    """Whether the gap is there without dropout and not with it."""
    with_it = find_gap(gap.norm, facts.training.seen.get(gap.norm.name)) if facts.drops else None
    holds = with_it is not None and with_it.size < gap.size / 2
    said = "the model has no dropout" if with_it is None else f"with dropout the gap is {with_it.size:.2g} std"
    return Cause(
        "dropout", holds, said, "model.eval(), then anynorm.recalibrate(model, loader): averages without dropout"
    )


def find_padding(facts: Facts) -> float:
    """The share of positions at the end of the first input's samples that are 0 in all channels; 0 for no sequence.

    Where all samples end with equally many zeros these are no padding but channels or positions that are never used.
    """
    found, lengths = [], set()
    for batch in facts.inputs.batches:
        x = batch[0] if type(batch) in (tuple, list) and batch else batch
        if isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested and x.dim() == 3 and x.numel():
            axis = find_position_axis(facts, x)
            empty = ~x.ne(0).any(3 - axis)
            tail = empty.flip(1).long().cumprod(1).sum(1)
            lengths |= set((x.shape[axis] - tail).tolist())
            found.append(float(tail.double().mean()) / x.shape[axis])
    return fmean(found) if len(lengths) > 1 else 0.0


def find_position_axis(facts: Facts, x: Tensor) -> int:
    """Which axis of a batch of sequences counts positions: the other has as many as the first layer takes."""
    for module in facts.model.modules():
        if isinstance(module, nn.Conv1d) and module.in_channels in x.shape[1:]:
            return 2 if module.in_channels == x.shape[1] else 1
        wanted = getattr(module, "in_features", None) or getattr(module, "input_size", None)
        if isinstance(module, (nn.Linear, nn.RNNBase)) and wanted in x.shape[1:]:
            return 1 if wanted == x.shape[2] else 2
    return 2 if any(isinstance(module, nn.Conv1d) for module in facts.model.modules()) else 1
