"""How compilers see the kernels: two operations of torch.library, with shapes and gradients registered.

torch.compile cannot look into a compiled module, so `paths.compose` puts one of these into the graph where statistics
come from x. Given statistics leave one multiplication, which compilers join with what stands around it. Eager calls
never come here: an operation of torch.library costs more than a small norm.
"""

from __future__ import annotations

from ast import literal_eval
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from ..pooling import Pooling, remember
from ..sources import BATCH
from ..statistics import Moments, count_positions
from ..torch_private import is_legacy_batched
from . import addresses, kernels, plain
from .gradients import backward_differentiable
from .request import Request
from .walks import CODES

LIBRARY = Library("anynorm", "FRAGMENT")
AFTER = "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, str pooling, float eps, str activation"
LIBRARY.define(f"forward(Tensor x, {AFTER}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"backward(Tensor g, Tensor x, Tensor statistics, {AFTER}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)"
)

# Below this many elements a compiler's own loops are faster than the call of an operation.
LEAST = 1 << 15


def write_pooling(pooling: Pooling) -> str:
    """A pooling as text, which means the same in every process that reads a cached graph."""
    return repr((pooling.splits, pooling.pooled, pooling.affine, pooling.samples, pooling.centred, pooling.ghosts))


@remember
def read_pooling(text: str) -> Pooling:
    return Pooling(*literal_eval(text))


def count_pools(x: Tensor, pooling: Pooling) -> Any:
    """How many elements share nothing; a symbol where sizes are."""
    pools = 1
    for axis, size in enumerate(pooling.open(x).shape):
        pools = pools if axis in pooling.pooled else pools * size
    return pools


def serves(x: Tensor) -> bool:
    """Whether a compiler should call the kernels for x."""
    return not kernels.OFF and x.device.type == "cpu" and x.dtype in CODES and x.numel() >= LEAST


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, request: Request, pooling: Pooling
) -> tuple[Tensor, Moments]:
    """One operation in a compiler's graph, and the moments it found."""
    mask = request.mask
    how = write_pooling(pooling), request.eps, request.activation or ""
    y, statistics = torch.ops.anynorm.forward(x, weight, bias, residual, mask, *how)
    view = pooling.open(x)
    shape = [1 if axis in pooling.pooled else size for axis, size in enumerate(view.shape)]
    count: Any = pooling.count(view)
    if mask is not None:
        count = count_positions(pooling.open_mask(mask) > 0, view, pooling, torch.float64)
    if not pooling.centred:
        return y, Moments(count, None, statistics.view(shape))
    return y, Moments(count, statistics[0].view(shape), statistics[1].view(shape))


def forward_cpu(x: Tensor, weight: Any, bias: Any, residual: Any, mask: Any, *how: Any) -> tuple[Tensor, Tensor]:
    text, eps, activation = how
    mask = mask if mask is None else mask.contiguous()
    pooling, request = read_pooling(text), Request(BATCH, eps, activation or None, mask)
    memory_format = plain.find_memory_format(x)
    x, plan = kernels.arrange_for(x, pooling, masked=mask is not None)
    if plan is not None:
        y, statistics = kernels.forward(x, weight, bias, residual, request, plan, keep=True)
        assert isinstance(statistics, Tensor)
        return y.contiguous(memory_format=memory_format), statistics.view(2 if pooling.centred else 1, -1)
    y, moments = plain.compose(x, weight, bias, residual, request, pooling)
    parts = [t.double().flatten() for t in (moments.mean, moments.m2) if t is not None]
    return torch.empty_like(x).copy_(y), torch.stack(parts)


def backward_cpu(g: Tensor, x: Tensor, statistics: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weight, bias, residual, mask, text, eps, activation, needs = rest
    memory_format = plain.find_memory_format(x)
    mask = mask if mask is None else mask.contiguous()
    pooling = read_pooling(text)
    x, plan = kernels.arrange_for(x, pooling, masked=mask is not None)
    inputs = (x, weight, bias, residual)
    found: tuple[Tensor | None, ...]
    if plan is not None:
        saved = addresses.Saved(x, weight, bias, residual, mask, statistics)
        dx, dgamma, dbeta, dresidual = kernels.backward(g, saved, plan, eps, activation or None, needs)
        dx, dresidual = (t if t is None else t.contiguous(memory_format=memory_format) for t in (dx, dresidual))
        found = dx, dgamma, dbeta, dresidual
    else:
        outer = SimpleNamespace(needs_input_grad=needs)
        leaves = tuple(t if t is None else t.detach().requires_grad_() for t in inputs)
        found = backward_differentiable(
            outer, g, leaves, Request(BATCH, eps, activation or None, mask), pooling, bias_like=None
        )
    return tuple(
        x.new_empty(0) if f is None else f.reshape(t.shape).to(t.dtype) for f, t in zip(found, inputs, strict=True)
    )


LIBRARY.impl("forward", forward_cpu, "CPU")
LIBRARY.impl("backward", backward_cpu, "CPU")


def empty_output(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=plain.find_memory_format(x))


def describe_forward(x: Tensor, weight: Any, bias: Any, residual: Any, mask: Any, *how: Any) -> Any:
    pooling = read_pooling(how[0])
    rows = 2 if pooling.centred else 1
    return empty_output(x), x.new_empty((rows, count_pools(x, pooling)), dtype=torch.float64)


def describe_backward(g: Tensor, x: Tensor, _: Any, weight: Any, bias: Any, residual: Any, *rest: Any) -> Any:
    needs = rest[-1]
    found = [empty_output(x) if needs[0] else x.new_empty(0)]
    for t, need in zip((weight, bias), needs[1:3], strict=True):
        found.append(t.new_empty(t.shape) if need else x.new_empty(0))
    found.append(empty_output(x) if needs[3] else x.new_empty(0))
    return tuple(found)


# Kernels of the meta device would be found faster at import, but compiled autograd refuses them real tensors.
register_fake("anynorm::forward", describe_forward)
register_fake("anynorm::backward", describe_backward)


def keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.how = inputs[5:]
    ctx.mark_non_differentiable(output[1])


def differentiate(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
    x, weight, bias, residual, mask, statistics = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    text, eps, activation = ctx.how
    nothing = (None,) * (1 + len(ctx.how))
    if not torch.compiler.is_compiling() and (
        torch.is_grad_enabled()
        or is_legacy_batched(g)
        # Inside an operation autograd records nothing, so a formula cannot be differentiated there.
        or kernels.arrange_for(x, read_pooling(text), masked=mask is not None)[1] is None
    ):
        outer = SimpleNamespace(needs_input_grad=needs)
        request = Request(BATCH, eps, activation or None, mask)
        inputs = (x, weight, bias, residual)
        return *backward_differentiable(outer, g, inputs, request, read_pooling(text), bias_like=None), *nothing
    found = torch.ops.anynorm.backward(g, x, statistics, weight, bias, residual, mask, *ctx.how, needs)
    return (*(f if need else None for f, need in zip(found, needs, strict=True)), *nothing)


register_autograd("anynorm::forward", differentiate, setup_context=keep, lib=LIBRARY)
