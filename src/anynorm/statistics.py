"""`Moments`, the one value that statistics travel in, and `GradSums`, its twin for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from .pooling import Pooling

Block = tuple[slice, ...]  # one slice for every axis of the view; () is the whole


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of pooled elements.

    `count` is a number, or with a mask a tensor that broadcasts over `mean`.

    `mean` and `m2` have the shape of the view with pooled axes of size 1. An uncentred norm (RMS) has `mean` None and
    `m2` about zero.
    """

    count: int | Tensor
    mean: Tensor | None
    m2: Tensor

    @property
    def var(self) -> Tensor:
        """Population variance (mean square where uncentred)."""
        return self.m2 / at_least_one(self.count)

    def rstd(self, eps: float) -> Tensor:
        """1 / sqrt(var + eps), never below float64 where the device has it."""
        return torch.rsqrt(self.var.to(find_wide_dtype(self.m2)) + eps)

    def clone(self) -> Moments:
        """A copy that later changes of the tensors do not reach."""
        return Moments(self.count, None if self.mean is None else self.mean.clone(), self.m2.clone())

    @classmethod
    def empty(cls, view: Tensor, pooling: Pooling, dtype: torch.dtype) -> Moments:
        """Room for the moments of a whole tensor, filled by `put`."""
        shape = [1 if axis in pooling.pooled else size for axis, size in enumerate(view.shape)]
        mean, m2 = (torch.empty(shape, dtype=dtype, device=view.device) for _ in range(2))
        return cls(pooling.count(view), mean if pooling.centred else None, m2)

    def put(self, moments: Moments, block: Block) -> None:
        """Store the moments of the pools that a block belongs to."""
        part(self.m2, block).copy_(moments.m2)
        if self.mean is not None and moments.mean is not None:
            part(self.mean, block).copy_(moments.mean)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together (Chan, Golub and LeVeque 1979); a count of 0 is the identity."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        if self.mean is None or other.mean is None:
            return Moments(count, None, self.m2 + other.m2)
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        return Moments(count, mean, self.m2 + other.m2 + delta * delta * (self.count * other.count / count))


def at_least_one(count: Any) -> Any:
    """A divisor, where the sum that it divides is 0 for a count of 0."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


@dataclass
class GradSums:
    """What backward sums, of g and of g * xhat, over all blocks.

    `beta` and `gamma` over everything that shares a gamma: these are the gradients of beta and gamma. `pool` and
    `pool_xhat`, times gamma, over everything that shares a mean; None where the statistics were given and nothing
    flows through them.
    """

    beta: Tensor
    gamma: Tensor
    pool: Tensor | None
    pool_xhat: Tensor | None

    @classmethod
    def zeros(cls, view: Tensor, pooling: Pooling, rstd: Tensor, is_given: bool) -> GradSums:
        """Sums of nothing, shaped to broadcast over the view."""
        shape = [size if axis in pooling.affine else 1 for axis, size in enumerate(view.shape)]
        beta, gamma = (torch.zeros(shape, dtype=rstd.dtype, device=rstd.device) for _ in range(2))
        pool, pool_xhat = (None if is_given else torch.zeros_like(rstd) for _ in range(2))
        return cls(beta, gamma, pool, pool_xhat)

    def add(self, g: Tensor, product: Tensor, gamma: Tensor | None, block: Block, pooling: Pooling) -> None:
        """Add a block's g and product g * xhat. Axes that both kinds of sum run over are summed once for both."""
        shares_gamma = tuple(axis for axis in range(g.dim()) if axis not in pooling.affine)
        common = tuple(axis for axis in shares_gamma if axis in pooling.pooled)
        rest_gamma = tuple(axis for axis in shares_gamma if axis not in common)
        rest_pool = tuple(axis for axis in pooling.pooled if axis not in common)
        for value, own, pool in ((g, self.beta, self.pool), (product, self.gamma, self.pool_xhat)):
            value = sum_over(value, common)
            part(own, block).add_(sum_over(value, rest_gamma))
            if pool is None:
                continue
            scaled = value if gamma is None else value * part(gamma, block)
            part(pool, block).add_(sum_over(scaled, rest_pool))


@overload
def part(t: Tensor, block: Block) -> Tensor: ...
@overload
def part(t: None, block: Block) -> None: ...
@overload
def part(t: Tensor | None, block: Block) -> Tensor | None: ...
def part(t: Tensor | None, block: Block) -> Tensor | None:
    """The share of a block in a tensor that broadcasts over the view."""
    if t is None or not block:
        return t
    return t[tuple(slice(None) if size == 1 else cut for size, cut in zip(t.shape, block, strict=True))]


def find_wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype statistics are computed in: float64, where the device has it.

    In float64 the squares of 1e37 do not overflow, the mean of a constant is the constant, and a mean of 1e6 standard
    deviations costs no digit of a float32.
    """
    return torch.float32 if x.device.type == "mps" else torch.float64


def find_moments(wide: Tensor, pooling: Pooling, refine: bool, counted: Tensor | None = None) -> Moments:
    """Two passes over an opened tensor, already in the dtype for statistics; differentiable.

    Args:
        refine: x itself has that dtype, so the first sum rounds: take back what it lost, in a pass of its own.
        counted: bool, which positions count; `wide` is 0 at the others.
    """
    if counted is not None:
        return find_counted_moments(wide, pooling, refine, counted)
    count = pooling.count(wide)
    if not pooling.centred:
        return Moments(count, None, wide.square().sum(pooling.pooled, keepdim=True))
    mean = wide.mean(pooling.pooled, keepdim=True)
    if refine:
        mean = mean + (wide - mean).mean(pooling.pooled, keepdim=True)
    return Moments(count, mean, (wide - mean).square().sum(pooling.pooled, keepdim=True))


def find_counted_moments(wide: Tensor, pooling: Pooling, refine: bool, counted: Tensor) -> Moments:
    """The same over positions that count; 0 for pools of which none does."""
    each = [size if axis in pooling.pooled else -1 for axis, size in enumerate(wide.shape)]
    count = counted.expand(each).sum(pooling.pooled, keepdim=True).to(wide.dtype)
    if not pooling.centred:
        return Moments(count, None, wide.square().sum(pooling.pooled, keepdim=True))
    count_or_one = at_least_one(count)
    # Divided, not times a reciprocal: the mean of a constant is that constant.
    mean = wide.sum(pooling.pooled, keepdim=True) / count_or_one
    if refine:
        mean = mean + torch.where(counted, wide - mean, 0).sum(pooling.pooled, keepdim=True) / count_or_one
    return Moments(count, mean, torch.where(counted, wide - mean, 0).square().sum(pooling.pooled, keepdim=True))


def sum_over(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Sum keeping the axes; over no axes, x itself (torch would sum over all)."""
    return x.sum(axes, keepdim=True) if axes else x
