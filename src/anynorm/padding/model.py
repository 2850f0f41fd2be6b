"""A model whose layers an `anynorm.masked` context knows: what happens before and after each of its layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .layers import fill_padding, find_action, has_window_name, is_over_positions, is_pointwise, run_per_sample
from .masks import lengths_of
from .parts import ModelParts
from .registry import MaskRegistry, SizedMask
from .shorten import Window, apply_transposed_windows, apply_windows, find_windows, read_option
from .unmasked import UnmaskedLayers

FILL_VALUES = {"window": 0.0, "transposed": 0.0, "max_pool": -torch.inf}


class MaskedModel:
    """A model whose layers are given inputs with blank padding, and whose outputs' masks are followed."""

    parts: ModelParts
    masks: MaskRegistry

    def __init__(self, parts: ModelParts) -> None:
        self.parts, self.masks = parts, parts.masks
        self.unmasked: UnmaskedLayers = UnmaskedLayers(self.parts)
        self.derived: dict[Any, Tensor] = {}  # masks behind windows, computed once for all layers with the same ones

    def has_layer(self, layer: nn.Module) -> bool:
        """Whether a layer is one of the model's."""
        return layer in self.parts.names

    def find_mask(self, layer: nn.Module, sizes: tuple[int, ...], x: Tensor) -> Tensor | None:
        """The mask of a layer's input of so many samples and positions; norms over positions are noted."""
        if len(sizes) < 2 and isinstance(x, Tensor):
            self.unmasked.add_if_over_positions(layer, x)
        return self.parts.find_mask(layer, sizes, x)

    # ---- before a layer ----------------------------------------------------------------------------------------------

    def prepare_input(self, layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The arguments of a layer with blank padding; None where they stay as they are."""
        action, axes = find_action(layer) or ("", 0)
        if action in ("", "keep", "attention"):
            return None
        if not args:
            raise TypeError(
                f"{self.parts.describe(layer)}: inside anynorm.masked a layer's input must be its first argument; got "
                "it by name; call layer(x)"
            )
        x = args[0]
        if not isinstance(x, Tensor) or x.is_nested:
            return None
        if action == "softmax":
            return self.fill_softmax(layer, x)
        if action == "norm":
            self.unmasked.check_norm(layer, x)
            return None
        if action == "recurrent":
            return self.pack(layer, x, args)
        if (axes and x.dim() != axes + 2) or x.dim() < 3 or is_pointwise(layer):
            return None
        return self.fill_input(action, layer, x, args)

    def fill_input(self, action: str, layer: Any, x: Tensor, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The arguments of a layer with windows, with blank padding; None where no mask is about them."""
        sizes = (x.shape[0], *x.shape[2:])
        mask = self.find_mask(layer, sizes, x)
        if mask is None:
            return None
        recorded = self.masks.find_recorded(x)
        if action == "per_sample" or (recorded is not None and recorded.is_full):
            return args
        if action == "refuse":
            raise ValueError(
                f"{self.parts.describe(layer)}: no mask can be followed through this layer; got padded samples; call "
                "it on each sample, or leave this part out: masked({'': mask, 'its.name': None}, model=model)"
            )
        filled = fill_padding(x, mask, layer.value if action == "constant_pad" else FILL_VALUES[action])
        self.parts.record_output(layer, mask, sizes, filled)
        return (filled, *args[1:])

    def fill_softmax(self, layer: nn.Module, x: Tensor) -> tuple[Any, ...] | None:
        """The arguments of a softmax over positions with -inf at padding, which so gets no weight."""
        recorded = self.masks.find_recorded(x)
        if recorded is None or not is_over_positions(layer, x, recorded):
            return None
        filled = fill_padding(x, recorded.mask, torch.inf if isinstance(layer, nn.Softmin) else -torch.inf)
        assert recorded.sizes is not None
        self.parts.record_output(layer, recorded.mask, recorded.sizes, filled)
        return (filled,)

    def pack(self, layer: Any, x: Tensor, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The arguments of a recurrent layer, packed so that it reads up to each sequence's end."""
        if x.dim() != 3:
            return None
        steps = x if layer.batch_first else x.transpose(0, 1)
        mask = self.find_mask(layer, tuple(steps.shape[:2]), x)
        if mask is None:
            return None
        recorded = self.masks.find_recorded(x)
        if recorded is not None and recorded.is_full:
            return args
        lengths = lengths_of(self.parts.describe(layer), mask.expand(steps.shape[:2]))
        if not bool(lengths.all()):
            raise ValueError(
                f"{self.parts.describe(layer)}: sequences must have at least one real step, as in torch; got lengths "
                f"{lengths.tolist()}; leave empty sequences out of the batch"
            )
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), layer.batch_first, enforce_sorted=False)
        # By the rows: a PackedSequence is a tuple, and the registry knows tensors.
        self.parts.record_output(layer, mask, tuple(steps.shape[:2]), packed.data)
        return (packed, *args[1:])

    # ---- after a layer -----------------------------------------------------------------------------------------------

    def finish_output(self, layer: Any, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        """A layer's output where padding changed it, mended; None where it stays as it is. Its mask is recorded."""
        action, _ = find_action(layer) or ("", 0)
        x: Any = args[0] if args else None
        if action == "attention" or (action == "" and has_window_name(layer)):
            self.unmasked.add_if_on_padding(layer, action, args, named)
            return None
        if action == "recurrent":
            return self.unpack(layer, x, output)
        recorded = self.masks.find_recorded(x)
        if recorded is None or not isinstance(output, Tensor) or action == "":
            return None
        if action == "softmax" and is_over_positions(layer, x, recorded):
            output = fill_padding(output, recorded.mask, 0.0)
            self.parts.record_output(layer, recorded.mask, (x.shape[0], *x.shape[2:]), output)
            return output
        if action in ("keep", "norm", "softmax") or is_pointwise(layer):
            if output.shape == x.shape or (is_pointwise(layer) and output.shape[2:] == x.shape[2:]):
                assert recorded.sizes is not None
                self.parts.record_output(layer, recorded.mask, recorded.sizes, output)
            return None
        return None if self.parts.is_unpadded(layer) else self.follow(action, layer, x, recorded, output)

    def unpack(self, layer: Any, x: Any, output: Any) -> Any:
        """A recurrent layer's output as a padded batch, 0 behind each sequence, and the states at each end."""
        recorded = self.masks.find_recorded(x.data) if isinstance(x, PackedSequence) else None
        if recorded is None or recorded.sizes is None:
            return None
        rows, *states = output
        y, _ = nn.utils.rnn.pad_packed_sequence(rows, layer.batch_first, total_length=recorded.sizes[1])
        self.parts.record_output(layer, recorded.mask, recorded.sizes, y)
        return (y, *states)

    def follow(self, action: str, layer: Any, x: Tensor, recorded: SizedMask, output: Tensor) -> Tensor | None:
        """Find the mask behind a layer, and mend its output where that depends on padding."""
        sizes = (output.shape[0], *output.shape[2:])
        result = None
        if action == "per_sample" and not recorded.is_full:
            result, mask = run_per_sample(self.parts.describe(layer), layer, x, recorded, output)
            derived = self.masks.intern(mask, sizes)
        else:
            derived = self.masks.intern(self.derive_mask(action, layer, recorded, sizes), sizes)
            if action in FILL_VALUES and not recorded.is_full:
                # Functions that the context does not see read it: F.pad, torch.cat, sums.
                result = fill_padding(output, derived.mask, 0.0)
        self.masks.add_derived(self.parts.parts[layer], derived)
        self.parts.record_output(layer, derived.mask, sizes, output if result is None else result)
        return result

    def derive_mask(self, action: str, layer: Any, recorded: SizedMask, sizes: tuple[int, ...]) -> Tensor:
        """The mask behind a layer that makes positions of these sizes."""
        mask, axes = recorded.mask, len(sizes) - 1
        if recorded.is_full:
            shape = [1 if size == 1 else other for size, other in zip(mask.shape, sizes)]
            return mask.new_ones([sizes[0] if mask.shape[0] != 1 else 1, *shape[1:]])
        windows = find_pad_windows(layer, sizes) if action == "constant_pad" else find_windows(layer, axes)
        own_windows = [window if size != 1 else None for window, size in zip(windows, mask.shape[1:])]
        # The id is safe: the registry keeps every interned mask as long as this cache lives.
        key = (action, id(recorded), tuple(own_windows), sizes)
        if key not in self.derived and action == "transposed":
            assert recorded.sizes is not None
            usual = [window.count_transposed(size) for size, window in zip(recorded.sizes[1:], windows)]
            extra = [size - other for size, other in zip(sizes[1:], usual)]
            self.derived[key] = apply_transposed_windows(mask, own_windows, extra)
        elif key not in self.derived:
            self.derived[key] = apply_windows(mask, own_windows)
        derived = self.derived[key]
        if any(size not in (1, other) for size, other in zip(derived.shape[1:], sizes[1:])):
            raise ValueError(
                f"{self.parts.describe(layer)}: the layer makes {sizes[1:]} positions where its attributes say "
                f"{tuple(derived.shape[1:])}; got a mask for the latter; remove what changes its input or output "
                "(hooks)"
            )
        return derived


def find_pad_windows(layer: Any, sizes: tuple[int, ...]) -> list[Window]:
    """A layer that pads with a constant, as windows of one position; torch counts the axes from the last."""
    axes = len(sizes) - 1
    pads = read_option("padding", layer.padding, 2 * axes, -max(sizes))
    return [Window(1, 1, before, after) for before, after in zip(pads[::2], pads[1::2])][::-1]
