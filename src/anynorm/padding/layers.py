"""What a layer of torch.nn does with positions, and so what a mask must do for it.

action     layers                                        so that a sample in a batch equals the sample alone
"slide"    convolutions, average and LP pooling          padding is 0 before, the mask is shortened
"maximum"  max pooling                                   padding is -inf before and 0 behind, the mask is shortened
"spread"   transposed convolutions                       padding is 0 before, the mask is lengthened
"constant" padding with a constant                       padding is that constant before, the mask is lengthened
"alone"    whatever looks at where a sample ends         each sample goes through the layer by itself
"steps"    torch's recurrent layers                      the input is packed
"weigh"    softmax over positions                        padding is -inf before and 0 behind
"attend"   torch's attention                             named where it was not given the padding
"norm"     torch's norms                                 it is told, or refused
"pass"     activations, dropout, norms of ours           the mask stays the tensor's own
"refuse"   layers whose positions no mask follows        an error
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .known import Known
from .shorten import CONVOLUTIONS, POOLS, TRANSPOSED, lay

ANY = 0  # as many axes of positions as the input has
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
ALONE: dict[type, int] = {
    **{nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3},
    **{nn.AdaptiveMaxPool1d: 1, nn.AdaptiveMaxPool2d: 2, nn.AdaptiveMaxPool3d: 3},
    **{nn.ReflectionPad1d: 1, nn.ReflectionPad2d: 2, nn.ReflectionPad3d: 3},
    **{nn.ReplicationPad1d: 1, nn.ReplicationPad2d: 2, nn.ReplicationPad3d: 3},
    **{nn.CircularPad1d: 1, nn.CircularPad2d: 2, nn.CircularPad3d: 3},
    **{nn.Upsample: ANY, nn.PixelShuffle: 2, nn.PixelUnshuffle: 2},
}
REFUSED = (nn.Fold, nn.Unfold, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
UNPOOLED = (nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d)
TABLE: dict[type, tuple[str, int]] = {
    **{kind: ("slide", axes) for kind, axes in (CONVOLUTIONS | POOLS).items()},
    **{nn.MaxPool1d: ("maximum", 1), nn.MaxPool2d: ("maximum", 2), nn.MaxPool3d: ("maximum", 3)},
    **{kind: ("spread", axes) for kind, axes in TRANSPOSED.items()},
    **{nn.ConstantPad1d: ("constant", 1), nn.ConstantPad2d: ("constant", 2), nn.ConstantPad3d: ("constant", 3)},
    **{kind: ("alone", axes) for kind, axes in ALONE.items()},
    **{kind: ("steps", 1) for kind in (nn.RNN, nn.LSTM, nn.GRU)},
    **{kind: ("refuse", ANY) for kind in REFUSED + UNPOOLED},
}
WEIGHING = (nn.Softmax, nn.LogSoftmax, nn.Softmin)
# Where attention takes the padding, and what may stand for it: place and name of each.
ATTENTION: dict[type, list[tuple[int, str]]] = {
    nn.MultiheadAttention: [(3, "key_padding_mask"), (5, "attn_mask")],
    nn.TransformerEncoderLayer: [(2, "src_key_padding_mask"), (1, "src_mask")],
}
PASSED = ("torch.nn.modules.activation", "torch.nn.modules.dropout")


def find_action(layer: Any) -> tuple[str, int] | None:
    """What is done for a layer, and over how many axes of positions it works; None where nothing is.

    A subclass with a forward of its own may do anything with the ends of a sample: pad by hand, standardize weights.
    """
    kind: Any = type(layer)
    if isinstance(layer, (*WEIGHING, *ATTENTION)):
        return "weigh" if isinstance(layer, WEIGHING) else "attend", ANY
    if hasattr(kind, "find_channel_axes") or kind is nn.Identity or kind.__module__ in PASSED:
        return "pass", ANY
    if isinstance(layer, NORMS):
        return "norm", ANY
    base: Any = next((base for base in kind.__mro__ if base in TABLE), None)
    if base is None:
        return None
    action, axes = TABLE[base]
    own = kind.forward is not base.forward or "forward" in vars(layer)
    if action == "steps":
        return None if own else (action, axes)  # our own LSTM and GRU ask for the mask
    if action != "refuse" and (own or looks_at_ends(layer)):
        return "alone", axes
    return ("refuse", axes) if getattr(layer, "return_indices", False) else (action, axes)


def weighs_positions(layer: Any, x: Tensor, known: Known | None) -> bool:
    """Whether a softmax is over positions of (N, C, positions...); of other layouts nothing is known."""
    if known is None or layer.dim is None or (x.shape[0], *x.shape[2:]) != known.sizes or known.is_full:
        return False
    dim = layer.dim % x.dim()
    return dim > 1 and (x.dim() > 3 or x.shape[1] != x.shape[2])


def is_told(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether attention was given the padding, or a mask of the user's own."""
    ways = next(ways for kind, ways in ATTENTION.items() if isinstance(layer, kind))
    given = [named.get(name, args[place] if len(args) > place else None) for place, name in ways]
    return any(one is not None for one in given)


