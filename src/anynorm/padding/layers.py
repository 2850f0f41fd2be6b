"""What a layer of torch.nn does with positions, and so what a mask must do for it.

action          layers                                      so that a sample in a batch equals the sample alone
"window"        convolutions, average and LP pooling        padding is 0 before, the mask is shortened
"max_pool"      max pooling                                 padding is -inf before and 0 behind, the mask is shortened
"transposed"    transposed convolutions                     padding is 0 before, the mask is lengthened
"constant_pad"  padding with a constant                     padding is that constant before, the mask is lengthened
"per_sample"    whatever depends on where a sample ends     each sample goes through the layer by itself
"recurrent"     torch's recurrent layers                    the input is packed
"softmax"       softmax over positions                      padding is -inf before and 0 behind
"attention"     torch's attention                           named where it was not given the padding
"norm"          torch's norms                               named, or refused where it would count the padding
"keep"          activations, dropout, norms of ours         the mask stays the tensor's own
"refuse"        layers whose positions no mask follows      an error
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..torch_private import NormBase
from .registry import SizedMask
from .shorten import CONVOLUTIONS, POOLS, TRANSPOSED, align

ANY = 0  # as many axes of positions as the input has
NORMS = (NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
PER_SAMPLE: dict[type, int] = {
    **{nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3},
    **{nn.AdaptiveMaxPool1d: 1, nn.AdaptiveMaxPool2d: 2, nn.AdaptiveMaxPool3d: 3},
    **{nn.ReflectionPad1d: 1, nn.ReflectionPad2d: 2, nn.ReflectionPad3d: 3},
    **{nn.ReplicationPad1d: 1, nn.ReplicationPad2d: 2, nn.ReplicationPad3d: 3},
    **{nn.CircularPad1d: 1, nn.CircularPad2d: 2, nn.CircularPad3d: 3},
    **{nn.Upsample: ANY, nn.PixelShuffle: 2, nn.PixelUnshuffle: 2},
}
REFUSED = (nn.Fold, nn.Unfold, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
UNPOOLING = (nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d)
TABLE: dict[type, tuple[str, int]] = {
    **{kind: ("window", axes) for kind, axes in (CONVOLUTIONS | POOLS).items()},
    **{nn.MaxPool1d: ("max_pool", 1), nn.MaxPool2d: ("max_pool", 2), nn.MaxPool3d: ("max_pool", 3)},
    **{kind: ("transposed", axes) for kind, axes in TRANSPOSED.items()},
    **{
        nn.ConstantPad1d: ("constant_pad", 1),
        nn.ConstantPad2d: ("constant_pad", 2),
        nn.ConstantPad3d: ("constant_pad", 3),
    },
    **{kind: ("per_sample", axes) for kind, axes in PER_SAMPLE.items()},
    **{kind: ("recurrent", 1) for kind in (nn.RNN, nn.LSTM, nn.GRU)},
    **{kind: ("refuse", ANY) for kind in REFUSED + UNPOOLING},
}
SOFTMAX = (nn.Softmax, nn.LogSoftmax, nn.Softmin)
# Arguments through which attention is given the padding, or a mask that may contain it: position and name of each.
ATTENTION: dict[type, list[tuple[int, str]]] = {
    nn.MultiheadAttention: [(3, "key_padding_mask"), (5, "attn_mask")],
    nn.TransformerEncoderLayer: [(2, "src_key_padding_mask"), (1, "src_mask")],
}
KEEPING = ("torch.nn.modules.activation", "torch.nn.modules.dropout")


def find_action(layer: Any) -> tuple[str, int] | None:
    """What is done for a layer, and over how many axes of positions it works; None where nothing is.

    A subclass with a forward of its own may do anything with the ends of a sample: pad by hand, standardize weights.
    """
    kind: Any = type(layer)
    if isinstance(layer, (*SOFTMAX, *ATTENTION)):
        return "softmax" if isinstance(layer, SOFTMAX) else "attention", ANY
    if hasattr(kind, "find_channel_axes") or kind is nn.Identity or kind.__module__ in KEEPING:
        return "keep", ANY
    if isinstance(layer, NORMS):
        return "norm", ANY
    # torch's nearest class: its table row holds for a subclass that kept its forward.
    base: Any = next((base for base in kind.__mro__ if base in TABLE), None)
    if base is None:
        return None
    action, axes = TABLE[base]
    has_own_forward = kind.forward is not base.forward or "forward" in vars(layer)
    if action == "recurrent":
        return None if has_own_forward else (action, axes)  # our own LSTM and GRU ask for the mask
    if action != "refuse" and (has_own_forward or depends_on_ends(layer)):
        return "per_sample", axes
    return ("refuse", axes) if getattr(layer, "return_indices", False) else (action, axes)


def is_over_positions(layer: Any, x: Tensor, recorded: SizedMask) -> bool:
    """Whether a softmax is over positions of (N, C, positions...); of other layouts nothing is known."""
    if layer.dim is None or (x.shape[0], *x.shape[2:]) != recorded.sizes or recorded.is_full:
        return False
    dim = layer.dim % x.dim()
    return dim > 1 and (x.dim() > 3 or x.shape[1] != x.shape[2])


def has_mask_argument(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether attention was given the padding, or a mask of the user's own."""
    arguments = next(arguments for kind, arguments in ATTENTION.items() if isinstance(layer, kind))
    given = [named.get(name, args[position] if len(args) > position else None) for position, name in arguments]
    return any(one is not None for one in given)


