"""Layers that run inside a masked context and take no mask: which compute on the padding as well?

Norms of torch's that count the padding are refused. The others are named at the end of the context.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor

from ..torch_private import NormBase
from .layers import NORMS, has_mask_argument
from .parts import ModelParts
from .registry import MaskRegistry


class UnmaskedLayers:
    """The layers of a model that ran and took no mask, though their input has padding.

    Attributes:
        kinds: the name of each layer's class, by the layer's name in the model.
    """

    parts: ModelParts
    masks: MaskRegistry

    def __init__(self, parts: ModelParts) -> None:
        self.parts, self.masks = parts, parts.masks
        self.kinds: dict[str, str] = {}

    def add(self, layer: nn.Module) -> None:
        """Remember a layer, to be named when the context ends."""
        self.kinds[self.parts.get_name(layer)] = type(layer).__name__

    def check_norm(self, norm: Any, x: Tensor) -> None:
        """Refuse or note a norm of torch's, or a subclass of one, that is called and takes no mask.

        Raises:
            ValueError: a norm of torch's that counts the padding.
        """
        by_features = isinstance(norm, (nn.LayerNorm, nn.RMSNorm))
        channels = tuple(range(x.dim() - len(norm.normalized_shape), x.dim())) if by_features else (1,)
        if x.dim() - len(channels) < 2:
            return self.add_if_over_positions(norm, x)
        if self.parts.is_unpadded(norm):
            return
        sizes = tuple(size for axis, size in enumerate(x.shape) if axis not in channels)
        if by_features:
            if self.masks.fits(sizes) or self.masks.fits((*sizes[1::-1], *sizes[2:])):
                return  # one position at a time, samples first or second
        elif counts_padding(norm) and self.parts.find_mask(norm, sizes, x) is not None and is_torchs_own(norm):
            raise ValueError(self.explain_refusal(norm))
        self.add(norm)

    def add_if_over_positions(self, norm: nn.Module, x: Tensor) -> None:
        """Note a layer norm over features and positions together, which counts the padding."""
        layouts = [(x.shape[0], *x.shape[2:]), tuple(x.shape[:-1])]
        if x.dim() > 2 and not self.parts.is_unpadded(norm) and any(self.masks.has_padding(one) for one in layouts):
            self.add(norm)

    def add_if_on_padding(self, layer: Any, action: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Note attention without the padding, and layers of the user's with the name of one that has windows."""
        inputs = [one for one in (*args, *named.values()) if isinstance(one, Tensor) and not one.is_nested]
        if not inputs or inputs[0].dim() < 3 or self.parts.is_unpadded(layer):
            return
        if action == "attention":
            keys = inputs[min(1, len(inputs) - 1)]
            attention = getattr(layer, "self_attn", layer)
            sizes = tuple(keys.shape[:2]) if attention.batch_first else (keys.shape[1], keys.shape[0])
            has_mask = has_mask_argument(layer, args, named)
        else:
            # A second tensor may be the mask: nothing is known of the user's own layers.
            sizes, has_mask = (inputs[0].shape[0], *inputs[0].shape[2:]), len(inputs) > 1
        if not has_mask and self.masks.has_padding(sizes):
            self.add(layer)

    def explain_refusal(self, norm: nn.Module) -> str:
        """The message that names all norms of the model that would count the padding, with the repair for this one."""
        refused = [
            f"{name or 'the model'} ({type(module).__name__})"
            for module, name in self.parts.names.items()
            if isinstance(module, NORMS) and is_torchs_own(module) and counts_padding(module)
        ]
        repair = "anynorm.sync(model)" if isinstance(norm, nn.SyncBatchNorm) else "anynorm.accelerate(model)"
        return (
            f"masked: a norm of torch's cannot be told which positions are real and would count the padding; got "
            f"{list_first(refused)}; call {repair} before"
        )


def list_first(names: list[str]) -> str:
    """The first eight names in one string, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def counts_padding(norm: Any) -> bool:
    """Whether padding enters what a norm computes for real positions; layer and RMS norm see one position at a time."""
    if isinstance(norm, NormBase):
        return norm.training or norm.running_mean is None
    return isinstance(norm, nn.GroupNorm)


def is_torchs_own(layer: nn.Module) -> bool:
    """Whether a layer's class is torch's own."""
    return type(layer).__module__.startswith("torch.nn.modules.")
