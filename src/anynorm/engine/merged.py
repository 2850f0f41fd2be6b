"""How gradients flow through statistics that are merged with others': of other ranks, or of other micro-batches.

    mean, m2 = merge of every part's (count, mean, m2)            y = (x - mean) / sqrt(m2 / count + eps) * gamma + beta
    dx = rstd * (gamma * g - sum(gamma * g) / count - xhat * sum(gamma * g * xhat) / count)

as for one batch, but that count, mean and m2, and in backward both sums, are over all parts. An `Exchange` brings them
together; the rest is this part's own.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ..pooling import Pooling
from ..sources import move_running
from ..statistics import Moments, at_least_one, find_moments
from . import kernels, memory, plain
from . import paths as ops
from .gradients import Recipe, Running, backward_uncompiled, keep, like
from .watch import is_plain


class Exchange(Protocol):
    """Brings together what the parts of a batch have, one call of a norm."""

    def merge(self, moments: Moments) -> Moments:
        """The moments of all parts; every part gets the same."""
        ...

    def merge_sums(self, sums: Tensor) -> Tensor:
        """The sums over all parts, in backward, of gamma * g and of gamma * g * xhat.

        Args:
            sums: (2, C), this part's, with the xhat of the merged moments; shape, dtype and device of the result.
        """
        ...


def normalize(
    x: Tensor,
    pooling: Pooling,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    exchange: Exchange,
    activation: str | None = None,
    residual: Tensor | None = None,
    running: Running | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`ops.normalize` with merged statistics, for norms with one mean for each channel; x may be empty."""
    if x.numel() and is_plain(x, weight, bias, residual, mask, *(running or ())[:2]):
        x = kernels.arrange(x)
        walk = kernels.find_walk(x, pooling, 2, mask is not None)
        if walk is not None:
            moments = exchange.merge(ops.find_moments(x, pooling, mask))
            move(running, moments, pooling)
            recipe = pooling, walk
            return NormalizeMerged.apply(x, weight, bias, residual, recipe, eps, moments, exchange, activation, mask)
    y, moments = compose(x, pooling, weight, bias, eps, exchange, activation, residual, mask)
    move(running, moments, pooling)
    return y


def move(running: Running | None, moments: Moments, pooling: Pooling) -> None:
    """Move running averages by the moments of all parts, of which this one may be empty."""
    if running is not None and moments.count:
        move_running(running, moments, pooling, moments.m2)


def compose(
    x: Tensor,
    pooling: Pooling,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    exchange: Exchange,
    activation: str | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Moments]:
    """In differentiable operations, for what the kernels do not serve, and for empty parts."""
    if mask is None and not x.numel():
        mask = torch.ones(
            [1 if axis == 1 else size for axis, size in enumerate(x.shape)], dtype=torch.float32, device=x.device
        )
    wide, counted = plain.widen(x, pooling, mask)
    own = find_moments(wide, pooling, wide.dtype == x.dtype, counted)
    mean, m2, count = Merge.apply(own.mean, own.m2, own.count, eps, exchange)
    moments = Moments(count, mean, m2)
    y = plain.compose_from(moments, wide, counted, x, pooling, weight, bias, eps, activation, residual)
    return plain.lay_out(y, plain.find_memory_format(x)), moments


class Merge(torch.autograd.Function):
    """Own mean and m2 to those of all parts.

    d mean / d own mean = own count / count
    d m2 / d own m2 = 1,  d m2 / d own mean = 2 * own count * (own mean - mean)

    Parts that the kernels serve know sums and not gradients, so sums are what travels:

    g_mean = -rstd * sum(gamma * g),  g_m2 = -rstd**2 / (2 * count) * sum(gamma * g * xhat)
    """

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, m2: Tensor, count: Any, eps: float, exchange: Exchange
    ) -> tuple[Tensor, Tensor, Any]:
        merged = exchange.merge(Moments(count, mean, m2))
        assert merged.mean is not None
        ctx.share, ctx.exchange = count / at_least_one(merged.count), exchange
        rstd = merged.rstd(eps)
        slopes = -rstd, -rstd.square() / (2 * at_least_one(merged.count))
        ctx.save_for_backward(count * (mean - merged.mean), torch.stack([t.flatten() for t in slopes]))
        return merged.mean.to(mean), merged.m2.to(mean), merged.count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_mean: Tensor, g_m2: Tensor, *_: Any) -> tuple[Any, ...]:
        if torch.compiler.is_compiling():
            return backward_uncompiled(Merge, ctx, g_mean, g_m2)
        offset, slopes = ctx.saved_tensors
        sums = ctx.exchange.merge_sums(torch.stack([g_mean.flatten(), g_m2.flatten()]) / slopes)
        g_mean, g_m2 = (total.view_as(g_mean) for total in (sums * slopes).to(g_mean))
        return g_mean * ctx.share + g_m2 * 2 * offset, g_m2, None, None, None


class NormalizeMerged(torch.autograd.Function):
    """By the kernels, twice in backward: once as if the statistics were constants, which also gives the sums, and once
    to add what flows through them, an affine function of xhat."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, recipe: Recipe, eps: float, *rest: Any
    ) -> Tensor:
        moments, exchange, activation, mask = rest
        statistics = moments.mean.double().flatten(), moments.var.double().flatten()
        y = kernels.forward(x, recipe[1], weight, bias, eps, statistics, activation, residual, None, mask)
        behind = (None, None) if activation is None else (bias, keep(residual))
        ctx.save_for_backward(keep(x), weight, *statistics, *behind, keep(mask))
        ctx.how = recipe, eps, moments.count, exchange, activation, memory.find_like(weight), memory.find_like(bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        if torch.compiler.is_compiling():
            return backward_uncompiled(NormalizeMerged, ctx, g)
        if is_legacy_batchedtensor(g):
            raise RuntimeError(
                "batch_norm: what is merged over ranks or micro-batches takes one gradient at a time; got a batch of "
                "them; call torch.autograd.grad without is_grads_batched"
            )
        (pooling, walk), eps, count, exchange, activation, weight_like, bias_like = ctx.how
        x, weight, mean, var, bias, residual, mask = ctx.saved_tensors
        memory.check_like("weight", weight, weight_like)
        memory.check_like("bias", bias, bias_like)
        x, dtype = memory.arrange("input", x, walk), walk.dtype
        mean, var = kernels.recover_statistics((mean, var), walk)
        if residual is not None:
            residual = memory.arrange("residual", residual, walk)
        if dtype in (torch.bfloat16, torch.float16):  # What is added twice is rounded once.
            x, g, residual = x.float(), g.float(), residual if residual is None else residual.float()
            walk = kernels.find_walk(x, pooling, 2, mask is not None)
        needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        needs = needs_x, True, True, needs_residual
        dx, dgamma, dbeta, dresidual = kernels.backward(
            g, x, walk, weight, bias, (mean, var), eps, needs, activation, residual, mask
        )
        assert dgamma is not None
        assert dbeta is not None
        if needs_x:
            sums = torch.stack([dbeta, dgamma]).double()
            total = exchange.merge_sums(sums if weight is None else sums * weight.double()) / count
            slope = -torch.rsqrt(var + eps)
            dx = kernels.forward(
                x, walk, slope * total[1], slope * total[0], eps, (mean, var), residual=dx, mask=mask
            ).to(dtype)
        dweight = like(dgamma, *weight_like) if needs_weight else None
        dbias = like(dbeta, *bias_like) if needs_bias else None
        return dx, dweight, dbias, None if dresidual is None else dresidual.to(dtype), *(None,) * 6
