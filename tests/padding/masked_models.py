"""Models and calls that the tests of `anynorm.masked(mask, model=model)` share."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

import anynorm

LENGTHS = [40, 18, 6]


def unsettle(net: nn.Module) -> nn.Module:
    """Biases and averages other than 0, behind which padding is not 0."""
    for layer in net.modules():
        if isinstance(getattr(layer, "running_mean", None), Tensor):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
        if isinstance(getattr(layer, "bias", None), nn.Parameter):
            nn.init.normal_(layer.bias)
    return net.eval()


def run(net: nn.Module, x: Tensor, lengths: list[int], **options: object) -> Tensor:
    with anynorm.masked(anynorm.mask_of(lengths, max(lengths)), model=net, **options):
        return net(x)
