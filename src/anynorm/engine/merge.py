"""How gradients flow from the moments of a whole batch to those of one of its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sources import Exchange
from ..statistics import Moments, at_least_one
from ..torch_private import not_compiled


@not_compiled
def backward_uncompiled(function: Any, ctx: Any, *g: Tensor) -> tuple[Any, ...]:
    """Compiled autograd traces the backward of a norm that ran eagerly; a compiler cannot look into the kernels."""
    found: tuple[Any, ...] = function.backward(ctx, *g)
    return found


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
