"""How gradients flow through what the kernels and the plain path's blocks compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ..errors import check_no_overlap
from ..pooling import Pooling
from ..sources import move_running, read_running
from ..statistics import Moments
from . import kernels, memory, plain
from .walks import Plan
from .watch import is_plain

Recipe = tuple[Pooling, Plan]
Running = tuple[Tensor, Tensor, float | Tensor]  # running mean and variance, and the weight of the new value


def forward_by_blocks(
    x: Tensor,
    pooling: Pooling,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    given: tuple[Tensor, Tensor] | None,
    running: Running | None,
) -> tuple[Tensor, Moments]:
    """In torch operations, block by block, for what no kernel walks."""
    mean, var = given or (running or (None, None))[:2]
    named = {"input": x, "weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    for name, t in named.items():
        memory.check_room(name, t)
    if given is not None:  # What is kept for backward must not change when the buffers do.
        known = read_running(*given, pooling, pooling.open(x)).clone()
        return plain.forward_given(x, pooling, weight, bias, eps, known), known
    y, moments = plain.forward(x, pooling, weight, bias, eps)
    move_running(running, moments, pooling, x)
    return y, moments


def forward_walk(
    recipe: Recipe,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    given: tuple[Tensor, Tensor] | None,
    activation: str | None,
    residual: Tensor | None,
    running: Running | None,
    mask: Tensor | None,
    keep: bool,
) -> tuple[Tensor, kernels.Statistics | None]:
    """By the kernels; and mean and m2, or the given mean and variance, where they are to be kept."""
    pooling, walk = recipe
    moved: Any = None
    statistics: kernels.Statistics | None = None
    if given is not None:
        statistics = mean, var = kernels.ready_statistics(given, walk)
        if keep:  # What is kept for backward must not change when the buffers do.
            statistics = mean.clone() if mean is given[0] else mean, var.clone() if var is given[1] else var
    else:
        if running is not None and not pooling.ghosts and kernels.can_move(walk, *running):
            moved = running
        if keep or (running is not None and moved is None):
            statistics = kernels.make_statistics(walk)
    y = kernels.forward(x, walk, weight, bias, eps, statistics, activation, residual, moved, mask)
    if moved is not None:
        increment_version(moved)
    elif running is not None and isinstance(statistics, Tensor):
        check_no_overlap("norm", x, *running[:2])
        move_running(running, kernels.open_statistics(statistics, walk, mask), pooling, x)
    return y, statistics


def increment_version(running: Running) -> None:
    """Let autograd hear of buffers that were written through their addresses."""
    if not running[0].is_inference():
        torch._C._increment_version(running[:2])


class Normalize(torch.autograd.Function):
    """By the kernels. Keeps x, the statistics and, behind an activation, beta and the residual, and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, recipe: Any, eps: float, *rest: Any
    ) -> Tensor:
        given, activation, running, mask = rest
        y, statistics = forward_walk(recipe, x, weight, bias, eps, given, activation, residual, running, mask, True)
        known = statistics if type(statistics) is tuple else (statistics,)
        # Beta may change before backward, as in torch, and without an activation the residual need not be kept.
        behind = (None, None) if activation is None else (bias, residual)
        ctx.save_for_backward(keep(x), weight, keep(mask), behind[0], keep(behind[1]), *known)
        ctx.how = recipe, eps, activation, given is not None, memory.find_like(bias), memory.find_like(weight)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        if torch.compiler.is_compiling():
            return backward_uncompiled(Normalize, ctx, g)
        recipe, eps, activation, is_given, bias_like, weight_like = ctx.how
        x, weight, mask, bias, residual, *known = ctx.saved_tensors
        statistics = tuple(known) if is_given else known[0]
        memory.check_like("weight", weight, weight_like)
        memory.check_like("bias", bias, bias_like)
        if torch.is_grad_enabled() or not is_plain(g) or is_legacy_batchedtensor(g):
            for name, t in (("input", x), ("residual", residual)):
                memory.check_like(name, t, (recipe[1].sizes, recipe[1].dtype))
            given = statistics if is_given else None
            return backward_differentiable(ctx, recipe[0], g, (x, weight, bias, residual), given, mask)
        needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        dresidual = None
        if needs_residual and activation is None and mask is None:
            dresidual, needs_residual = g, False
        needs = needs_x, needs_weight, needs_bias, needs_residual
        dx, dweight, dbias, found = kernels.backward(
            g, x, recipe[1], weight, bias, statistics, eps, needs, activation, residual, mask
        )
        if dweight is not None:
            dweight = like(dweight, *weight_like)
        if dbias is not None:
            dbias = like(dbias, *bias_like)
        return dx, dweight, dbias, dresidual if found is None else found, None, None, None, None, None, None


