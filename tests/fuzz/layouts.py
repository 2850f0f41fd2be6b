"""How a tensor lies in memory: the same values in every layout that users hand over."""

from __future__ import annotations

import numpy as np
import torch

from fuzz.families import Family

LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "sliced channels", "expanded")


def lay_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """t with its axes in another order of memory, or with gaps between its elements."""
    if layout == "channels_last":
        last = t.movedim(1, -1).contiguous()
        return last.flatten().view(last.shape).movedim(-1, 1)  # one position: strides that tell it from contiguous
    if layout == "transposed":
        return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    if layout == "strided":
        room = torch.full([2 * size for size in t.shape], float("nan"), dtype=t.dtype)
        return room[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)
    if layout == "sliced channels":  # as chunk and split leave it
        room = torch.full((t.shape[0], *t.shape[2:], 2 * t.shape[1]), float("nan"), dtype=t.dtype).movedim(-1, 1)
        return room[:, : t.shape[1]].copy_(t)
    if layout == "expanded":  # every sample is the first
        return t[:1].clone().expand(t.shape)
    return t.contiguous()


def draw(family: Family, seed: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "") -> torch.Tensor:
    """Values of a family in a dtype, the finite ones kept within its range, in a layout."""
    values, limit = family(np.random.default_rng(seed), shape), torch.finfo(dtype).max / 4
    values = np.where(np.isfinite(values), np.clip(values, -limit, limit), values)
    return lay_out(torch.from_numpy(values).to(dtype), layout)
