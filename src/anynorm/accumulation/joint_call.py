"""One call of a norm on all micro-batches as one batch: their inputs are joined, the output is split again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engine.plain import find_memory_format, lay_out
from ..padding.masks import find_mask
from ..padding.ragged import close_rows, is_ragged, open_residual, open_rows
from .checks import make_inner_gradient_error


class LossPhase:
    """Whether losses are still being computed. Not a context variable: backward may run in torch's own threads."""

    is_in_loss = True


def normalize_jointly(layer: Any, given: list[Any], phase: LossPhase) -> list[Any]:
    """The layer's outputs for all micro-batches as one batch.

    Args:
        given: input, residual and request of each.
        phase: of the loss, for backward.
    """
    inputs, residuals, requests = zip(*given, strict=True)
    ragged = [is_ragged(x) for x in inputs]
    tensors = [open_rows("batch_norm", x) if rows else x for x, rows in zip(inputs, ragged, strict=True)]
    added = [
        open_residual("batch_norm", x, residual) if rows else residual
        for x, rows, residual in zip(inputs, ragged, residuals, strict=True)
    ]
    # Samples of one shape are joined as they are, which keeps the kernels' memory formats; others as rows of positions.
    as_rows = any(ragged) or len({x.shape[1:] for x in tensors}) > 1

    def join(parts: list[Any]) -> Tensor | None:
        if parts[0] is None:
            return None
        return torch.cat([to_rows(t, layer) for t in parts] if as_rows else parts)

    mask = join(find_masks(inputs, tensors, requests))
    mask = mask if mask is None else mask.squeeze(1)
    y = layer.normalize(join(tensors), join(added), requests[0].activation, mask)
    sizes = [x.numel() // x.shape[1] if as_rows else len(x) for x in tensors]
    outputs = Split.apply(y, sizes, phase)
    if as_rows:
        outputs = [from_rows(t, x) for t, x in zip(outputs, tensors, strict=True)]
    return [close_rows(y, x) if rows else y for y, x, rows in zip(outputs, inputs, ragged, strict=True)]


def find_masks(inputs: Any, tensors: list[Tensor], requests: Any) -> list[Tensor | None]:
    """The mask of each micro-batch; where one has a mask, full ones for those that have none."""
    masks = [
        find_mask("batch_norm", x, (1,), request.mask, request.lengths)
        for x, request in zip(inputs, requests, strict=True)
    ]
    if all(mask is None for mask in masks):
        return masks
    return [make_full_mask(x) if mask is None else mask for x, mask in zip(tensors, masks, strict=True)]


def make_full_mask(x: Tensor) -> Tensor:
    """A mask as `find_mask` makes it, of nothing but real positions."""
    sizes = [1 if axis == 1 else size for axis, size in enumerate(x.shape)]
    return torch.ones(sizes, dtype=torch.float32, device=x.device)


def to_rows(t: Tensor, layer: Any) -> Tensor:
    """t as rows (positions, C), with as many axes of size 1 behind as the layer checks for."""
    rows = t.movedim(1, -1).reshape(-1, t.shape[1])
    axes = getattr(layer, "_axes", (2,))
    return rows.reshape(*rows.shape, *[1] * (axes[0] - 2))


def from_rows(rows: Tensor, x: Tensor) -> Tensor:
    """What `to_rows` made of a tensor like x, in the shape and memory format of x."""
    y = rows.reshape(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    return lay_out(y, find_memory_format(x))


class Split(torch.autograd.Function):
    """Parts of a tensor that nobody else holds, which share its memory and may be changed in place.

    As views of it they could not: an activation in place behind a norm would be refused, or copied for each part.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, sizes: list[int], phase: LossPhase) -> tuple[Tensor, ...]:
        ctx.phase, ctx.sizes, ctx.like = phase, sizes, y.shape[1:]
        parts, start = [], y.storage_offset()
        for size in sizes:
            shape = (size, *y.shape[1:])
            parts.append(y.new_empty(0).set_(y.untyped_storage(), start, shape, y.stride()))
            start += size * y.stride(0)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        if ctx.phase.is_in_loss:
            raise make_inner_gradient_error()
        # A micro-batch that no loss depends on has gradient 0, and the norm needs it: it is one batch.
        present = next(g for g in gradients if g is not None)
        filled = [
            present.new_zeros(size, *ctx.like) if g is None else g for g, size in zip(gradients, ctx.sizes, strict=True)
        ]
        return torch.cat(filled), None, None
