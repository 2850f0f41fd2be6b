"""`Moments`, the one value that statistics travel in, and how they are found in torch operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .pooling import Pooling
from .torch_private import count_transforms, is_recording, with_replace


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
        found: Tensor = self.m2 / at_least_one(self.count)
        return found

    def rstd(self, eps: float) -> Tensor:
        """1 / sqrt(var + eps), never below float64 where the device has it."""
        return torch.rsqrt(self.var.to(find_wide_dtype(self.m2)) + eps)

    def clone(self) -> Moments:
        """A copy that later changes of the tensors do not reach."""
        return Moments(self.count, None if self.mean is None else self.mean.clone(), self.m2.clone())

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


def find_wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of what there is one of for each pool: float64, where the device has it.

    In float64 the variance of values of 1e37 does not overflow, and a mean of 1e6 standard deviations is a float64.
    """
    return torch.float32 if x.device.type == "mps" else torch.float64


@with_replace
class Centred(NamedTuple):
    """An opened tensor about the mean of its pools, in the precision it came in.

    x * unit = centred + shift + rest, with `unit` a power of two that brings values near 1. Shift and rest are the mean
    in two parts: at a mean of 1e6 standard deviations the first alone would cost all digits of a float32.

    Attributes:
        scaled: x * unit.
        shift, rest: None for an uncentred norm.
        counted: which positions count; at the others `scaled` and `centred` are 0.
        number: how many elements of each pool count.
    """

    scaled: Tensor
    centred: Tensor
    shift: Tensor | None
    rest: Tensor | None
    unit: Tensor | float
    pooling: Pooling
    counted: Tensor | None
    number: int | Tensor

    def move(self, mean: Tensor) -> Centred:
        """The same about another mean."""
        mean = mean * self.unit
        shift = mean.detach().to(self.scaled.dtype)
        rest = (mean - shift).to(self.scaled.dtype)
        return self._replace(centred=blank(self.scaled - shift - rest, self.counted), shift=shift, rest=rest)


def centre(view: Tensor, pooling: Pooling, counted: Tensor | None = None) -> Centred:
    """Take the mean from an opened tensor of float32 or float64, twice: the second takes what the first sum rounded.

    So does backward, which takes the mean from the gradient by the same two sums.

    No wider copy is made, for on an accelerator that would cost several times the norm. torch's sums are taken in
    cascades. The mean is never beyond the values, so that of a constant is that constant.

    Args:
        counted: bool, which positions count; `view` is 0 at the others.
    """
    count: int | Tensor = pooling.count(view)
    if counted is not None:
        count = count_positions(counted, view, pooling, find_wide_dtype(view))
    least, most, unit = find_range(view.detach(), pooling)
    scaled = view * unit
    if not pooling.centred:
        return Centred(scaled, scaled, None, None, unit, pooling, counted, count)
    divisor = at_least_one(count.to(view.dtype) if isinstance(count, Tensor) else count)
    shift = sum_in_turn(scaled, pooling.pooled) / divisor
    within = torch.minimum(torch.maximum(shift.detach(), least * unit), most * unit)
    shift = shift + (within - shift.detach())
    moved = blank(scaled - shift, counted)
    rest = sum_in_turn(moved, pooling.pooled) / divisor
    return Centred(scaled, blank(moved - rest, counted), shift, rest, unit, pooling, counted, count)


def find_range(view: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor, Tensor]:
    """The least and largest value of each pool, and the power of two that brings the larger of their sizes to 1 or 2.

    So no square leaves the range of floats, nor does a gradient times a deviation where the gradient does not.
    """
    if not view.numel():
        zeros = view.sum(pooling.pooled, keepdim=True)
        return zeros, zeros, zeros + 1
    least, most = view.amin(pooling.pooled, keepdim=True), view.amax(pooling.pooled, keepdim=True)
    size = torch.maximum(-least, most)
    limit = 2.0**100 if view.dtype is torch.float32 else 2.0**900
    return least, most, find_power(size).clamp(1 / limit, limit).reciprocal()


def find_power(size: Tensor) -> Tensor:
    """The power of two of each float32 or float64: exactly, as no logarithm is on every device.

    0 below all normal numbers, or a power that small; infinity, or the largest number, where there is none.
    """
    # ONNX knows no bits; where the logarithm rounds it is the power next to it, which serves as well.
    if is_recording():
        return torch.pow(2.0, size.log2().floor())
    if count_transforms():  # vmap of torch 2.10 knows no bits.
        mantissa, _ = torch.frexp(size)
        return torch.where(size == 0, size, size / (2 * mantissa)).nan_to_num(torch.inf)
    # The bits of the exponent alone are that power.
    kind, exponent = (torch.int32, 0xFF << 23) if size.dtype is torch.float32 else (torch.int64, 0x7FF << 52)
    return (size.view(kind) & exponent).view(size.dtype)


def find_moments(found: Centred) -> Moments:
    """The moments that `centre` found, wide where the device has it; differentiable."""
    wide, pooled = find_wide_dtype(found.centred), found.pooling.pooled
    unit = found.unit.to(wide) if isinstance(found.unit, Tensor) else found.unit
    m2 = sum_in_turn(found.centred.square(), pooled).to(wide) / unit / unit
    if found.shift is None or found.rest is None:
        return Moments(found.number, None, m2)
    return Moments(found.number, (found.shift.to(wide) + found.rest.to(wide)) / unit, m2)


def sum_in_turn(t: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Sum keeping the axes, over one after the other: torch cascades along one axis, and not across several."""
    for axis in reversed(axes):
        t = t.sum(axis, keepdim=True)
    return t


def blank(t: Tensor, counted: Tensor | None) -> Tensor:
    """0 where nothing counts."""
    return t if counted is None else torch.where(counted, t, 0)


def count_positions(counted: Tensor, view: Tensor, pooling: Pooling, dtype: torch.dtype) -> Tensor:
    """How many elements of each pool count, as they broadcast over its mean."""
    times = 1
    for axis in pooling.pooled:
        # Not expanded: torch's exporter to ONNX by tracing would write the sizes of its example into the graph.
        times *= view.shape[axis] if counted.shape[axis] == 1 else 1
    return (counted.sum(pooling.pooled, keepdim=True) * times).to(dtype)
