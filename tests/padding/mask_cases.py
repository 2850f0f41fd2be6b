"""Inputs and masks that the tests of masks share, and what the reference makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

import anynorm
from specimens import SPECIMENS, Specimen

POSITIONED = [s for s in SPECIMENS if s.scheme not in ("batch", "group", "instance") or s.spatial]


def find_positions(specimen: Specimen) -> tuple[int, ...]:
    """The shape of a mask."""
    if specimen.scheme in ("layer", "rms"):
        return (specimen.shape[0], 3)
    return (specimen.shape[0], *specimen.spatial)


def draw_mask(positions: tuple[int, ...], form: str) -> tuple[Tensor, dict[str, object]]:
    """Which positions are real, and the arguments that say so to a call."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([positions[-1], 2, 1, positions[-1] - 1, 2])[: positions[0]]
    shape = (positions[0],) + (1,) * (len(positions) - 2) + (positions[-1],)
    mask = (torch.arange(positions[-1]) < lengths[:, None]).view(shape).expand(positions)
    if form == "holes":
        mask = torch.rand(positions, generator=generator) < 0.6
        mask[:, ..., 0] = True
    if form == "shared by samples":
        shared = (torch.rand((1, *positions[1:]), generator=generator) < 0.6).bool()
        shared[..., 0] = True
        return shared.expand(positions), {"mask": shared}
    if form == "empty sample":
        mask = mask.clone()
        mask[1] = False
    if form == "lengths":
        return mask, {"lengths": lengths}
    arguments = {"whole numbers": mask.long(), "floats": mask.double()}.get(form, mask)
    return mask, {"mask": arguments}


def draw(specimen: Specimen, layout: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    if specimen.scheme in ("layer", "rms"):
        generator = torch.Generator().manual_seed(seed)
        shape = (specimen.shape[0], 3, *specimen.shape[1:])
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) + 3
        return x.mT.contiguous().mT if layout == "channels_last" else x
    return specimen.draw(layout, dtype, seed)


def spoil(t: Tensor, mask: Tensor, specimen: Specimen) -> Tensor:
    """NaN and Inf at padding, in the layout of t."""
    axes = specimen.scheme in ("layer", "rms")
    spread = mask[(...,) + (None,) * (t.dim() - mask.dim())] if axes else mask.unsqueeze(1)
    spoiled = t.detach().clone(memory_format=torch.preserve_format)
    spoiled.masked_fill_(~spread, float("nan"))
    return spoiled.masked_fill_(~spread & (torch.rand(mask.shape) < 0.3).view(spread.shape), float("inf"))


NORMS = {
    "batch": lambda c: anynorm.BatchNorm1d(c),
    "instance": lambda c: anynorm.InstanceNorm1d(c, affine=True),
    "group": lambda c: anynorm.GroupNorm(2, c),
    "layer": lambda c: anynorm.LayerNorm(c),
    "rms": lambda c: anynorm.RMSNorm(c),
}


LENGTHS = [5, 1, 4]


def sequences(c: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, c, generator=generator) for length in LENGTHS]
