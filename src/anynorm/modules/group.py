"""What is remembered: `GroupNorm`; gamma and beta only, so that it does the same in training and evaluation."""

from __future__ import annotations

from typing import Any

import torch.nn as nn

from ..engine.request import Request
from ..functional.group import GROUP_NORM
from ..sources import BATCH
from .norm import Norm


class _GroupNorm(Norm):
    """What torch's subclass and the fused class share."""

    num_groups: int
    eps: float
    weight: Any
    bias: Any

    def normalize(
        self, input: Any, residual: Any = None, activation: Any = None, mask: Any = None, lengths: Any = None
    ) -> Any:
        request = Request(BATCH, self.eps, activation, mask, lengths, self.num_groups)
        return GROUP_NORM.normalize(input, *self.read_affine(), residual, request)


class GroupNorm(_GroupNorm, nn.GroupNorm):
    """`torch.nn.GroupNorm`, exact in float32 at any mean and in channels_last.

    Example:
        >>> anynorm.GroupNorm(2, 4)(torch.tensor([[1.0, 3.0, 5.0, 9.0]])).detach()
        tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """
