"""The kernels under torch.func and in double backward: vmaps around up to two derivatives, forward or reverse.

    xhat = (x - mean) * rstd,        y = xhat * gamma + beta
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) =: P(g, x)
    d <t, P(g, x)> / dx = -rstd^2 * (xhat * (mean(g' * t) - 3 * a * b) + a * t' + b * g') =: Q(g, t, x)
    a = mean(g * xhat),  b = mean(t * xhat),  g' = g - mean(g),  t' = t - mean(t)

xhat is a gradient, that of a pool's count * sqrt(var + eps). So P is symmetric in its first argument, and forward mode
is P as well; Q is symmetric in its first two. An uncentred norm takes no means from g and t.

Gamma and beta follow in torch's operations, because a transform wants their gradients for each sample. What a vmap adds
is one more axis that keeps statistics of its own. Deeper derivatives are taken from `plain.compose`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import finish
from ..affine import scale_shift, spread
from ..pooling import Pooling, remember
from ..sources import BATCH
from ..statistics import sum_in_turn
from ..torch_private import (
    TransformType,
    count_dispatch_modes,
    count_function_modes,
    dispatch_keys,
    find_forward_level,
    find_transforms,
    is_legacy_batched,
    is_wrapped,
    unwrap,
)
from . import addresses, kernels, plain
from .request import Request
from .walks import CODES
from .watch import PLAIN_KEYS, is_plain

# Below this many elements, over all samples, what torch.func does around an autograd function costs more than the
# kernels save.
LEAST = 1 << 14
HALVES = (torch.bfloat16, torch.float16)


def serves(x: Tensor) -> bool:
    """Whether x is plain memory under vmaps and at most two derivatives, and nothing else watches."""
    if torch.compiler.is_compiling():
        return False
    levels = [interpreter.key() for interpreter in find_transforms() or ()]
    if not levels:
        return False
    derivatives = levels.count(TransformType.Grad) + levels.count(TransformType.Jvp)
    if levels.count(TransformType.Vmap) + derivatives < len(levels) or derivatives > 2:
        return False
    if find_forward_level() >= levels.count(TransformType.Jvp):  # somebody's own dual numbers
        return False
    if count_dispatch_modes() or count_function_modes():
        return False
    if x.dtype not in CODES or not x.numel():
        return False
    while is_wrapped(x):
        x = unwrap(x)
    return type(x) is Tensor and x.numel() >= LEAST and dispatch_keys(x).raw_repr() in PLAIN_KEYS


def serves_twice(x: Tensor, g: Tensor, pooling: Pooling) -> bool:
    """Whether the kernels serve a gradient that is to be differentiated again, outside torch.func."""
    if not is_plain(x, g) or is_legacy_batched(g):
        return False
    return kernels.find_plan(kernels.arrange(x), pooling) is not None


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, request: Request, pooling: Pooling
) -> Tensor:
    """`plain.compose` with statistics from x; half types are widened first and rounded once."""
    wide = x.float() if x.dtype in HALVES else x
    xhat = pooling.open(Standardize.apply(wide, pooling, request.eps)[0])
    gamma, beta = (spread(p, pooling, xhat, wide.dtype) for p in (weight, bias))
    added = None if residual is None else pooling.open(residual).to(wide.dtype)
    y = scale_shift(xhat, gamma, beta)  # torch.addcmul of tensors that broadcast takes three times as long
    return finish(y, request.activation, added).to(x.dtype).reshape(x.shape)


def find_place(pooling: Pooling) -> int:
    """Where a new axis goes: in front, or beside the channels where memory before them is pooled."""
    return pooling.affine[0] if 0 in pooling.pooled and pooling.affine and 0 not in pooling.affine else 0


@remember
def add_axis(pooling: Pooling, place: int) -> Pooling:
    """The same norm of a tensor with one more axis, at `place`, that keeps statistics of its own."""

    def move(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(axis if axis < place else axis + 1 for axis in axes)

    splits = tuple((move((axis,))[0], sizes) for axis, sizes in pooling.splits)
    affine = (place, *move(pooling.affine)) if place else move(pooling.affine)
    return Pooling(splits, move(pooling.pooled), affine, (), pooling.centred)


class Standardize(torch.autograd.Function):
    """xhat of x, and the statistics as the kernels left them, for `Project` alone.

    Under a vmap they are those of all its samples, in the order of memory, and pass for a tensor without its axis.
    """

    @staticmethod
    def forward(x: Tensor, pooling: Pooling, eps: float) -> tuple[Tensor, Tensor]:
        x = kernels.arrange(x)
        plan = kernels.find_plan(x, pooling)
        if plan is None:
            return plain.compose(x, None, None, None, Request(BATCH, eps), pooling)[0], x.new_empty(0)
        y, statistics = kernels.forward(x, None, None, None, Request(BATCH, eps), plan, keep=True)
        assert isinstance(statistics, Tensor)
        return y, statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, *ctx.how = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1])
        ctx.save_for_forward(x, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
        return Project.apply(g, *ctx.saved_tensors, *ctx.how), None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> tuple[Any, ...]:
        return Project.apply(t, *ctx.saved_tensors, *ctx.how), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, pooling: Pooling, eps: float) -> Any:
        place = find_place(pooling)
        return Standardize.apply(x.movedim(in_dims[0], place), add_axis(pooling, place), eps), (place, None)


class Project(torch.autograd.Function):
    """P(g, x), with the statistics that `Standardize` found."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, statistics: Tensor | None, pooling: Pooling, eps: float) -> Tensor:
        x = kernels.arrange(x)
        needs = (True, False, False, False)
        plan = kernels.find_plan(x, pooling)
        if plan is not None:
            if statistics is None:
                statistics = kernels.find_statistics(x, plan)
            saved = addresses.Saved(x, None, None, None, None, statistics)
            dx = kernels.backward(g, saved, plan, eps, None, needs)[0]
        else:
            pull = torch.func.vjp(lambda x: plain.compose(x, None, None, None, Request(BATCH, eps), pooling)[0], x)[1]
            (dx,) = pull(g)
        assert dx is not None
        return dx

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, pooling, eps = inputs
        ctx.how = pooling, eps
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, t: Tensor) -> tuple[Any, ...]:
        g, x, statistics = ctx.saved_tensors
        dg = Project.apply(t, x, statistics, *ctx.how) if ctx.needs_input_grad[0] else None
        dx = SecondDerivative.apply(g, t, x, *ctx.how) if ctx.needs_input_grad[1] else None
        return dg, dx, None, None, None

    @staticmethod
    def jvp(ctx: Any, g_tangent: Tensor | None, x_tangent: Tensor | None, *_: Any) -> Tensor:
        g, x, statistics = ctx.saved_tensors
        along_g: Any = 0 if g_tangent is None else Project.apply(g_tangent, x, statistics, *ctx.how)
        found: Tensor = along_g if x_tangent is None else along_g + SecondDerivative.apply(g, x_tangent, x, *ctx.how)
        return found

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], g: Tensor, x: Tensor, statistics: Tensor | None, *how: Any
    ) -> tuple[Tensor, int]:
        pooling, eps = how
        place = find_place(pooling)
        if in_dims[1] is None:  # They are of an x without this axis.
            statistics = None
        g, x = (move_axis(t, axis, place, info.batch_size) for t, axis in ((g, in_dims[0]), (x, in_dims[1])))
        return Project.apply(g, x, statistics, add_axis(pooling, place), eps), place


