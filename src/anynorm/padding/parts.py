"""The layers of a model by name, and the part of the model, with masks of its own, that each belongs to."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch.nn as nn
from torch import Tensor

from .registry import MaskRegistry


class ModelParts:
    """The layers of a model, each with its name, its part of the model, and so its masks.

    Args:
        model: a module; its name is "".
        parts: the names of the parts that have masks of their own.
        masks: of the parts.
    """

    def __init__(self, model: nn.Module, parts: list[str], masks: MaskRegistry) -> None:
        self.masks = masks
        self.names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self.parts: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
        for name, module in name_modules(model):
            self.names.setdefault(module, name)
            inside = [part for part in parts if not part or name == part or name.startswith(f"{part}.")]
            most_specific = {max(inside, key=len)} if inside else set()
            # A layer that stands at several places may belong to several parts.
            self.parts[module] = self.parts.get(module, frozenset()) | most_specific

    def get_name(self, layer: nn.Module) -> str:
        """A layer's name, also where it is the model itself, for people."""
        return self.names.get(layer) or "the model"

    def describe(self, layer: nn.Module) -> str:
        """A layer as errors name it."""
        return f"{self.get_name(layer)} = {type(layer).__name__}({layer.extra_repr()})"

    def find_mask(self, layer: nn.Module, sizes: tuple[int, ...], x: Tensor) -> Tensor | None:
        """The mask of a layer's input of so many samples and positions."""
        parts = self.parts[layer]
        return self.masks.find(self.describe(layer), parts, sizes, x, is_named=self.names[layer] in parts)

    def record_output(self, layer: nn.Module, mask: Tensor, sizes: tuple[int, ...], x: Tensor) -> None:
        """Remember the mask of what a layer made, or of what was made for it."""
        self.masks.record(mask, sizes, x, self.parts[layer], is_output=True)

    def is_unpadded(self, layer: nn.Module) -> bool:
        """Whether a layer's part of the model was said to have no padding."""
        return self.masks.is_unpadded(self.parts[layer])


def name_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every name of every module, without what torch.compile puts around a module."""
    named = model.named_modules(remove_duplicate=False)
    return [(".".join(part for part in name.split(".") if part != "_orig_mod"), module) for name, module in named]
