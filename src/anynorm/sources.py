"""Question (b): where do mean and variance come from?

An answer is a value, one of the classes here, and travels in the request (`engine.request`). `family.py` names for each
norm the one of training and the one of evaluation. Within `overriding` somebody else answers for the layers of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .pooling import Pooling
from .statistics import Moments, at_least_one, find_wide_dtype
from .torch_private import with_replace


@with_replace
class Batch(NamedTuple):
    """x itself; gradient flows through its mean and variance.

    Attributes:
        running_mean, running_var: averages that they move, in place; None for none.
        momentum: weight of the new value; a tensor for a cumulative average.
    """

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float | Tensor = 0.0


class Given(NamedTuple):
    """Constants, one mean and one variance for each channel: running averages, in evaluation."""

    mean: Tensor
    var: Tensor


class Renorm(NamedTuple):
    """x itself, and then moved towards the running averages by a scale r and a shift d, see `correct`.

    No gradient flows through r and d.

    Attributes:
        running_mean, running_var, momentum: as of `Batch`.
        known_mean, known_var: what r and d are found from; the running averages, but in a call that is computed again.
        limits: r_max and d_max.
        start_share: of the known averages, what they started from.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float | Tensor
    known_mean: Tensor
    known_var: Tensor
    limits: tuple[float | Tensor, float | Tensor]
    start_share: float | Tensor = 0.0


class Exchange:
    """Brings together what the parts of a batch have, one call of a norm."""

    def take_input(self, x: Tensor) -> Tensor:
        """Called first, with this part; returns what is normalized, x itself or a view of it."""
        return x

    def merge(self, moments: Moments) -> Moments:
        """The moments of all parts; every part gets the same."""
        raise NotImplementedError

    def merge_sums(self, sums: Tensor) -> Tensor:
        """The sums over all parts, in backward, of gamma * g and of gamma * g * xhat.

        Args:
            sums: (2, C), this part's, with the xhat of the merged moments; shape, dtype and device of the result.
        """
        raise NotImplementedError


class Merged(NamedTuple):
    """x and its like on all ranks, or in all micro-batches; gradient flows through all of them.

    Attributes:
        running_mean, running_var, momentum: as of `Batch`.
        exchange: brings the parts together; there always, None only as a default must be.
    """

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float | Tensor = 0.0
    exchange: Exchange | None = None


class Joined(NamedTuple):
    """x and others like it, which somebody else normalizes as one batch.

    Attributes:
        normalize: what takes x, gamma, beta, a residual and the request, and returns this part of the result.
    """

    normalize: Callable[..., Any]


Source = Batch | Given | Renorm | Merged | Joined
BATCH = Batch()
NAMES: dict[type[Source], str] = {Batch: "batch", Given: "running", Renorm: "renorm", Merged: "ranks"}  # in tables


class Override:
    """Says where the layers of a model take their statistics from, instead of the layers.

    Attributes:
        in_evaluation: whether it is asked for layers in evaluation too, which have averages to take.
    """

    in_evaluation = False

    def find_source(self, layer: Any, input: Any, mask: Any, lengths: Any) -> Source | None:
        """The source of one call of a layer, which then moves no averages of its own; None leaves it to the layer."""
        raise NotImplementedError


OVERRIDE: ContextVar[Override | None] = ContextVar("anynorm.source", default=None)  # who answers; no compiler traces it


@contextmanager
def overriding(override: Override) -> Iterator[None]:
    """Let `override` answer for all batch norms that are called inside, in this thread."""
    token = OVERRIDE.set(override)
    try:
        yield
    finally:
        OVERRIDE.reset(token)


def read_given(given: Given, pooling: Pooling, view: Tensor) -> Moments:
    """Given statistics as moments that broadcast over the opened x."""
    hidden = set(pooling.pooled) | set(pooling.samples)
    shape = [1 if axis in hidden else size for axis, size in enumerate(view.shape)]
    return Moments(1, given.mean.reshape(shape), given.var.reshape(shape))


def find_momentum(momentum: float | None, counter: Tensor | None) -> float | Tensor:
    """Weight of the new value; without momentum that of a cumulative average, 1 / batches counted so far.

    That is a tensor, so that no compiler has to wait for its value (pytorch#194504).
    """
    if momentum is not None:
        return momentum
    return 0.0 if counter is None else (counter.to(find_wide_dtype(counter)) + 1).reciprocal()


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    moments: Moments,
    samples: tuple[int, ...],
    momentum: float | Tensor,
    ghosts: tuple[int, ...] = (),
) -> None:
    """running = (1 - momentum) * running + momentum * new, in place, computed wide and rounded once.

    The variance stored is the unbiased one, n/(n-1) times the variance that normalized the batch, as in torch. Where
    every sample has statistics of its own (instance norm) their average is stored. Samples of which nothing counts
    do not enter it, and a batch of which nothing counts changes nothing.

    Args:
        momentum: weight of the new value, from 0 to 1; a tensor, of any dtype, for a cumulative average.
        ghosts: axes of the moments that are ghost batches; each moves the averages in its turn.
    """
    assert moments.mean is not None
    check_writable(moments.m2, running_mean, running_var)
    if isinstance(momentum, Tensor):
        momentum = momentum.to(find_wide_dtype(running_mean))
    if ghosts:
        follow_ghosts(running_mean, running_var, moments, momentum)
        return
    unbiased = moments.m2.detach() / at_least_one(moments.count - 1)
    for running, new in ((running_mean, moments.mean.detach()), (running_var, unbiased)):
        old = running.to(find_wide_dtype(running))
        if isinstance(moments.count, Tensor):
            new, counts = average_counted(new, moments.count, samples)
            moved = old * (1 - momentum) + new.reshape(running.shape).to(old.dtype) * momentum
            running.copy_(torch.where(counts, moved, old))
            continue
        if samples:
            new = new.mean(samples)
        running.copy_(old * (1 - momentum) + new.reshape(running.shape).to(old.dtype) * momentum)