def may_slide(layer: nn.Module) -> bool:
    """Whether a layer that is not known goes by the name of a convolution or a pooling."""
    name = type(layer).__name__.lower()
    return ("conv" in name or "pool" in name) and next(layer.children(), None) is None


def looks_at_ends(layer: Any) -> bool:
    """Whether blanks behind a sample are not to a layer what its end is."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer.padding_mode != "zeros" and (layer.padding == "same" or has_any(layer.padding))
    if isinstance(layer, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d):
        return layer.ceil_mode or (has_any(layer.padding) and not layer.count_include_pad)
    return isinstance(layer, nn.LPPool1d | nn.LPPool2d | nn.LPPool3d) and layer.ceil_mode


def has_any(padding: Any) -> bool:
    """Whether there is any padding."""
    return any(padding) if isinstance(padding, tuple | list) else bool(padding) and padding != "valid"


def is_pointwise(layer: Any) -> bool:
    """Whether a convolution looks at one position at a time and keeps all of them."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    return {*layer.kernel_size, *layer.stride} == {1} and (layer.padding == "same" or not has_any(layer.padding))


def fill(x: Tensor, mask: Tensor, value: float) -> Tensor:
    """x with another value in its padding, (N, C, positions...)."""
    return torch.where(mask.unsqueeze(1).to(x.device), x, value)


def run_alone(name: str, layer: Any, x: Tensor, known: Known, like: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample through the layer by itself: the batch again, 0 behind each, and its mask.

    Costs a call for each sample.

    Args:
        name: the layer's, for errors.
        like: what the layer made of the whole batch, for its sizes.

    Raises:
        ValueError: samples with holes, or that do not begin at the first position.
    """
    mask, axes = known.mask, x.dim() - 2
    shared = [mask.shape[axis] == 1 for axis in range(1, axes + 1)]
    pieces: list[Tensor] = []
    sizes: list[torch.Size] = []
    for sample, real in zip(x.split(1), mask.expand(len(x), *mask.shape[1:])):
        ends = find_box(name, real)
        box = [slice(None) if free else slice(0, end) for free, end in zip(shared, ends)]
        piece = (
            layer.forward(sample[(slice(None), slice(None), *box)]) if all(ends) else like[:1, :, *[slice(0)] * axes]
        )
        sizes.append(piece.shape[2:])
        rest = [n for size, one in zip(reversed(like.shape[2:]), reversed(piece.shape[2:])) for n in (0, size - one)]
        pieces.append(F.pad(piece, rest))
    inside = torch.ones([len(x)] + [1] * axes, dtype=torch.bool, device=mask.device)
    for axis in range(1, axes + 1):
        kept = torch.tensor([one[axis - 1] for one in sizes], dtype=torch.int64, device=mask.device)
        if shared[axis - 1]:
            inside = inside & lay((kept > 0)[:, None], axis, axes)
        else:
            inside = inside & lay(torch.arange(like.shape[axis + 1], device=mask.device) < kept[:, None], axis, axes)
    return torch.cat(pieces), inside


def find_box(name: str, real: Tensor) -> list[int]:
    """How many positions of a sample are real along each axis, from the first on."""
    ends = []
    for axis in range(real.dim()):
        line = real.movedim(axis, 0).reshape(real.shape[axis], -1).any(1)
        ends.append(int(line.sum()))
    if int(real.sum()) != prod(ends) or not bool(real[tuple(slice(0, end) for end in ends)].all()):
        raise ValueError(
            f"{name}: it looks at where a sample ends, so the real positions must come first and without holes; got a "
            "mask with others; move the padding behind each sample"
        )
    return ends
