"""Question (b): where do mean and variance come from?

- ``batch``: from x itself; gradient flows through them.
- ``running``: from the running averages of training; no gradient flows through them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .pooling import Pooling
from .statistics import Moments, at_least_one, find_wide_dtype


def read_running(running_mean: Tensor, running_var: Tensor, pooling: Pooling, view: Tensor) -> Moments:
    """The running averages as moments that broadcast over the opened x."""
    hidden = set(pooling.pooled) | set(pooling.samples)
    shape = [1 if axis in hidden else size for axis, size in enumerate(view.shape)]
    return Moments(1, running_mean.reshape(shape), running_var.reshape(shape))


def find_momentum(momentum: float | None, counter: Tensor | None) -> float | Tensor:
    """Weight of the new value; without momentum that of a cumulative average, 1 / batches counted so far.

    That is a tensor, so that no compiler has to wait for its value (pytorch#194504).
    """
    if momentum is not None:
        return momentum
    return 0.0 if counter is None else (counter + 1).to(find_wide_dtype(counter)).reciprocal()


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    moments: Moments,
    samples: tuple[int, ...],
    momentum: float | Tensor,
) -> None:
    """running = (1 - momentum) * running + momentum * new, in place, computed wide and rounded once.

    The variance stored is the unbiased one, n/(n-1) times the variance that normalized the batch, as in torch. Where
    every sample has statistics of its own (instance norm) their average is stored. Samples of which nothing counts
    do not enter it, and a batch of which nothing counts changes nothing.

    Args:
        momentum: weight of the new value, from 0 to 1; a tensor for a cumulative average.
    """
    assert moments.mean is not None
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


def average_counted(new: Tensor, count: Tensor, samples: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The average over samples of which something counts, and whether anything does."""
    counts = count > 0
    if not samples:
        return new, counts.any()
    total = torch.where(counts, new, 0).sum(samples)
    return total / at_least_one(counts.sum(samples)), counts.any()


def move_running(running: Any, moments: Moments, pooling: Pooling, x: Tensor) -> None:
    """Move running averages by the moments of x, where there are any."""
    if running is not None and x.numel():
        mean, var, momentum = running
        update_running(mean, var, moments, pooling.samples, momentum)