def check_writable(m2: Tensor, *running: Tensor) -> None:
    """Refuse, before either has moved, what only one of the two could be written to."""
    for t in running:
        if t.device != m2.device or any(n > 1 and step == 0 for n, step in zip(t.shape, t.stride(), strict=True)):
            raise RuntimeError(
                "running averages must be on the input's device, each element in memory of its own; got "
                f"{tuple(t.shape)} with strides {t.stride()} on {t.device}, statistics on {m2.device}; pass .clone()"
            )


def follow_ghosts(running_mean: Tensor, running_var: Tensor, moments: Moments, momentum: float | Tensor) -> None:
    """What `update_running` would do with one ghost batch after the other, at once; ghosts are the first axis.

    running = left * running + sum over i of share[i] * new[i], share[i] = momentum * (1 - momentum)**(ghosts after i)

    A ghost of which nothing counts has share 0 and does not count among those after another.
    """
    assert moments.mean is not None
    wide, ghosts = find_wide_dtype(running_mean), moments.m2.shape[0]
    count = moments.count if isinstance(moments.count, Tensor) else moments.m2.new_full((ghosts, 1), moments.count)
    counts = (count > 0).reshape(ghosts, -1)[:, :1].to(wide)
    total = counts.sum()
    if isinstance(momentum, Tensor):  # a cumulative average: all later batches weigh as the first does
        share = counts * momentum / (1 - momentum + total * momentum)
        left = 1 - share.sum()
    else:
        share = counts * momentum * (1 - momentum) ** (total - counts.cumsum(0))
        left = (1 - momentum) ** total
    unbiased = moments.m2.detach() / at_least_one(moments.count - 1)
    for running, new in ((running_mean, moments.mean.detach()), (running_var, unbiased)):
        old = running.to(wide)
        moved = old * left + (new.reshape(ghosts, -1).to(wide) * share).sum(0).reshape(running.shape)
        running.copy_(torch.where(total > 0, moved, old))


def correct(moments: Moments, source: Renorm, eps: float) -> tuple[Tensor, Tensor]:
    """Scale r and shift d of batch renormalization, (C,), wide and without a gradient.

    mean = running_mean / (1 - start_share)
    var  = (running_var - start_share) / (1 - start_share)
    r = clip(sqrt(batch var + eps) / sqrt(var + eps), 1 / r_max, r_max)
    d = clip((batch mean - mean) / sqrt(var + eps), -d_max, d_max)

    Args:
        moments: of the batch, one for each channel.
        source: its known averages are meant; `start_share` is how much of them is still what they started from, mean 0
            and variance 1. At 1 there is no history: r is 1 and d 0, and so they are where nothing counts.
    """
    assert moments.mean is not None
    _, _, _, running_mean, running_var, limits, start_share = source
    wide = find_wide_dtype(running_mean)
    share, r_max, d_max = (
        t.to(running_mean.device, wide) if isinstance(t, Tensor) else running_mean.new_full((), t, dtype=wide)
        for t in (start_share, *limits)
    )
    known = share < 1
    if isinstance(moments.count, Tensor):
        known = known & (moments.count.amax() > 0)
    rest = torch.where(share < 1, 1 - share, 1)
    mean = running_mean.to(wide) / rest
    rstd = torch.rsqrt(((running_var.to(wide) - share) / rest).clamp(min=0) + eps)
    batch_mean, batch_var = (t.detach().to(wide).reshape(mean.shape) for t in (moments.mean, moments.var))
    r = ((batch_var + eps).sqrt() * rstd).clamp(1 / r_max, r_max)
    d = ((batch_mean - mean) * rstd).clamp(-d_max, d_max)
    return torch.where(known, r, 1), torch.where(known, d, 0)


def average_counted(new: Tensor, count: Tensor, samples: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The average over samples of which something counts, and whether anything does."""
    counts = count > 0
    if not samples:
        return new, counts.any()
    total = torch.where(counts, new, 0).sum(samples)
    return total / at_least_one(counts.sum(samples)), counts.any()


def move_running(source: Any, moments: Moments, pooling: Pooling) -> None:
    """Move a source's running averages by the moments of x, where it has any."""
    if source.running_mean is not None and source.running_var is not None:
        mean, var, momentum = source[0], source[1], source[2]
        update_running(mean, var, moments, pooling.samples, momentum, pooling.ghosts)
