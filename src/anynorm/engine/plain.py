"""The plain path: the formula in torch operations.

`compose` is the formula as written, on whole tensors; autograd, torch.func and the compilers derive the rest from it.
`forward` and `backward` work the same formula block by block, so that wide copies stay in cache and nothing as large as
x is kept but x itself. The tests compare them with `compose` and with the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor
from torch._C._functorch import get_dynamic_layer_stack_depth
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from ..activations import finish
from ..affine import scale_shift, spread
from ..pooling import Pooling
from ..sources import Given, Merged, read_given
from ..statistics import Block, GradSums, Moments, find_moments, find_wide_dtype, part
from .merge import Merge
from .request import Request

# Elements in a block: 4 MB in float64. On ResNet shapes 2**18 to 2**20 were alike, whole tensors 3 to 4 times slower.
BLOCK = 1 << 19


def compose(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, request: Request, pooling: Pooling
) -> tuple[Tensor, Moments]:
    """y = activation((x - mean) / sqrt(var + eps) * gamma + beta + residual), rounded once, and the moments it used.

    With a mask padding is made 0 before anything is computed, so that neither a value nor a gradient comes from there.
    """
    source, eps, activation, mask, *_ = request
    given = read_given(source, pooling, pooling.open(x)) if type(source) is Given else None
    is_bare = activation is None and residual is None and mask is None
    if given is not None and is_bare and not wants_sums(x, weight, bias):
        return compose_given(x, weight, bias, eps, given, pooling), given
    wide, counted = widen(x, pooling, mask)
    moments = given
    if moments is None:
        moments = find_moments(wide, pooling, wide.dtype == x.dtype, counted)
    if type(source) is Merged:
        mean, m2, count = Merge.apply(moments.mean, moments.m2, moments.count, eps, source.exchange)
        moments = Moments(count, mean, m2)
    gamma, beta = (spread(p, pooling, wide, wide.dtype) for p in (weight, bias))
    centre = wide if moments.mean is None else wide - moments.mean
    y = scale_shift(centre * moments.rstd(eps), gamma, beta)
    y = finish(y, activation, None if residual is None else blank(pooling.open(residual).to(y.dtype), counted))
    return blank(y, counted).to(x.dtype).reshape(x.shape), moments


def wants_sums(*tensors: Tensor | None) -> bool:
    """Whether autograd here will sum gradients.

    Under a transform or a mode it does not matter: wide copies cost several times torch's time, and torch's own sums of
    gradients are taken in cascades, which keeps them exact.
    """
    if get_dynamic_layer_stack_depth() > 0 or (not is_compiling() and _len_torch_dispatch_stack() > 0):
        return False
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def widen(x: Tensor, pooling: Pooling, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The opened x in the dtype of statistics, 0 at padding, and which positions count."""
    wide = pooling.open(x).to(find_wide_dtype(x))
    counted = None if mask is None else pooling.open_mask(mask) > 0
    return blank(wide, counted), counted


