"""How gradients flow through statistics that are merged with others': of other ranks, or of other micro-batches.

    mean, m2 = merge of every part's (count, mean, m2)            y = (x - mean) / sqrt(m2 / count + eps) * gamma + beta
    dx = rstd * (gamma * g - sum(gamma * g) / count - xhat * sum(gamma * g * xhat) / count)

as for one batch, but that count, mean and m2, and in backward both sums, are over all parts. An `Exchange` brings them
together; the rest is this part's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..pooling import Pooling
from ..sources import Given, Merged, move_running
from ..statistics import Moments
from ..torch_private import is_legacy_batched, not_compiled
from . import addresses, kernels, memory, plain
from .gradients import keep, like
from .merge import backward_uncompiled
from .request import Request
from .watch import is_plain


@not_compiled  # Nothing that waits for others can be part of a graph.
def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, request: Request, pooling: Pooling
) -> Tensor:
    """`paths.normalize` with merged statistics, for norms with one mean for each channel; x may be empty."""
    x, plan = request.source.exchange.take_input(x), None
    if x.numel() and is_plain(x, weight, bias, residual, request.mask, request.source[0], request.source[1]):
        x = kernels.arrange(x)
        plan = kernels.find_plan(x, pooling, 2, request.mask is not None)
    if plan is None:
        return compose(x, weight, bias, residual, request, pooling)
    own = kernels.find_moments(x, pooling, request.mask)
    assert own is not None
    moments = request.source.exchange.merge(own)
    move(request.source, moments, pooling)
    found: Tensor = NormalizeMerged.apply(x, weight, bias, residual, request, plan, moments)
    return found


def move(source: Merged, moments: Moments, pooling: Pooling) -> None:
    """Move running averages by the moments of all parts, of which this one may be empty."""
    if moments.count:
        move_running(source, moments, pooling)


def compose(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, request: Request, pooling: Pooling
) -> Tensor:
    """In differentiable operations, for what the kernels do not serve, and for empty parts."""
    if request.mask is None and not x.numel():
        sizes = [1 if axis == 1 else size for axis, size in enumerate(x.shape)]
        request = request._replace(mask=torch.ones(sizes, dtype=torch.float32, device=x.device))
    y, moments = plain.compose(x, weight, bias, residual, request, pooling)
    move(request.source, moments, pooling)
    return plain.lay_out(y, plain.find_memory_format(x))


class NormalizeMerged(torch.autograd.Function):
    """By the kernels, twice in backward: once as if the statistics were constants, which also gives the sums, and once
    to add what flows through them, an affine function of xhat."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, request: Request, *found: Any) -> Tensor:
        (plan, moments), (source, eps, activation, mask, *_) = found, request
        assert moments.mean is not None
        given = Given(moments.mean.double().flatten(), moments.var.double().flatten())
        y, _ = kernels.forward(x, weight, bias, residual, Request(given, eps, activation, mask), plan)
        behind = (None, None) if activation is None else (bias, keep(residual))
        ctx.save_for_backward(keep(x), weight, *given, *behind, keep(mask))
        ctx.how = plan, eps, moments.count, source.exchange, activation
        ctx.weight_like, ctx.bias_like = memory.find_like(weight), memory.find_like(bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        if torch.compiler.is_compiling():
            return backward_uncompiled(NormalizeMerged, ctx, g)
        if is_legacy_batched(g):
            raise RuntimeError(
                "batch_norm: what is merged over ranks or micro-batches takes one gradient at a time; got a batch of "
                "them; call torch.autograd.grad without is_grads_batched"
            )
        plan, eps, count, exchange, activation = ctx.how
        x, weight, mean, var, bias, residual, mask = ctx.saved_tensors
        memory.check_like("weight", weight, ctx.weight_like)
        memory.check_like("bias", bias, ctx.bias_like)
        x, dtype = memory.arrange("input", x, plan), plan.dtype
        mean, var = addresses.recover_statistics((mean, var), plan)
        if residual is not None:
            residual = memory.arrange("residual", residual, plan)
        if dtype in (torch.bfloat16, torch.float16):  # What is added twice is rounded once.
            x, g, residual = x.float(), g.float(), residual if residual is None else residual.float()
            plan = kernels.find_plan(x, plan.pooling, 2, mask is not None)
        needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        needs = needs_x, True, True, needs_residual
        saved = addresses.Saved(x, weight, bias, residual, mask, (mean, var))
        dx, dgamma, dbeta, dresidual = kernels.backward(g, saved, plan, eps, activation, needs)
        assert dgamma is not None
        assert dbeta is not None
        if needs_x:
            sums = torch.stack([dbeta, dgamma]).double()
            total = exchange.merge_sums(sums if weight is None else sums * weight.double()) / count
            slope = -torch.rsqrt(var + eps)
            added = Request(Given(mean, var), eps, None, mask)
            dx = kernels.forward(x, slope * total[1], slope * total[0], dx, added, plan)[0].to(dtype)
        dweight = like(dgamma, *ctx.weight_like) if needs_weight else None
        dbias = like(dbeta, *ctx.bias_like) if needs_bias else None
        return dx, dweight, dbias, None if dresidual is None else dresidual.to(dtype), None, None, None
