"""What is remembered: `RMSNorm`; gamma and beta only, so that it does the same in training and evaluation."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor

from ..engine.request import Request
from ..functional.rms import RMS_NORM, find_rms_eps
from ..padding.masks import Lengths
from ..sources import BATCH
from .layer import _ByFeatures
from .norm import read_entry


class _RMSNorm(_ByFeatures):
    """What torch's subclass and the fused class share."""

    eps: float | None
    weight: Any

    def normalize(
        self, input: Any, residual: Any = None, activation: Any = None, mask: Any = None, lengths: Lengths | None = None
    ) -> Any:
        eps = find_rms_eps(self.eps, input)
        request = Request(BATCH, eps, activation, mask, lengths, self.normalized_shape)
        return RMS_NORM.normalize(input, read_entry(self, self._parameters, "weight"), None, residual, request)


class RMSNorm(_RMSNorm, nn.RMSNorm):
    """`torch.nn.RMSNorm`, that neither overflows nor underflows on the way for inputs up to 1e37.

    Example:
        >>> anynorm.RMSNorm(2)(torch.tensor([3.0, 3.0])).detach()
        tensor([1., 1.])
    """

    def forward(
        self, x: Tensor, mask: Tensor | None = None, lengths: Lengths | None = None
    ) -> Tensor:  # torch calls it x here.
        """Normalize, see `anynorm.LayerNorm.forward`."""
        return super().forward(x, mask, lengths)