def has_window_name(layer: nn.Module) -> bool:
    """Whether a layer of the user's calls itself a convolution or a pooling."""
    name = type(layer).__name__.lower()
    return ("conv" in name or "pool" in name) and next(layer.children(), None) is None


def depends_on_ends(layer: Any) -> bool:
    """Whether a layer treats blanks behind a sample in another way than the sample's end."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return layer.padding_mode != "zeros" and (layer.padding == "same" or pads(layer.padding))
    if isinstance(layer, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
        return layer.ceil_mode or (pads(layer.padding) and not layer.count_include_pad)
    return isinstance(layer, (nn.LPPool1d, nn.LPPool2d, nn.LPPool3d)) and layer.ceil_mode


def pads(padding: Any) -> bool:
    """Whether a layer's own `padding` adds positions."""
    return any(padding) if isinstance(padding, (tuple, list)) else bool(padding) and padding != "valid"


def is_pointwise(layer: Any) -> bool:
    """Whether a convolution looks at one position at a time and keeps all of them."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return False
    return {*layer.kernel_size, *layer.stride} == {1} and (layer.padding == "same" or not pads(layer.padding))


def fill_padding(x: Tensor, mask: Tensor, value: float) -> Tensor:
    """x (N, C, positions...) with another value where the mask says padding."""
    return torch.where(mask.unsqueeze(1).to(x.device), x, value)


def run_per_sample(name: str, layer: Any, x: Tensor, recorded: SizedMask, output: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample through the layer by itself: the batch again, 0 behind each, and its mask.

    Costs a call for each sample.

    Args:
        name: the layer's, for errors.
        recorded: the mask of x.
        output: what the layer made of the whole batch, for its sizes.

    Raises:
        ValueError: samples with holes, or that do not begin at the first position.
    """
    mask, axes = recorded.mask, x.dim() - 2
    is_shared = [mask.shape[axis] == 1 for axis in range(1, axes + 1)]
    padded_outputs: list[Tensor] = []
    sizes: list[torch.Size] = []
    for sample, real in zip(x.split(1), mask.expand(len(x), *mask.shape[1:])):
        ends = find_real_sizes(name, real)
        box = [slice(None) if shared else slice(0, end) for shared, end in zip(is_shared, ends)]
        # Not layer(...): the hooks of this call are not to run again. An empty sample makes no positions.
        if all(ends):
            real_part = slice(None), slice(None), *box
            alone = layer.forward(sample[real_part])
        else:
            no_part = slice(1), slice(None), *[slice(0)] * axes
            alone = output[no_part]
        sizes.append(alone.shape[2:])
        missing = [size - other for size, other in zip(output.shape[2:], alone.shape[2:])]
        padded_outputs.append(F.pad(alone, [n for size in reversed(missing) for n in (0, size)]))
    return torch.cat(padded_outputs), make_prefix_mask(sizes, output.shape[2:], is_shared, mask.device)


def make_prefix_mask(
    sizes: list[torch.Size], padded: torch.Size, is_shared: list[bool], device: torch.device
) -> Tensor:
    """The mask of samples of these sizes in a padded batch; size 1 along axes that all positions share."""
    axes = len(padded)
    mask = torch.ones([len(sizes)] + [1] * axes, dtype=torch.bool, device=device)
    for axis in range(1, axes + 1):
        counts = torch.tensor([size[axis - 1] for size in sizes], dtype=torch.int64, device=device)[:, None]
        real = counts > 0 if is_shared[axis - 1] else torch.arange(padded[axis - 1], device=device) < counts
        mask = mask & align(real, axis, axes)
    return mask


def find_real_sizes(name: str, real: Tensor) -> list[int]:
    """How many positions of a sample are real along each axis, from the first on.

    Raises:
        ValueError: the real positions do not come first, or have holes.
    """
    sizes = []
    for axis in range(real.dim()):
        line = real.movedim(axis, 0).reshape(real.shape[axis], -1).any(1)
        sizes.append(int(line.sum()))
    if int(real.sum()) != prod(sizes) or not bool(real[tuple(slice(0, size) for size in sizes)].all()):
        raise ValueError(
            f"{name}: it looks at where a sample ends, so the real positions must come first and without holes; got a "
            "mask with others; move the padding behind each sample"
        )
    return sizes
