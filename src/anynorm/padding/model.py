"""A model whose layers an `anynorm.masked` context knows: what happens before and after each of its layers."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .known import Known, Masks
from .layers import NORMS, fill, find_action, is_pointwise, is_told, may_slide, run_alone, weighs_positions
from .masks import lengths_of
from .shorten import Window, each, find_windows, slide, spread

BLANKS = {"slide": 0.0, "spread": 0.0, "maximum": -torch.inf}


class Layers:
    """The layers of a model, each with its name and with the part that it belongs to.

    Args:
        model: a module; its name is "".
        parts: the names of the parts that have masks of their own.
    """

    def __init__(self, model: nn.Module, parts: list[str], masks: Masks) -> None:
        self.masks = masks
        self.names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self.parts: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
        self.behind: dict[Any, Tensor] = {}  # what was computed, once for all layers that slide alike
        self.unheard: dict[str, str] = {}  # layers that ran and could not be told, by name
        for name, module in name_modules(model):
            self.names.setdefault(module, name)
            inside = [part for part in parts if not part or name == part or name.startswith(f"{part}.")]
            most = {max(inside, key=len)} if inside else set()
            self.parts[module] = self.parts.get(module, frozenset()) | most

    def tell(self, layer: nn.Module) -> str:
        """A layer as errors name it."""
        return f"{self.names.get(layer) or 'the model'} = {type(layer).__name__}({layer.extra_repr()})"

    def find(self, layer: nn.Module, x: Tensor, channels: tuple[int, ...]) -> Tensor | None:
        """The mask of a layer's input, whose axes without a mask `channels` are."""
        return self.find_by_sizes(layer, tuple(size for axis, size in enumerate(x.shape) if axis not in channels), x)

    def find_by_sizes(self, layer: nn.Module, sizes: tuple[int, ...], x: Tensor) -> Tensor | None:
        """The mask of a layer's input of so many samples and positions."""
        if len(sizes) < 2 and isinstance(x, Tensor):
            self.notice_whole(layer, x)
        parts = self.parts[layer]
        return self.masks.find(self.tell(layer), parts, sizes, x, is_named=self.names[layer] in parts)

    def hold(self, layer: nn.Module, mask: Tensor, sizes: tuple[int, ...], x: Tensor) -> None:
        """A mask is the own one of what a layer made."""
        self.masks.hold(mask, sizes, x, self.parts[layer], is_output=True)

    def is_free(self, layer: nn.Module) -> bool:
        """Whether a layer's part of the model has no padding."""
        return self.masks.is_free(self.parts[layer])

    def before(self, layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What a layer is called with; None where no mask is about it."""
        action, axes = find_action(layer) or ("", 0)
        if action in ("", "pass", "attend"):
            return None
        if not args:
            raise TypeError(
                f"{self.tell(layer)}: inside anynorm.masked a layer's input must be its first argument; got it by "
                "name; call layer(x)"
            )
        x = args[0]
        if not isinstance(x, Tensor) or x.is_nested:
            return None
        if action == "weigh":
            return self.weigh(layer, x)
        if action == "norm":
            self.notice(layer, x)
            return None
        if action == "steps":
            return self.pack(layer, x, args)
        if (axes and x.dim() != axes + 2) or x.dim() < 3 or is_pointwise(layer):
            return None
        mask = self.find(layer, x, (1,))
        if mask is None:
            return None
        known = self.masks.find_own(x)
        if action == "alone" or (known is not None and known.is_full):
            return args
        if action == "refuse":
            raise ValueError(
                f"{self.tell(layer)}: no mask can be followed through this layer; got padded samples; call it on each "
                "sample, or leave this part out: masked({'': mask, 'its.name': None}, model=model)"
            )
        blank = fill(x, mask, layer.value if action == "constant" else BLANKS[action])
        self.hold(layer, mask, (x.shape[0], *x.shape[2:]), blank)
        return (blank, *args[1:])

    def weigh(self, layer: nn.Module, x: Tensor) -> tuple[Any, ...] | None:
        """Softmax over positions: padding has no weight."""
        known = self.masks.find_own(x)
        if known is None or not weighs_positions(layer, x, known):
            return None
        blank = fill(x, known.mask, torch.inf if isinstance(layer, nn.Softmin) else -torch.inf)
        assert known.sizes is not None
        self.hold(layer, known.mask, known.sizes, blank)
        return (blank,)

    def after(self, layer: Any, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        """What a layer gives back; its mask is remembered."""
        action, _ = find_action(layer) or ("", 0)
        x: Any = args[0] if args else None
        if action == "attend" or (action == "" and may_slide(layer)):
            self.notice_other(layer, action, args, named)
            return None
        if action == "steps":
            return self.unpack(layer, x, output)
        known = self.masks.find_own(x)
        if known is None or not isinstance(output, Tensor) or action == "":
            return None
        if action == "weigh" and weighs_positions(layer, x, known):
            output = fill(output, known.mask, 0.0)
            self.hold(layer, known.mask, (x.shape[0], *x.shape[2:]), output)
            return output
        if action in ("pass", "norm", "weigh") or is_pointwise(layer):
            if output.shape == x.shape or (is_pointwise(layer) and output.shape[2:] == x.shape[2:]):
                assert known.sizes is not None
                self.hold(layer, known.mask, known.sizes, output)
            return None
        return None if self.is_free(layer) else self.follow(action, layer, x, known, output)

    def follow(self, action: str, layer: Any, x: Tensor, known: Known, output: Tensor) -> Tensor | None:
        """Find the mask behind a layer, and mend its output where that depends on padding."""
        sizes = (output.shape[0], *output.shape[2:])
        result = None
        if action == "alone" and not known.is_full:
            result, mask = run_alone(self.tell(layer), layer, x, known, output)
            behind = self.masks.intern(mask, sizes)
        else:
            behind = self.masks.intern(self.find_behind(action, layer, known, sizes), sizes)
            if action in BLANKS and not known.is_full:
                result = fill(output, behind.mask, 0.0)  # functions that are not seen read it: F.pad, torch.cat, sums
        self.masks.add(self.parts[layer], behind)
        self.hold(layer, behind.mask, sizes, output if result is None else result)
        return result

    def find_behind(self, action: str, layer: Any, known: Known, sizes: tuple[int, ...]) -> Tensor:
        """The mask behind a layer that makes positions of these sizes."""
        mask, axes = known.mask, len(sizes) - 1
        if known.is_full:
            shape = [1 if size == 1 else other for size, other in zip(mask.shape, sizes)]
            return mask.new_ones([sizes[0] if mask.shape[0] != 1 else 1, *shape[1:]])
        if action == "constant":
            pads = each("padding", layer.padding, 2 * axes, -max(sizes))
            windows = [Window(1, 1, before, after) for before, after in zip(pads[::2], pads[1::2])][::-1]
        else:
            windows = find_windows(layer, axes)
        shared = [window if size != 1 else None for window, size in zip(windows, mask.shape[1:])]
        key = (action, id(known), tuple(shared), sizes)
        if key not in self.behind and action == "spread":
            assert known.sizes is not None
            usual = [window.count_transposed(size) for size, window in zip(known.sizes[1:], windows)]
            self.behind[key] = spread(mask, shared, [size - other for size, other in zip(sizes[1:], usual)])
        elif key not in self.behind:
            self.behind[key] = slide(mask, shared)
        found = self.behind[key]
        if any(size not in (1, other) for size, other in zip(found.shape[1:], sizes[1:])):
            raise ValueError(
                f"{self.tell(layer)}: the layer makes {sizes[1:]} positions where its attributes say "
                f"{tuple(found.shape[1:])}; got a mask for the latter; remove what changes its input or output (hooks)"
            )
        return found

    def pack(self, layer: Any, x: Tensor, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A recurrent layer reads up to each sequence's end."""
        if x.dim() != 3:
            return None
        steps = x if layer.batch_first else x.transpose(0, 1)
        mask = self.find_by_sizes(layer, tuple(steps.shape[:2]), x)
        if mask is None:
            return None
        known = self.masks.find_own(x)
        if known is not None and known.is_full:
            return args
        lengths = lengths_of(self.tell(layer), mask.expand(steps.shape[:2]))
        if not bool(lengths.all()):
            raise ValueError(
                f"{self.tell(layer)}: sequences must have at least one real step, as in torch; got lengths "
                f"{lengths.tolist()}; leave empty sequences out of the batch"
            )
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), layer.batch_first, enforce_sorted=False)
        self.hold(layer, mask, tuple(steps.shape[:2]), packed.data)
        return (packed, *args[1:])

    def unpack(self, layer: Any, x: Any, output: Any) -> Any:
        """The padded batch again, 0 behind each sequence; and the states at each sequence's end."""
        known = self.masks.find_own(x.data) if isinstance(x, PackedSequence) else None
        if known is None or known.sizes is None:
            return None
        rows, *states = output
        y, _ = nn.utils.rnn.pad_packed_sequence(rows, layer.batch_first, total_length=known.sizes[1])
        self.hold(layer, known.mask, known.sizes, y)
        return (y, *states)

    def notice(self, norm: Any, x: Tensor) -> None:
        """A norm of torch's, or a subclass of one, is called and is not told the mask.

        Raises:
            ValueError: a norm of torch's that counts the padding.
        """
        by_features = isinstance(norm, nn.LayerNorm | nn.RMSNorm)
        channels = tuple(range(x.dim() - len(norm.normalized_shape), x.dim())) if by_features else (1,)
        if x.dim() - len(channels) < 2:
            return self.notice_whole(norm, x)
        if self.is_free(norm):
            return
        if by_features:
            wanted = tuple(x.shape[: x.dim() - len(channels)])
            if self.masks.fits(wanted) or self.masks.fits((*wanted[1::-1], *wanted[2:])):
                return  # one position at a time, samples first or second
        elif counts(norm) and self.find(norm, x, channels) is not None and is_torchs(norm):
            raise ValueError(self.refuse(norm))
        self.unheard[self.names[norm] or "the model"] = type(norm).__name__

    def notice_whole(self, norm: nn.Module, x: Tensor) -> None:
        """A layer norm over features and positions together counts the padding."""
        ways = [(x.shape[0], *x.shape[2:]), tuple(x.shape[:-1])]
        if x.dim() > 2 and not self.is_free(norm) and any(self.masks.has_padding(way) for way in ways):
            self.unheard[self.names[norm] or "the model"] = type(norm).__name__

    def notice_other(self, layer: Any, action: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Attention is called without the padding, or a layer that is not known by the name of one that slides."""
        inputs = [one for one in (*args, *named.values()) if isinstance(one, Tensor) and not one.is_nested]
        if not inputs or inputs[0].dim() < 3 or self.is_free(layer):
            return
        if action == "attend":
            keys = inputs[min(1, len(inputs) - 1)]
            attention = getattr(layer, "self_attn", layer)
            sizes = tuple(keys.shape[:2]) if attention.batch_first else (keys.shape[1], keys.shape[0])
            heard = is_told(layer, args, named)
        else:
            sizes, heard = (inputs[0].shape[0], *inputs[0].shape[2:]), len(inputs) > 1
        if not heard and self.masks.has_padding(sizes):
            self.unheard[self.names[layer] or "the model"] = type(layer).__name__

    def refuse(self, norm: nn.Module) -> str:
        """Which norms of the model take no mask."""
        alike = [
            f"{name or 'the model'} ({type(module).__name__})"
            for module, name in self.names.items()
            if isinstance(module, NORMS) and is_torchs(module) and counts(module)
        ]
        repair = "anynorm.sync(model)" if isinstance(norm, nn.SyncBatchNorm) else "anynorm.accelerate(model)"
        more = f" and {len(alike) - 8} more" if len(alike) > 8 else ""
        return (
            f"masked: a norm of torch's cannot be told which positions are real and would count the padding; got "
            f"{', '.join(alike[:8])}{more}; call {repair} before"
        )


def counts(norm: Any) -> bool:
    """Whether padding enters what a norm computes for real positions; layer and RMS norm see one position at a time."""
    if isinstance(norm, nn.modules.batchnorm._NormBase):
        return norm.training or norm.running_mean is None
    return isinstance(norm, nn.GroupNorm)


def is_torchs(layer: nn.Module) -> bool:
    """Whether a layer's class is torch's own."""
    return type(layer).__module__.startswith("torch.nn.modules.")


def name_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every name of every module, without what torch.compile puts around a module."""
    named = model.named_modules(remove_duplicate=False)
    return [(".".join(part for part in name.split(".") if part != "_orig_mod"), module) for name, module in named]