# What Normalize.apply does once it has found that no transform is active, which `find_key` and `is_plain` know.
apply = super(torch.autograd.Function, Normalize).apply


class NormalizeByBlocks(torch.autograd.Function):
    """In torch operations, block by block. Keeps x and the statistics and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, pooling: Pooling, eps: float, *rest: Any) -> Tensor:
        given, running = rest
        y, moments = forward_by_blocks(x, pooling, weight, bias, eps, given, running)
        ctx.save_for_backward(keep(x), weight, moments.mean, moments.m2)
        ctx.how = pooling, eps, None, given is not None, memory.find_like(bias), moments.count
        ctx.likes = tuple(memory.find_like(t) for t in (x, weight, moments.mean, moments.m2))
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        if torch.compiler.is_compiling():
            return backward_uncompiled(NormalizeByBlocks, ctx, g)
        x, weight, mean, m2 = ctx.saved_tensors
        pooling, eps, _, is_given, bias_like, count = ctx.how
        for name, t, known in zip(("input", "weight", "mean", "variance"), ctx.saved_tensors, ctx.likes, strict=True):
            memory.check_like(name, t, known)
            memory.check_room(name, t)
        if torch.is_grad_enabled() or not is_plain(g) or is_legacy_batchedtensor(g):
            given = (mean, m2) if is_given else None
            dx, dweight, dbias, *_ = backward_differentiable(ctx, pooling, g, (x, weight, None), given)
            return dx, dweight, dbias, None, None, None, None
        moments = Moments(count, mean, m2)
        needs = ctx.needs_input_grad[:3]
        dx, dgamma, dbeta = plain.backward(g, x, pooling, weight, moments, eps, given=is_given, needs=needs)
        dweight = like(dgamma, weight.shape, weight.dtype) if needs[1] and dgamma is not None else None
        dbias = like(dbeta, *bias_like) if needs[2] and dbeta is not None else None
        return dx, dweight, dbias, None, None, None, None


@torch._disable_dynamo
def backward_uncompiled(function: Any, ctx: Any, *g: Tensor) -> tuple[Any, ...]:
    """Compiled autograd traces the backward of a norm that ran eagerly; a compiler cannot look into the kernels."""
    return function.backward(ctx, *g)


def keep(t: Any) -> Any:
    """What can be saved for backward: a copy of what was made in inference mode, on which a head may be trained."""
    return t.clone() if t is not None and t.is_inference() else t


def like(t: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A parameter's gradient, shaped and typed as the parameter."""
    t = t if t.shape == shape else t.reshape(shape)
    return t if t.dtype is dtype else t.to(dtype)


def backward_differentiable(
    ctx: Any,
    pooling: Pooling,
    g: Tensor,
    inputs: tuple[Tensor | None, ...],
    given: tuple[Tensor, Tensor] | None,
    mask: Tensor | None = None,
) -> tuple[Any, ...]:
    """The gradients as a graph of their own, for ``create_graph=True``, and for batched gradients.

    Args:
        inputs: x, gamma, beta and maybe a residual; what was not kept is None.
        mask: see `ops.normalize`.
    """
    _, eps, activation, _, bias_like, *_ = ctx.how
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views cut the outer graph off: where gamma depends on x (or x on gamma) that path is autograd's to count, and
        # hooks on the saved tensors must not run here.
        x, weight, bias, *more = (t if t is None else t.view_as(t) for t in inputs)
        if bias is None and bias_like is not None:
            bias = torch.zeros(bias_like[0], dtype=bias_like[1], device=g.device, requires_grad=True)
        residual = more[0] if more else None
        assert x is not None
        known = None if given is None else read_running(*given, pooling, pooling.open(x))
        y, _ = plain.compose(x, pooling, weight, bias, eps, known, activation, residual, mask)
    leaves = (x, weight, bias, residual)[: len(inputs)]
    needed = ctx.needs_input_grad[: len(inputs)]
    wanted = [t for t, need in zip(leaves, needed, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=create_graph) if wanted else ())
    gradients = [next(found) if need and t is not None else None for t, need in zip(leaves, needed, strict=True)]
    if more and needed[3] and residual is None:  # without an activation it was not kept, and its gradient is y's
        gradients[3] = g if mask is None else torch.where(mask > 0, g, 0)
    return (*gradients, None, None, None, None, None, None)
