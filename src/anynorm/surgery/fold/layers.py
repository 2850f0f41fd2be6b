"""The algebra: how a convolution or linear layer takes over a norm behind it or before it, in float64.

behind:  scale * (W x + b) + shift = (scale W) x + (scale b + shift)
before:  W (scale x + shift) + b   = (W scale) x + (W shift + b)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ...errors import FLOATS

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
LAYERS = (*CONVOLUTIONS, nn.Linear)
Layer = Any  # one of these


def is_layer(module: nn.Module) -> bool:
    """Whether a module computes what one of torch's convolutions or linear layers does, by torch's own code."""
    base = find_base(module)
    if base is None:
        return False
    return all(getattr(type(module), name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward"))


def find_base(module: nn.Module) -> type[nn.Module] | None:
    """torch's class of a layer."""
    return next((base for base in LAYERS if isinstance(module, base)), None)


def count_dims(layer: nn.Module) -> int:
    """How many axes of positions a convolution has; 0 for a linear layer."""
    return len(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else 0


def count_channels(layer: Layer, side: str) -> int:
    """Channels of a layer's input or output."""
    kind = "features" if isinstance(layer, nn.Linear) else "channels"
    return int(getattr(layer, f"{'in' if side == 'input' else 'out'}_{kind}"))


def find_border_obstacle(layer: Layer) -> str:
    """Why a shift of the input is no shift of the output everywhere, or ""."""
    if isinstance(layer, nn.Linear):
        return ""
    one = (1,) * len(layer.kernel_size)
    if isinstance(layer, TRANSPOSED):
        alone = layer.kernel_size == one and layer.stride == one
        plain = alone and not any(layer.padding) and not any(layer.output_padding)
        return (
            "" if plain else "a transposed convolution makes one shift different sums, at borders and between strides"
        )
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return ""
    padded = layer.kernel_size != one if layer.padding == "same" else any(layer.padding)
    return "its padding is zeros, which the norm's shift does not reach" if padded else ""


@dataclass(frozen=True, eq=False)
class Weights:
    """A layer's weight and bias on the way to new ones: float64."""

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(layer: Layer) -> Weights:
        """As they are."""
        bias = layer.bias
        return Weights(layer.weight.detach().double(), None if bias is None else bias.detach().double())

    def fold_output(self, layer: Layer, scale: Tensor, shift: Tensor) -> Weights:
        """With what stands behind the layer; one number for each of its output channels."""
        weight, bias = self.weight, self.bias
        if isinstance(layer, TRANSPOSED):
            groups = layer.groups
            split = weight.unflatten(0, (groups, -1))
            factors = scale.view(groups, 1, -1, *(1,) * (weight.dim() - 2))
            folded = (split * factors).flatten(0, 1)
        else:
            folded = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
        return Weights(folded, shift if bias is None else bias * scale + shift)

    def fold_input(self, layer: Layer, scale: Tensor, shift: Tensor) -> Weights:
        """With what stands before the layer; one number for each of its input channels."""
        weight, bias = self.weight, self.bias
        ones = (1,) * (weight.dim() - 2)
        if isinstance(layer, TRANSPOSED):
            factors, shifts = scale.view(-1, 1, *ones), shift.view(-1, 1, *ones)
            added = (weight * shifts).unflatten(0, (layer.groups, -1)).sum(1).flatten(2).sum(2).flatten()
        else:
            groups = getattr(layer, "groups", 1)
            each = weight.shape[0] // groups
            factors, shifts = (
                t.view(groups, 1, -1).expand(-1, each, -1).reshape(*weight.shape[:2], *ones) for t in (scale, shift)
            )
            added = (weight * shifts).flatten(1).sum(1)
        if bias is None and not bool(shift.any()):
            return Weights(weight * factors, None)
        return Weights(weight * factors, added if bias is None else bias + added)


def round_weights(layer: Layer, weights: Weights) -> dict[str, nn.Parameter] | None:
    """The new parameters, in the layer's dtype and memory format; None where they would not be finite there."""
    made = {}
    for name, value in (("weight", weights.weight), ("bias", weights.bias)):
        if value is None:
            continue
        old = getattr(layer, name)
        like = layer.weight if old is None else old
        new = torch.empty_like(like) if value.shape == like.shape else value.new_empty(value.shape, dtype=like.dtype)
        new = new.detach().copy_(value)
        if not bool(new.isfinite().all()):
            return None
        made[name] = nn.Parameter(new, requires_grad=like.requires_grad)
    return made


def find_tensor_obstacle(layer: Layer, norm: Tensor, dtype: torch.dtype) -> str:
    """Why a layer's tensors cannot be computed anew beside a norm's tensor, whose own dtype is given, or ""."""
    for name in ("weight", "bias"):
        tensor: Any = getattr(layer, name, None)
        if tensor is None and name == "bias":
            continue
        if type(layer._parameters.get(name)) is not nn.Parameter:
            return f"its {name} is no plain parameter of its own"
        if tensor.is_meta or tensor.dtype not in FLOATS:
            return f"its {name} holds no real numbers"
        if tensor.dtype != dtype and dtype != torch.float32:
            return f"its {name} is of {tensor.dtype}, the norm of {dtype}"
        if tensor.device != norm.device:
            return f"it is on {tensor.device}, the norm on {norm.device}"
        if not bool(tensor.isfinite().all()):
            return f"its {name} is not finite"
    return ""
