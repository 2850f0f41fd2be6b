"""The compiled calls by addresses: Python rearranges tensors, finds where they lie, and says what is wrong with them.

`kernels` lets the compiled module read the tensors itself. What that is not sure of comes here, as do ghost batches and
all calls with an older torch. Every address is of memory that `memory` has just looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, IDENTITY, find_activation
from ..errors import check_no_overlap
from ..sources import Given, move_running
from ..statistics import Moments
from ..torch_private import increment_version
from . import memory
from .memory import CPU, find_address, ready
from .request import Request
from .walks import Plan, compiled


class Choices(dict[str | None, tuple[int, float]]):
    """Activations as the compiled module takes them: code, as enum ActivationCode counts, and alpha."""

    def __missing__(self, text: str) -> tuple[int, float]:
        found = find_activation(text)
        if found is None:
            raise KeyError(text)
        return self[found[0].name][0], found[1]


CHOICES: Choices = Choices({IDENTITY: (0, 0.0), None: (0, 0.0)})
CHOICES.update({name: (code, known.default) for code, (name, known) in enumerate(ACTIVATIONS.items(), 1)})

Statistics = Tensor | tuple[Tensor, Tensor]  # all pools' mean and m2 in one, or a given mean and variance


class Saved(NamedTuple):
    """What forward leaves for backward; beta and the residual where an activation follows, else None."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    statistics: Statistics


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    request: Request,
    plan: Plan,
    *,
    keep: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """What `kernels.forward` is."""
    source, eps, activation, mask, _, _ = request
    code, alpha = CHOICES[activation]
    gamma, beta = ready("weight", weight, plan), ready("bias", bias, plan)
    if residual is not None:
        residual = memory.arrange("residual", residual, plan)
    statistics: Statistics | None = None
    moves, moved, momentum = False, (0, 0), 0.0
    if type(source) is Given:
        statistics = ready_statistics(source, plan)
        if keep:  # What is kept for backward must not change when the buffers do.
            known_mean, known_var = statistics
            statistics = (
                known_mean.clone() if known_mean is source.mean else known_mean,
                known_var.clone() if known_var is source.var else known_var,
            )
    else:
        running_mean, running_var, new_weight = source
        moves = running_mean is not None and running_var is not None
        if moves and not plan.pooling.ghosts and can_move(plan, running_mean, running_var, new_weight):
            size, momentum = plan.parameter_bytes, new_weight
            moved = (
                find_address("running_mean", running_mean, size),
                find_address("running_var", running_var, size),
            )
        if keep or (moves and not moved[0]):
            statistics = make_statistics(plan)
    mean, m2, var = (0, 0, 0) if statistics is None else find_addresses(statistics, plan)
    start = find_address("input", x, plan.bytes)
    y = torch.empty_like(x, memory_format=plan.memory_format)
    compiled.forward(
        plan.compiled,
        threads=torch.get_num_threads(),
        eps=eps,
        activation=code,
        alpha=alpha,
        x=start,
        residual=0 if residual is None else find_address("residual", residual, plan.bytes),
        y=y.data_ptr(),
        gamma=0 if gamma is None else find_address("weight", gamma, plan.parameter_bytes),
        beta=0 if beta is None else find_address("bias", beta, plan.parameter_bytes),
        mean=mean,
        m2=m2,
        var=var,
        mask=0 if mask is None else find_mask_address(mask, plan),
        running_mean=moved[0],
        running_var=moved[1],
        momentum=momentum,
    )
    if moved[0]:
        note_written(source)
    elif moves:
        assert isinstance(statistics, Tensor)
        check_no_overlap("norm", x, running_mean, running_var)
        move_running(source, open_statistics(statistics, plan, mask), plan.pooling)
    return y, statistics


