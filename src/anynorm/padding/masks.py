"""Which positions count: masks and lengths.

A mask is True, or 1, at real positions and False, or 0, at padding. That is the opposite of torch's `key_padding_mask`,
which is True at padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..engine.kernels import READS_TENSORS, compiled
from ..engine.watch import has_memory, is_watched
from ..errors import check_normalized_shape
from .ragged import is_ragged

Lengths = Tensor | Sequence[int]  # of each sample, (N,), whole numbers


def find_mask(
    function: str, x: Tensor, channels: tuple[int, ...], mask: Tensor | None, lengths: Lengths | None = None
) -> Tensor | None:
    """The mask as the engine takes it: float32, in the axes of x with size 1 for channels, contiguous.

    Args:
        function: whose call it is, for errors.
        channels: axes of x that a mask has not, counted from the front or the back.
        mask: bool, or whole numbers or floats of 0 and 1; broadcastable to the other axes of x.
        lengths: (N,) whole numbers, instead of a mask: how many positions from the start of each sample are real.

    Raises:
        ValueError: both are given; a shape that does not fit; values that are neither 0 nor 1, or lengths out of range.
        TypeError: lengths that are no whole numbers.
    """
    if mask is None and lengths is None:
        return None
    if is_ragged(x):
        raise ValueError(
            f"{function}: a jagged or packed input has no padding; got a mask or lengths as well; leave them out"
        )
    channels = tuple(axis % x.dim() for axis in channels)
    wanted = tuple(size for axis, size in enumerate(x.shape) if axis not in channels)
    if lengths is not None:
        if mask is not None:
            raise ValueError(f"{function}: mask and lengths say the same; got both; leave one of them out")
        mask = mask_of(check_lengths(function, lengths, wanted, x), wanted[1])
    assert mask is not None
    check_mask(function, mask, wanted, x)
    mask = mask.to(x.device, torch.float32)
    if mask.shape != wanted:
        mask = mask.expand(wanted)
    # The kernels read one float for each position, one after the other; where the mask is that already this is a view.
    return mask.reshape([1 if axis in channels else size for axis, size in enumerate(x.shape)]).contiguous()


def open_mask(
    x: Tensor, channels: tuple[int, int], mask: Tensor | None, lengths: Lengths | None
) -> tuple[Tensor, int] | None:
    """What `find_mask` finds, and how many positions are real, by the compiled module.

    Args:
        x: plain memory.
        channels: the first axis that a mask has not, counted from the front or the back, and how many such axes follow.

    Returns:
        None for what it does not know, or what does not fit: `find_mask` reads it or says what is wrong.
    """
    if not READS_TENSORS or (mask is not None and lengths is not None):
        return None
    found: tuple[Tensor, int] | None = (
        compiled.open_mask(x, mask, *channels) if lengths is None else compiled.open_lengths(x, lengths, *channels)
    )
    return found


def has_real(mask: Tensor | None, lengths: Any) -> Any:
    """Whether any position is real; a tensor where the answer would have to be waited for."""
    counted = lengths if mask is None else mask
    if READS_TENSORS and not is_watched():
        found = compiled.has_real(counted)
        if found is not None:
            return found
    return (counted if isinstance(counted, Tensor) else torch.as_tensor(counted, device="cpu")).ne(0).any()


def check_mask(function: str, mask: Tensor, wanted: tuple[int, ...], x: Tensor) -> None:
    """Refuse masks that do not fit the positions of an input, or hold other values than 0 and 1."""
    if not is_broadcastable(mask, wanted):
        raise ValueError(
            f"{function}: mask must be broadcastable to the input without its channels, {wanted}; "
            f"got mask {tuple(mask.shape)}, input {tuple(x.shape)}; reshape the mask, or pass lengths"
        )
    if mask.dtype != torch.bool:
        check_zeros_and_ones(function, mask)


def find_feature_mask(function: str, x: Tensor, shape: Any, mask: Tensor | None, lengths: Any) -> Tensor | None:
    """`find_mask` for norms over the last axes, whose sizes `shape` is."""
    axes = 0 if is_ragged(x) else len(check_normalized_shape(function, x, shape))
    return find_mask(function, x, tuple(range(-axes, 0)), mask, lengths)


def is_broadcastable(mask: Tensor, wanted: tuple[int, ...]) -> bool:
    """Whether a mask broadcasts to the positions of an input."""
    if mask.dim() > len(wanted):
        return False
    return all(a in (1, b) for a, b in zip(reversed(mask.shape), reversed(wanted), strict=False))


def check_zeros_and_ones(function: str, mask: Tensor) -> None:
    """Refuse additive masks, 0 for real positions and -inf for padding, which would mean the opposite."""
    if mask.is_complex():
        raise ValueError(f"{function}: mask must be bool or 0 and 1; got {mask.dtype}; pass mask.bool()")
    # Reading the values waits for a device, and is impossible for a compiler: there they are taken on trust.
    if not has_memory(mask):
        return
    odd = mask[(mask != 0) & (mask != 1)]
    if odd.numel():
        raise ValueError(
            f"{function}: mask must be True or 1 at real positions and False or 0 at padding; got {float(odd[0])}; "
            "pass a bool mask"
        )


def check_lengths(function: str, lengths: Lengths, wanted: tuple[int, ...], x: Tensor) -> Tensor:
    """Lengths as a tensor, checked against the input.

    Raises:
        ValueError: other axes than samples and positions; another number of samples; lengths out of range.
        TypeError: lengths that are no whole numbers.
    """
    lengths = torch.as_tensor(lengths, device=x.device)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"{function}: lengths must be whole numbers; got {lengths.dtype}; pass lengths.long()")
    if len(wanted) != 2:
        raise ValueError(
            f"{function}: lengths needs one axis of samples and one of positions; got input {tuple(x.shape)}; "
            "pass a mask instead"
        )
    if lengths.shape != wanted[:1]:
        raise ValueError(
            f"{function}: lengths must have one entry for each sample, ({wanted[0]},); got {tuple(lengths.shape)}, "
            f"input {tuple(x.shape)}; pass the length of each sample"
        )
    if not has_memory(lengths) or not lengths.numel():
        return lengths
    least, most = (int(t) for t in lengths.aminmax())
    if least < 0 or most > wanted[1]:
        raise ValueError(
            f"{function}: lengths must be from 0 to {wanted[1]}, the input's positions; got {least} to {most}; "
            "pad the input to the longest, or clamp the lengths"
        )
    return lengths


def mask_of(lengths: Lengths, size: int) -> Tensor:
    """The mask of sequences that begin at position 0.

    Args:
        lengths: (N,) whole numbers, in positions.
        size: L, the positions of the padded batch.

    Returns:
        (N, L), bool, True at real positions.

    Example:
        >>> anynorm.mask_of([1, 3], 3)
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """
    lengths = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths)
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def lengths_of(function: str, mask: Tensor) -> Tensor:
    """The lengths (N,) of sequences whose mask is (N, L).

    Raises:
        ValueError: where a sample's real positions are not the first ones.
    """
    real = mask.bool()
    lengths = real.sum(1)
    if has_memory(real) and not torch.equal(mask_of(lengths, real.shape[1]), real):
        raise ValueError(
            f"{function}: real positions must come first and without holes, for sequences are read step after step; "
            f"got a mask {tuple(mask.shape)} with others; pass a PackedSequence, or move the padding to the end"
        )
    return lengths


def describe(layer: nn.Module) -> str:
    """A layer as it prints itself, with its name in the model where `accelerate` or `sync` gave it one."""
    label = getattr(layer, "label", "")
    name = f"{label} = " if label else ""
    return f"{name}{type(layer).__name__}({layer.extra_repr()})"
