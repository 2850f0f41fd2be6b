"""What the ranks of test_sync.py run; every function is called as function(rank, world, ...)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

import anynorm


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, mean: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + mean).to(dtype)


def make(kind: str, channels: int, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    norm = getattr(anynorm, kind)(channels, dtype=dtype, **options)
    with torch.no_grad():
        for name, tensor in norm.named_parameters():
            tensor.copy_(draw(tensor.shape, dtype, len(name), 0.5))
    return norm


def cut(t: torch.Tensor | None, sizes: list[int], rank: int) -> torch.Tensor | None:
    return None if t is None else t.split(sizes)[rank]


def one_layer(
    rank: int, world: int, kind: str, shape: tuple[int, ...], sizes: list[int], dtype: torch.dtype, how: dict[str, Any]
) -> dict[str, Any]:
    """Forward and backward of a rank's share of a batch."""
    x = draw(shape, dtype, 1, how.get("mean", 3.0))
    g = draw(shape, dtype, 2, 0.0)
    share, gradient = x.split(sizes)[rank].clone(), g.split(sizes)[rank]
    if how.get("channels_last"):
        share = share.to(memory_format=torch.channels_last)
    norm = make(kind, shape[1], how.get("parameters", dtype), **how.get("options", {}))
    given = {name: cut(how.get(name), sizes, rank) for name in ("mask", "lengths", "residual") if name in how}
    share.requires_grad_()
    y = norm(share, **given)
    y.backward(gradient)
    return {
        "y": y.detach(),
        "dx": share.grad,
        "dweight": norm.weight.grad,
        "dbias": norm.bias.grad,
        "state": norm.state_dict(),
        "channels_last": y.is_contiguous(memory_format=torch.channels_last) if y.dim() == 4 else None,
    }