def backward(
    g: Tensor, saved: Saved, plan: Plan, eps: float, activation: str | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """What `kernels.backward` is."""
    x, weight, bias, residual, mask, statistics = saved
    code, alpha = CHOICES[activation]
    g, x = memory.arrange("gradient", g, plan), memory.arrange("input", x, plan)
    gamma, beta = ready("weight", weight, plan), ready("bias", bias, plan)
    if residual is not None:
        residual = memory.arrange("residual", residual, plan)
    statistics = recover_statistics(statistics, plan)
    mean, m2, var = find_addresses(statistics, plan)
    mask = mask if mask is None else mask.contiguous()
    read = find_address("gradient", g, plan.bytes), find_address("input", x, plan.bytes)
    dx = torch.empty_like(x, memory_format=plan.memory_format) if needs[0] else None
    dgamma = torch.empty(plan.channels, dtype=plan.parameter, device=CPU) if needs[1] else None
    dbeta = torch.empty(plan.channels, dtype=plan.parameter, device=CPU) if needs[2] else None
    dresidual = torch.empty_like(x, memory_format=plan.memory_format) if needs[3] else None
    compiled.backward(
        plan.compiled,
        threads=torch.get_num_threads(),
        eps=eps,
        activation=code,
        alpha=alpha,
        grad=read[0],
        x=read[1],
        residual=find_address("residual", residual, plan.bytes),
        dx=address(dx),
        dresidual=address(dresidual),
        gamma=find_address("weight", gamma, plan.parameter_bytes),
        beta=find_address("bias", beta, plan.parameter_bytes),
        mean=mean,
        m2=m2,
        var=var,
        mask=find_mask_address(mask, plan),
        dgamma=address(dgamma),
        dbeta=address(dbeta),
    )
    return dx, dgamma, dbeta, dresidual


def note_written(source: Any) -> None:
    """Let autograd hear of buffers that were written through their addresses."""
    if not source.running_mean.is_inference():
        increment_version(source[:2])


def make_statistics(plan: Plan) -> Tensor:
    """Memory for the means and then the m2 of all pools; of an uncentred norm for the m2 alone."""
    return torch.empty(plan.pools * (2 if plan.centred else 1), dtype=torch.float64, device=CPU)


def find_addresses(statistics: Statistics | None, plan: Plan) -> tuple[int, int, int]:
    """Where mean, m2 and a given variance are, 0 for what is not there."""
    if statistics is None:
        return 0, 0, 0
    if isinstance(statistics, tuple):
        size = plan.pools * plan.statistics_dtype.itemsize
        return find_address("mean", statistics[0], size), 0, find_address("variance", statistics[1], size)
    start = find_address("statistics", statistics, 8 * plan.pools * (2 if plan.centred else 1))
    return (start, start + 8 * plan.pools, 0) if plan.centred else (0, start, 0)


def find_mask_address(mask: Tensor | None, plan: Plan) -> int:
    """Where the mask is: one float for each of n and s, in this order, as a contiguous mask has them."""
    if mask is None:
        return 0
    n, s = plan.layout.n, plan.layout.s
    if mask.numel() != n * s or not mask.is_contiguous() or mask.dtype is not torch.float32:
        raise RuntimeError(f"kernels: a mask must be {n * s} contiguous floats; got {mask.numel()} of {mask.dtype}")
    return find_address("mask", mask, 4 * n * s)


def ready_statistics(given: Given, plan: Plan) -> tuple[Tensor, Tensor]:
    """A given mean and variance as the kernels read them: wide where the plan is for wide ones, else as parameters."""
    mean, var = given
    if plan.statistics_dtype is not plan.parameter:
        how = plan.statistics_dtype, plan.pools
        return memory.recover("mean", mean, *how), memory.recover("variance", var, *how)
    return ready("running_mean", mean, plan, plan.pools), ready("running_var", var, plan, plan.pools)


def recover_statistics(kept: Statistics, plan: Plan) -> Statistics:
    """What came back from forward, which hooks on saved tensors may have laid out anew."""
    if isinstance(kept, tuple):
        mean, var = kept
        how = plan.statistics_dtype, plan.pools
        return memory.recover("mean", mean, *how), memory.recover("variance", var, *how)
    return memory.recover("statistics", kept, torch.float64, plan.pools * (2 if plan.centred else 1))


def can_move(plan: Plan, mean: Tensor, var: Tensor, momentum: float | Tensor) -> bool:
    """Whether the kernels can move running averages: in memory, as wide as parameters are, by a plain number."""
    dtype = plan.parameter
    return (
        plan.layout.k == 1
        and type(momentum) is float
        and momentum >= 0
        and mean.dtype is dtype
        and var.dtype is dtype
        and mean.is_contiguous()
        and var.is_contiguous()
        and mean.numel() == var.numel() == plan.channels
    )


def open_statistics(statistics: Tensor, plan: Plan, mask: Tensor | None = None) -> Moments:
    """What the kernels left as statistics."""
    count: int | Tensor = plan.count if mask is None else find_count(mask, plan)
    if not plan.centred:
        return Moments(count, None, statistics.view(plan.shape))
    mean, m2 = statistics.view(2, *plan.shape).unbind()
    return Moments(count, mean, m2)


def find_count(mask: Tensor, plan: Plan) -> Tensor:
    """Elements of each pool that count, as they broadcast over its mean."""
    n, _, k, s, _, pool_n, *_ = plan.layout
    if pool_n:
        return mask.sum(dtype=torch.float64)
    count = mask.view(n, s).sum(1, dtype=torch.float64) * k
    return count.view([size if axis == 0 else 1 for axis, size in enumerate(plan.shape)])


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
