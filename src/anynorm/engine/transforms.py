"""The kernels under torch.func: per-sample gradients by vmap and grad, and any vmaps around one grad.

    xhat = (x - mean) * rstd,        y = xhat * gamma + beta
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) =: P(g, x)        symmetric: P is its own transpose in g

Gamma and beta follow in torch's operations, because a transform wants their gradients for each sample. What a vmap adds
is one more axis that keeps statistics of its own. Deeper derivatives are taken from `plain.compose`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _dispatch_keys
from torch._C._functorch import TransformType, get_interpreter_stack, get_unwrapped, is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.overrides import _len_torch_function_stack
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from ..activations import finish
from ..affine import scale_shift, spread
from ..pooling import Pooling, remember
from ..sources import BATCH
from . import kernels, plain
from .request import Request
from .walks import CODES
from .watch import PLAIN_KEYS

# Below this many elements, over all samples, what torch.func does around an autograd function costs more than float64.
LEAST = 1 << 14
HALVES = (torch.bfloat16, torch.float16)


def serves(x: Tensor) -> bool:
    """Whether x is plain memory under vmaps and at most one grad, and nothing else watches."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    levels = [interpreter.key() for interpreter in get_interpreter_stack() or ()]
    if not levels or any(level not in (TransformType.Vmap, TransformType.Grad) for level in levels):
        return False
    if levels.count(TransformType.Grad) > 1 or _len_torch_dispatch_stack() or _len_torch_function_stack():
        return False
    if x.dtype not in CODES or not x.numel():
        return False
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return type(x) is Tensor and x.numel() >= LEAST and _dispatch_keys(x).raw_repr() in PLAIN_KEYS


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, request: Request, pooling: Pooling
) -> Tensor:
    """`plain.compose` with statistics from x; half types are widened first and rounded once."""
    wide = x.float() if x.dtype in HALVES else x
    xhat = pooling.open(Standardize.apply(wide, pooling, request.eps)[0])
    gamma, beta = (spread(p, pooling, xhat, wide.dtype) for p in (weight, bias))
    added = None if residual is None else pooling.open(residual).to(wide.dtype)
    y = scale_shift(xhat, gamma, beta) if gamma is None or beta is None else torch.addcmul(beta, xhat, gamma)
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

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
        return Project.apply(g, *ctx.saved_tensors, *ctx.how), None, None

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
            saved = kernels.Saved(x, None, None, None, None, statistics)
            dx = kernels.backward(g, saved, plan, eps, None, needs)[0]
        else:
            pull = torch.func.vjp(lambda x: plain.compose(x, None, None, None, Request(BATCH, eps), pooling)[0], x)[1]
            (dx,) = pull(g)
        assert dx is not None
        return dx

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        g, x, _, *ctx.how = inputs
        ctx.save_for_backward(g, x)

    @staticmethod
    def backward(ctx: Any, t: Tensor) -> tuple[Any, ...]:
        pooling, eps = ctx.how

        def project(g: Tensor, x: Tensor) -> Tensor:
            pull = torch.func.vjp(lambda x: plain.compose(x, None, None, None, Request(BATCH, eps), pooling)[0], x)[1]
            return pull(g)[0]

        pull = torch.func.vjp(project, *ctx.saved_tensors)[1]
        return (*pull(t), None, None, None)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], g: Tensor, x: Tensor, statistics: Tensor | None, *how: Any
    ) -> tuple[Tensor, int]:
        pooling, eps = how
        place = find_place(pooling)
        if in_dims[1] is None:  # They are of an x without this axis.
            statistics = None
        g, x = (
            t.unsqueeze(place).expand(*t.shape[:place], info.batch_size, *t.shape[place:])
            if axis is None
            else t.movedim(axis, place)
            for t, axis in ((g, in_dims[0]), (x, in_dims[1]))
        )
        return Project.apply(g, x, statistics, add_axis(pooling, place), eps), place
