"""How gradients flow through what the kernels compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..pooling import Pooling
from ..sources import BATCH, Given
from ..torch_private import is_legacy_batched
from . import kernels, memory, plain, transforms
from .addresses import Saved
from .merge import backward_uncompiled
from .request import Request
from .walks import Plan
from .watch import is_plain


class Normalize(torch.autograd.Function):
    """By the kernels. Keeps x, the statistics and, behind an activation, beta and the residual, and nothing else.

    x is not kept where statistics are given, no gradient of gamma or beta is wanted, and no activation follows: frozen
    norms let the memory of their input go.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, request: Request, plan: Plan) -> Tensor:
        if kernels.READS_TENSORS:
            found: Tensor | None = kernels.compiled.forward_saving(ctx, x, weight, bias, residual, request, plan)
            if found is not None:
                return found
        y, statistics = kernels.forward(x, weight, bias, residual, request, plan, keep=True)
        source, eps, activation, mask, _, _ = request
        is_given = type(source) is Given
        known: Any = statistics if is_given else (statistics,)
        # Beta may change before backward, as in torch, and without an activation the residual need not be kept.
        behind = (None, None) if activation is None else (bias, residual)
        is_linear = is_given and activation is None and not any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(None if is_linear else keep(x), weight, behind[0], keep(behind[1]), keep(mask), *known)
        ctx.how = plan, eps, activation, is_given, memory.find_like(weight), memory.find_like(bias)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        if torch.compiler.is_compiling():
            return backward_uncompiled(Normalize, ctx, g)
        saved = ctx.saved_tensors  # once: hooks may run
        if kernels.READS_TENSORS:
            found: tuple[Any, ...] | None = kernels.compiled.backward_tensors(g, saved, ctx.how, ctx.needs_input_grad)
            if found is not None:
                return found
        return backward_checked(ctx, g, saved)


def backward_checked(ctx: Any, g: Tensor, saved: tuple[Any, ...]) -> tuple[Any, ...]:
    """What `Normalize.backward` does where the compiled call was not sure of something."""
    plan, eps, activation, is_given, weight_like, bias_like = ctx.how
    x, weight, bias, residual, mask, *known = saved
    memory.check_like("weight", weight, weight_like)
    memory.check_like("bias", bias, bias_like)
    if x is None:
        return backward_linear(ctx, g, weight, known, mask)
    if torch.is_grad_enabled() or not is_plain(g) or is_legacy_batched(g):
        for name, t in (("input", x), ("residual", residual)):
            memory.check_like(name, t, (plan.sizes, plan.dtype))
        request = Request(Given(*known) if is_given else BATCH, eps, activation, mask)
        inputs = x, weight, bias, residual
        return *backward_differentiable(ctx, g, inputs, request, plan.pooling, bias_like=bias_like), None, None
    needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
    dresidual = None
    if needs_residual and activation is None and mask is None:
        dresidual, needs_residual = g, False
    needs = needs_x, needs_weight, needs_bias, needs_residual
    kept = Saved(x, weight, bias, residual, mask, tuple(known) if is_given else known[0])
    dx, dweight, dbias, found = kernels.backward(g, kept, plan, eps, activation, needs)
    if dweight is not None:
        dweight = like(dweight, *weight_like)
    if dbias is not None:
        dbias = like(dbias, *bias_like)
    return dx, dweight, dbias, dresidual if found is None else found, None, None


def backward_linear(ctx: Any, g: Tensor, weight: Any, known: list[Tensor], mask: Any) -> tuple[Any, ...]:
    """The gradients where y is linear in x: dx is the norm of g by mean 0, without beta, to any derivative."""
    from .paths import normalize  # which imports this file

    plan, eps, *_ = ctx.how
    source = Given(torch.zeros_like(known[0]), known[1])
    dx = dresidual = None
    if ctx.needs_input_grad[0]:
        dx = normalize(g, weight, None, None, Request(source, eps, None, mask), plan.pooling)
    if ctx.needs_input_grad[3]:
        dresidual = g if mask is None else torch.where(mask > 0, g, 0)
    return dx, None, None, dresidual, None, None


# What Normalize.apply does once it has found that no transform is active, which `find_key` and `is_plain` know.
apply: Callable[..., Tensor] = super(torch.autograd.Function, Normalize).apply


def keep(t: Any) -> Any:
    """What can be saved for backward: a copy of what was made in inference mode, on which a head may be trained."""
    return t.clone() if t is not None and t.is_inference() else t


def like(t: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A parameter's gradient, shaped and typed as the parameter."""
    t = t if t.shape == shape else t.reshape(shape)
    return t if t.dtype is dtype else t.to(dtype)


def backward_differentiable(
    ctx: Any,
    g: Tensor,
    inputs: tuple[Tensor | None, ...],
    request: Request,
    pooling: Pooling,
    *,
    bias_like: memory.Like | None,
) -> tuple[Any, ...]:
    """The gradients of `inputs` as a graph of their own, for ``create_graph=True``, and for batched gradients.

    Args:
        ctx: of the autograd function.
        inputs: x, gamma, beta and maybe a residual; what was not kept is None.
        request: its source is `BATCH`, or holds the statistics that were given.
        bias_like: shape and dtype of beta, which need not have been kept.
    """
    mask = request.mask
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views cut the outer graph off: where gamma depends on x (or x on gamma) that path is autograd's to count, and
        # hooks on the saved tensors must not run here.
        x, weight, bias, *more = (t if t is None else t.view_as(t) for t in inputs)
        if bias is None and bias_like is not None:
            bias = torch.zeros(bias_like[0], dtype=bias_like[1], device=g.device, requires_grad=True)
        residual = more[0] if more else None
        assert x is not None
        if create_graph and request.source is BATCH and mask is None and transforms.serves_twice(x, g, pooling):
            y = transforms.normalize(x, weight, bias, residual, request, pooling)
        else:
            y, _ = plain.compose(x, weight, bias, residual, request, pooling)
    leaves = (x, weight, bias, residual)[: len(inputs)]
    needed = ctx.needs_input_grad[: len(inputs)]
    wanted = [t for t, need in zip(leaves, needed, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=create_graph) if wanted else ())
    gradients = [next(found) if need and t is not None else None for t, need in zip(leaves, needed, strict=True)]
    if more and needed[3] and residual is None:  # without an activation it was not kept, and its gradient is y's
        gradients[3] = g if mask is None else torch.where(mask > 0, g, 0)
    return tuple(gradients)
