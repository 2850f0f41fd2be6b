"""The plain path: the formula in torch operations.

`compose` is the formula as written, on whole tensors; autograd, torch.func and the compilers derive the rest from it.
It serves what no kernel does. The tests compare it with the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activations import finish
from ..affine import expand_in_turn, scale_shift, spread
from ..pooling import Pooling
from ..sources import Given, Merged, read_given
from ..statistics import Moments, blank, centre, find_moments
from .merge import Merge
from .request import Request


def compose(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, request: Request, pooling: Pooling
) -> tuple[Tensor, Moments]:
    """y = activation((x - mean) / sqrt(var + eps) * gamma + beta + residual), and the moments it used.

    In the precision of x, float32 at least; what there is one of for each pool is wide. With a mask padding is made 0
    before anything is computed, so that neither a value nor a gradient comes from there.
    """
    source, eps, activation, mask, *_ = request
    view, counted = open_counted(x, pooling, mask)
    dtype = view.dtype
    if type(source) is Given:
        moments = read_given(source, pooling, view)
        assert moments.mean is not None
        # As narrow as x mostly, and x - mean rounds once. Of running averages m2 is the variance: their count is 1.
        centred, scale = view - moments.mean.to(dtype), torch.rsqrt(moments.m2.to(dtype) + eps)
    else:
        found = centre(view, pooling, counted)
        moments = find_moments(found)
        if type(source) is Merged:
            mean, m2, count = Merge.apply(moments.mean, moments.m2, moments.count, eps, source.exchange)
            moments = Moments(count, mean, m2)
            found = found.move(mean)
        centred, scale = found.centred, (moments.rstd(eps) / found.unit).to(dtype)
    gamma, beta = (spread(p, pooling, view, dtype) for p in (weight, bias))
    if gamma is not None and not set(pooling.pooled) <= set(pooling.affine):  # then the product is small
        scale, gamma = scale * gamma, None
    gamma, beta = (None if t is None else expand_in_turn(t, view) for t in (gamma, beta))
    y = scale_shift(centred * expand_in_turn(scale, view), gamma, beta)
    y = finish(y, activation, None if residual is None else blank(pooling.open(residual).to(dtype), counted))
    y = blank(y, counted).to(x.dtype)
    return y if y.shape == x.shape else y.reshape(x.shape), moments


def open_counted(x: Tensor, pooling: Pooling, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The opened x as float32 at least, 0 at padding, and which positions count."""
    view = pooling.open(x).to(torch.promote_types(x.dtype, torch.float32))
    counted = None if mask is None else pooling.open_mask(mask) > 0
    return blank(view, counted), counted


def find_memory_format(x: Tensor) -> torch.memory_format:
    """What the result is laid out as: channels_last where x is, else contiguous, as torch's batch norm promises."""
    return suggest_memory_format(x.shape, x.stride())


def suggest_memory_format(shape: Sequence[int], strides: Sequence[int]) -> torch.memory_format:
    """torch's own rule for batch and group norm: channels_last where strides fall as they do there, holes or not.

    So a slice of the channels of such a map stays channels_last. torch takes a lone sample for one whatever its first
    stride is.
    """
    if len(shape) not in (4, 5) or strides[1] == 0:
        return torch.contiguous_format
    least = 0
    for axis in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[axis] == 0 or (strides[axis] < least and (axis or shape[0] > 1)):
            return torch.contiguous_format
        if axis == 0 and least == strides[1]:  # one channel of one position: no telling
            return torch.contiguous_format
        least = strides[axis] * shape[axis]
    return torch.channels_last if len(shape) == 4 else torch.channels_last_3d


def lay_out(y: Tensor, memory_format: torch.memory_format) -> Tensor:
    """y in a memory format, and its axes of size 1 with the strides of that format, which convolutions look at."""
    y = y.contiguous(memory_format=memory_format)
    if 1 not in y.shape or 0 in y.shape:
        return y
    if memory_format == torch.contiguous_format:
        return y.flatten().view(y.shape)
    last = y.movedim(1, -1)
    return last.flatten().view(last.shape).movedim(-1, 1)