def compose_given(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, given: Moments, pooling: Pooling
) -> Tensor:
    """y from given statistics where nobody sums gradients: x - mean rounds once, so float32 is wide enough.

    In a compiler's graph, which finds rstd anew for every element, float64 would be the limit and not memory.
    """
    assert given.mean is not None
    view = pooling.open(x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    scale = torch.rsqrt(given.m2.to(dtype) + eps)  # of running averages the variance itself: their count is 1
    gamma, beta = (spread(p, pooling, view, dtype) for p in (weight, bias))
    centre, scale = view.to(dtype) - given.mean.to(dtype), scale if gamma is None else scale * gamma
    y = centre * scale if beta is None else torch.addcmul(beta, centre, scale)
    return y.to(x.dtype).reshape(x.shape)


def blank(t: Tensor, counted: Tensor | None) -> Tensor:
    """0 where nothing counts."""
    return t if counted is None else torch.where(counted, t, 0)


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


def find_groups(view: Tensor, pooling: Pooling) -> list[list[Block]]:
    """Blocks of at most BLOCK elements, cut in the order of memory, grouped so that no pool reaches beyond its group.

    A group of one block is finished while it is in cache; a larger one needs statistics of all its blocks first and a
    second walk.
    """
    if view.numel() <= BLOCK:
        return [[()]]
    cuts = [[slice(0, size)] for size in view.shape]
    rest = view.numel()
    for axis in sorted(range(view.dim()), key=view.stride, reverse=True):
        size = view.shape[axis]
        rest //= size
        step = max(1, BLOCK // max(rest, 1))
        cuts[axis] = [slice(start, min(start + step, size)) for start in range(0, size, step)]
        if step > 1:
            break
    within = [cut if axis in pooling.pooled else [slice(None)] for axis, cut in enumerate(cuts)]
    across = [[slice(None)] if axis in pooling.pooled else cut for axis, cut in enumerate(cuts)]
    return [
        [
            tuple(i if axis in pooling.pooled else o for axis, (i, o) in enumerate(zip(inner, outer, strict=True)))
            for inner in product(*within)
        ]
        for outer in product(*across)
    ]


def make_scratch(view: Tensor, groups: list[list[Block]], dtype: torch.dtype, count: int) -> list[Tensor]:
    """Scratch memory for wide blocks, laid out as the view is; the first block is never smaller than the others."""
    return [torch.empty_like(view[groups[0][0]], dtype=dtype) for _ in range(count)]


def cut_scratch(scratch: Tensor, like: Tensor) -> Tensor:
    """As much of the scratch memory as a block needs."""
    return scratch if scratch.shape == like.shape else scratch[tuple(slice(size) for size in like.shape)]


def load(scratch: Tensor, view: Tensor, block: Block, mean: Tensor | None = None) -> Tensor:
    """A block made wide, about `mean`."""
    source = view[block]
    wide = cut_scratch(scratch, source).copy_(source)
    return wide if mean is None else wide.sub_(part(mean, block))


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, pooling: Pooling
) -> tuple[Tensor, Moments]:
    """What `compose` computes with the batch as source, by blocks and without autograd."""
    out = torch.empty_like(x, memory_format=find_memory_format(x))
    view, y = pooling.open(x), pooling.open(out)
    dtype = find_wide_dtype(x)
    refine = dtype == x.dtype
    groups = find_groups(view, pooling)
    scratch, squares = make_scratch(view, groups, dtype, 2)
    gamma, beta = (spread(p, pooling, view, dtype) for p in (weight, bias))
    total = Moments.empty(view, pooling, dtype)
    for group in groups:
        moments = block_moments(load(scratch, view, group[0]), squares, pooling, refine)
        for block in group[1:]:
            moments = moments.merge(block_moments(load(scratch, view, block), squares, pooling, refine))
        total.put(moments, group[0])
        rstd = moments.rstd(eps)
        for block in group:
            # A lone block is still there, centred by its own mean.
            lone = len(group) == 1
            wide = cut_scratch(scratch, view[block]) if lone else load(scratch, view, block, total.mean)
            apply(wide, rstd, part(gamma, block), part(beta, block), pooling)
            y[block].copy_(wide)
    return out, total


def block_moments(wide: Tensor, squares: Tensor, pooling: Pooling, refine: bool) -> Moments:
    """What `find_moments` finds in a block, which is left centred about its own mean."""
    mean = None
    if pooling.centred:
        mean = wide.mean(pooling.pooled, keepdim=True)
        wide -= mean
        if refine:
            rest = wide.mean(pooling.pooled, keepdim=True)
            wide -= rest
            mean += rest
    squared = torch.mul(wide, wide, out=cut_scratch(squares, wide))
    return Moments(pooling.count(wide), mean, squared.sum(pooling.pooled, keepdim=True))


def apply(centred: Tensor, rstd: Tensor, gamma: Tensor | None, beta: Tensor | None, pooling: Pooling) -> None:
    """centred * rstd * gamma + beta, in place. Gamma joins rstd first where that table is no larger than rstd."""
    if gamma is not None:
        if pooling.gamma_is_pooled:
            centred *= rstd
            rstd = gamma
        else:
            rstd = rstd * gamma
    if beta is None:
        centred *= rstd
    else:
        torch.addcmul(beta, centred, rstd, out=centred)


def forward_given(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, given: Moments, pooling: Pooling
) -> Tensor:
    """What `compose` computes with given statistics, without autograd.

    x - mean rounds once, so the precision of x (float32 at least) is enough: no wide copy is made.
    """
    assert given.mean is not None
    out = torch.empty_like(x, memory_format=find_memory_format(x))
    view, y = pooling.open(x), pooling.open(out)
    dtype = torch.promote_types(torch.promote_types(x.dtype, given.mean.dtype), torch.float32)
    rstd = given.rstd(eps)
    gamma, beta = (spread(p, pooling, view, rstd.dtype) for p in (weight, bias))
    scale = rstd if gamma is None else rstd * gamma
    centred = torch.sub(view, given.mean, out=y) if dtype == x.dtype else view.to(dtype).sub_(given.mean)
    apply(centred, scale.to(dtype), None, beta if beta is None else beta.to(dtype), pooling)
    if centred is not y:
        y.copy_(centred)
    return out


def backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    moments: Moments,
    eps: float,
    pooling: Pooling,
    *,
    is_given: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the formula, by blocks; the statistics are constants where they were given (`is_given`).

    xhat   = (x - mean) * rstd
    dbeta  = sum g,  dgamma = sum g * xhat                        over everything that shares a gamma
    dx     = rstd * (gamma * g - mean(gamma * g) - xhat * mean(gamma * g * xhat))      means over the pool

    Args:
        needs: which of dx, dgamma and dbeta are wanted.

    Returns:
        dx, dgamma and dbeta, the latter two as wide as the computation and flat or shaped as their axes.
    """
    out = torch.empty_like(x, memory_format=find_memory_format(x)) if needs[0] else None
    grad, view = pooling.open(g), pooling.open(x)
    groups = find_groups(view, pooling)
    rstd = moments.rstd(eps)
    mean = None if moments.mean is None else moments.mean.to(rstd.dtype)
    gamma = spread(weight, pooling, view, rstd.dtype)
    sums = GradSums.zeros(view, pooling, rstd, is_given)
    count = pooling.count(view)
    g_scratch, x_scratch, products = make_scratch(view, groups, rstd.dtype, 3)
    for group in groups:
        for block in group:
            wide_g, xhat = load(g_scratch, grad, block), load(x_scratch, view, block, mean).mul_(part(rstd, block))
            sums.add(wide_g, torch.mul(wide_g, xhat, out=cut_scratch(products, xhat)), gamma, block, pooling)
        for block in group if out is not None else ():
            if len(group) > 1:
                wide_g, xhat = (
                    load(g_scratch, grad, block),
                    load(x_scratch, view, block, mean).mul_(part(rstd, block)),
                )
            gamma_part = part(gamma, block)
            if gamma_part is not None:
                wide_g *= gamma_part
            if sums.pool is not None and sums.pool_xhat is not None:
                if mean is not None:
                    wide_g -= part(sums.pool, block) / count
                wide_g -= xhat.mul_(part(sums.pool_xhat, block) / count)
            wide_g *= part(rstd, block)
            pooling.open(out)[block].copy_(wide_g)  # type: ignore[arg-type] # it is there where dx is wanted
    return out, sums.gamma, sums.beta
