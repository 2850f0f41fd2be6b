"""Which positions count: masks and lengths, and the context that hands a mask to the norms inside a model.

A mask is True, or 1, at real positions and False, or 0, at padding. That is the opposite of torch's `key_padding_mask`,
which is True at padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar, Token
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .errors import check_normalized_shape
from .ragged import is_ragged
from .watch import has_memory


def find_mask(
    function: str, x: Tensor, channels: tuple[int, ...], mask: Tensor | None, lengths: Any = None
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
    if not fits(mask, wanted):
        raise ValueError(
            f"{function}: mask must be broadcastable to the input without its channels, {wanted}; "
            f"got mask {tuple(mask.shape)}, input {tuple(x.shape)}; reshape the mask, or pass lengths"
        )
    if mask.dtype != torch.bool:
        check_zeros_and_ones(function, mask)
    mask = mask.to(x.device, torch.float32)
    if mask.shape != wanted:
        mask = mask.expand(wanted)
    return mask.reshape([1 if axis in channels else size for axis, size in enumerate(x.shape)]).contiguous()


def find_feature_mask(function: str, x: Tensor, shape: Any, mask: Tensor | None, lengths: Any) -> Tensor | None:
    """`find_mask` for norms over the last axes, whose sizes `shape` is."""
    axes = 0 if is_ragged(x) else len(check_normalized_shape(function, x, shape))
    return find_mask(function, x, tuple(range(-axes, 0)), mask, lengths)


def fits(mask: Tensor, wanted: tuple[int, ...]) -> bool:
    """Whether a mask broadcasts to the positions of an input."""
    if mask.dim() > len(wanted):
        return False
    return all(a in (1, b) for a, b in zip(reversed(mask.shape), reversed(wanted), strict=False))


def check_zeros_and_ones(function: str, mask: Tensor) -> None:
    """Refuse additive masks, 0 for real positions and -inf for padding, which would mean the opposite."""
    if mask.is_complex():
        raise ValueError(f"{function}: mask must be bool or 0 and 1; got {mask.dtype}; pass mask.bool()")
    if not has_memory(mask):
        return
    odd = mask[(mask != 0) & (mask != 1)]
    if odd.numel():
        raise ValueError(
            f"{function}: mask must be True or 1 at real positions and False or 0 at padding; got {float(odd[0])}; "
            "pass a bool mask"
        )


def check_lengths(function: str, lengths: Any, wanted: tuple[int, ...], x: Tensor) -> Tensor:
    """Lengths as a tensor, held against the input."""
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


def mask_of(lengths: Any, size: int) -> Tensor:
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
    lengths = torch.as_tensor(lengths)
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def shorten(mask: Tensor, kernel_size: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> Tensor:
    """The mask behind a convolution or a pooling over positions.

    An output position is real where its window touches a real position and would have existed had the sample been given
    without padding: a sample of n positions keeps (n + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1.

    Args:
        mask: (N, L), True or 1 at real positions.
        kernel_size, stride, padding, dilation: of the layer, in positions.

    Returns:
        (N, L'), bool.

    Raises:
        ValueError: a mask of other than two axes.

    Example:
        >>> anynorm.shorten(anynorm.mask_of([2, 5], 6), kernel_size=3, stride=2, padding=1)
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """
    if mask.dim() != 2:
        raise ValueError(
            f"shorten: mask must be (N, L); got {tuple(mask.shape)}; shorten each axis of an image by itself"
        )
    reach = dilation * (kernel_size - 1)
    real = mask.to(torch.float32)
    windows = F.pad(real, (padding, padding)).unfold(1, reach + 1, stride)[..., ::dilation]
    end = (real * torch.arange(1, real.shape[1] + 1, device=mask.device)).amax(1, keepdim=True)
    last = torch.arange(windows.shape[1], device=mask.device) * stride + reach  # counted from -padding
    return (windows.amax(2) > 0) & (last < end + 2 * padding)


# ---- the context ---------------------------------------------------------------------------------------------------

CURRENT: ContextVar[masked | None] = ContextVar("anynorm.masked", default=None)
SERVED: WeakKeyDictionary[nn.Module, masked] = WeakKeyDictionary()
LOCK = Lock()


class masked:
    """Hand a mask to every norm that is called inside, for models that have no argument for one.

    A norm takes the first mask that fits the positions of its input. Where strided layers shorten the positions, give
    the shorter masks too (`shorten` computes them). A norm behind the pooling of all positions, whose input is (N, C),
    needs none.

    The context belongs to the thread and to the asynchronous task that entered it. When activation checkpointing
    computes a norm again outside the context, or inside another, that is an error: call backward inside the context.

    Args:
        masks: (N, positions...), True or 1 at real positions.

    Raises:
        ValueError: at the norm, where no mask fits; both shapes are named.

    Example:
        >>> norm, x = anynorm.BatchNorm1d(1), torch.tensor([[[1.0, 3.0, 77.0]]])
        >>> with anynorm.masked(torch.tensor([[True, True, False]])):
        ...     norm(x).detach()
        tensor([[[-1.0000,  1.0000,  0.0000]]])
    """

    opened = 0  # contexts in the process: nothing is looked up where there are none

    def __init__(self, *masks: Tensor) -> None:
        if not masks or any(not isinstance(mask, Tensor) for mask in masks):
            got = ", ".join(type(mask).__name__ for mask in masks) or "nothing"
            raise TypeError(f"masked: one or more masks are needed; got {got}; pass mask_of(lengths, size)")
        self.masks = masks
        self._tokens: list[Token[masked | None]] = []

    def __enter__(self) -> masked:
        masked.count(1)
        self._tokens.append(CURRENT.set(self))
        return self

    def __exit__(self, *exception: object) -> None:
        masked.count(-1)
        CURRENT.reset(self._tokens.pop())

    @classmethod
    def count(cls, step: int) -> None:
        """Contexts are entered and left by any thread."""
        with LOCK:
            cls.opened += step

    def find(self, layer: nn.Module, positions: Sequence[int], shape: Sequence[int]) -> Tensor | None:
        """The mask for an input, None where it has no positions and no mask is about samples alone."""
        wanted = tuple(positions)
        for mask in self.masks:
            if mask.dim() == len(wanted) and fits(mask, wanted):
                return mask
        if len(wanted) < 2:
            return None
        known = " and ".join(str(tuple(mask.shape)) for mask in self.masks)
        raise ValueError(
            f"{describe(layer)}: no mask of anynorm.masked fits an input {tuple(shape)}, which needs one of {wanted}; "
            f"got {known}; pass the shorter mask too: masked(mask, anynorm.shorten(mask, kernel_size, stride))"
        )


def describe(layer: nn.Module) -> str:
    """A layer as it prints itself, with its name in the model where `accelerate` or `sync` has told it."""
    label = getattr(layer, "label", "")
    name = f"{label} = " if label else ""
    return f"{name}{type(layer).__name__}({layer.extra_repr()})"


def may_be_masked() -> bool:
    """Whether a norm must look for a context: one is open, or one may have been left before backward."""
    return masked.opened > 0 or (not torch.compiler.is_compiling() and len(SERVED) > 0)


def find_current(layer: nn.Module, positions: Sequence[int], shape: Sequence[int]) -> Tensor | None:
    """The mask that the context has for a layer's input."""
    context = CURRENT.get() if masked.opened else None
    if torch._C._current_graph_task_id() != -1 and SERVED.get(layer) is not context:
        raise RuntimeError(
            f"{describe(layer)}: activation checkpointing computes this norm again outside the anynorm.masked "
            "context of its forward, or inside one that forward had not; the mask would be another; call backward "
            "where forward was called"
        )
    if context is None:
        SERVED.pop(layer, None)
        return None
    SERVED[layer] = context
    return context.find(layer, positions, shape)
