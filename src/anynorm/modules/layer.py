"""What is remembered: `LayerNorm`; gamma and beta only, so that it does the same in training and evaluation."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor

from ..engine.request import Request
from ..functional.layer import LAYER_NORM
from ..sources import BATCH
from .norm import Norm


class _ByFeatures(Norm):
    """A norm over the last axes."""

    normalized_shape: tuple[int, ...]

    def find_channel_axes(self, input: Tensor) -> tuple[int, ...]:
        """The last axes, over which statistics are taken."""
        return tuple(range(input.dim() - len(self.normalized_shape), input.dim()))


class _LayerNorm(_ByFeatures):
    """What torch's subclass and the fused class share."""

    eps: float
    weight: Any
    bias: Any

    def normalize(
        self, input: Any, residual: Any = None, activation: Any = None, mask: Any = None, lengths: Any = None
    ) -> Any:
        request = Request(BATCH, self.eps, activation, mask, lengths, self.normalized_shape)
        return LAYER_NORM.normalize(input, *self.read_affine(), residual, request)


class LayerNorm(_LayerNorm, nn.LayerNorm):
    """`torch.nn.LayerNorm`, exact in float32 at any mean, and a bias gradient that does not stop at 256 in bfloat16.

    Example:
        >>> anynorm.LayerNorm(2)(torch.tensor([1e6, 1e6 + 2])).detach()
        tensor([-1.0000,  1.0000])
    """
