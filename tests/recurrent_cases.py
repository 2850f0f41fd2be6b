"""Recurrent layers and sequences for their tests."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

import anynorm

KINDS = ("LSTM", "GRU")
NORMS = {"layer": {}, "batch-per-step": {"max_steps": 4}, "batch-sequence": {}}
LENGTHS = [3, 7, 1, 5]
STEPS, FEATURES, HIDDEN = 7, 3, 4
every_kind = pytest.mark.parametrize("kind", KINDS)
every_norm = pytest.mark.parametrize("norm", NORMS)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(kind: str, norm: str | None = None, seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """A layer whose every parameter is random."""
    layer = getattr(anynorm, kind)(FEATURES, HIDDEN, norm=norm, dtype=dtype, **NORMS.get(norm, {}), **options)
    for number, parameter in enumerate(layer.parameters()):
        with torch.no_grad():
            parameter.copy_(draw(*parameter.shape, seed=100 * seed + number, dtype=dtype) * 0.6)
    return layer