class SecondDerivative(torch.autograd.Function):
    """Q(g, t, x)."""

    @staticmethod
    def forward(g: Tensor, t: Tensor, x: Tensor, pooling: Pooling, eps: float) -> Tensor:
        x = kernels.arrange(x)
        plan = kernels.find_plan(x, pooling)
        if plan is None:
            return differentiate_twice(g, t, x, pooling, eps)
        y, statistics = kernels.forward(x, None, None, None, Request(BATCH, eps), plan, keep=True)
        assert isinstance(statistics, Tensor)
        rstd = addresses.open_statistics(statistics, plan).rstd(eps)
        xhat, g, t = (pooling.open(each) for each in (y, g, t))

        def mean(values: Tensor) -> Tensor:
            return sum_in_turn(values, pooling.pooled) / pooling.count(xhat)

        a, b = mean(g * xhat), mean(t * xhat)
        if pooling.centred:
            g, t = g - mean(g), t - mean(t)
        xhat *= mean(g * t) - 3 * a * b
        xhat += a * t
        xhat += b * g
        xhat *= -rstd.square().to(xhat.dtype)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.how = inputs[3:]
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        pull = torch.func.vjp(lambda g, t, x: differentiate_twice(g, t, x, *ctx.how), *ctx.saved_tensors)[1]
        return (*pull(v), None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        inputs = ctx.saved_tensors
        known = tuple(
            torch.zeros_like(t) if tangent is None else tangent for t, tangent in zip(inputs, tangents[:3], strict=True)
        )
        found: Tensor = torch.func.jvp(lambda g, t, x: differentiate_twice(g, t, x, *ctx.how), inputs, known)[1]
        return found

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        *tensors, pooling, eps = inputs
        place = find_place(pooling)
        moved = (move_axis(t, axis, place, info.batch_size) for t, axis in zip(tensors, in_dims[:3], strict=True))
        return SecondDerivative.apply(*moved, add_axis(pooling, place), eps), place


def move_axis(t: Tensor, axis: int | None, place: int, size: int) -> Tensor:
    """t with a vmap's axis at `place`, where it has none repeated along it."""
    if axis is not None:
        return t.movedim(axis, place)
    return t.unsqueeze(place).expand(*t.shape[:place], size, *t.shape[place:])


def differentiate_twice(g: Tensor, t: Tensor, x: Tensor, pooling: Pooling, eps: float) -> Tensor:
    """Q in operations that can be differentiated again."""

    def project(x: Tensor) -> Tensor:
        pull = torch.func.vjp(lambda x: plain.compose(x, None, None, None, Request(BATCH, eps), pooling)[0], x)[1]
        found: Tensor = pull(g)[0]
        return found

    found: Tensor = torch.func.vjp(project, x)[1](t)[0]
    return found
