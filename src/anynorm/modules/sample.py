"""What is remembered: the norms that look at one sample at a time, `LayerNorm`, `RMSNorm` and `GroupNorm`.

They remember gamma and beta only, and do the same in training and evaluation.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor

from ..functional import group_norm, layer_norm, rms_norm
from .state import Norm


class _ByFeatures(Norm):
    normalized_shape: tuple[int, ...]

    def find_channel_axes(self, input: Tensor) -> tuple[int, ...]:
        """The last axes."""
        return tuple(range(input.dim() - len(self.normalized_shape), input.dim()))


class _LayerNorm(_ByFeatures):
    """A mix-in, as the two below, that torch's subclass and the fused class share."""

    eps: float
    weight: Any
    bias: Any

    def normalize(self, input: Tensor, **options: Any) -> Tensor:
        """y = (x - mean) / sqrt(var + eps) * weight + bias, see `anynorm.functional.layer_norm`."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, **options)


class _RMSNorm(_ByFeatures):
    eps: float | None
    weight: Any

    def normalize(self, input: Tensor, **options: Any) -> Tensor:
        """y = x / sqrt(mean(x**2) + eps) * weight, see `anynorm.functional.rms_norm`."""
        return rms_norm(input, self.normalized_shape, self.weight, self.eps, **options)


class _GroupNorm(Norm):
    num_groups: int
    eps: float
    weight: Any
    bias: Any

    def normalize(self, input: Tensor, **options: Any) -> Tensor:
        """y = (x - mean) / sqrt(var + eps) * weight + bias, see `anynorm.functional.group_norm`."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, **options)


class LayerNorm(_LayerNorm, nn.LayerNorm):
    """`torch.nn.LayerNorm`, exact in float32 at any mean, and a bias gradient that does not stop at 256 in bfloat16.

    Example:
        >>> anynorm.LayerNorm(2)(torch.tensor([1e6, 1e6 + 2])).detach()
        tensor([-1.0000,  1.0000])
    """


class RMSNorm(_RMSNorm, nn.RMSNorm):
    """`torch.nn.RMSNorm`, that neither overflows nor underflows on the way for inputs up to 1e37.

    Example:
        >>> anynorm.RMSNorm(2)(torch.tensor([3.0, 3.0])).detach()
        tensor([1., 1.])
    """

    def forward(self, x: Tensor, mask: Tensor | None = None, lengths: Any = None) -> Tensor:  # torch calls it x here.
        """Normalize, see `anynorm.LayerNorm.forward`."""
        return super().forward(x, mask, lengths)


class GroupNorm(_GroupNorm, nn.GroupNorm):
    """`torch.nn.GroupNorm`, exact in float32 at any mean and in channels_last.

    Example:
        >>> anynorm.GroupNorm(2, 4)(torch.tensor([[1.0, 3.0, 5.0, 9.0]])).detach()
        tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """
