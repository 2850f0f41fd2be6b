"""Which positions are real behind a layer whose windows slide over positions: `shorten`, and its twin for transposed
convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .masks import check_zeros_and_ones

POOLS: dict[type, int] = {
    **{nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3, nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3},
    **{nn.LPPool1d: 1, nn.LPPool2d: 2, nn.LPPool3d: 3},
}
TRANSPOSED: dict[type, int] = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
CONVOLUTIONS: dict[type, int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


class Window(NamedTuple):
    """How a layer slides along one axis; `before` and `after` are positions that it adds at the ends."""

    kernel_size: int
    stride: int = 1
    before: int = 0
    after: int = 0
    dilation: int = 1
    ceil: bool = False

    @property
    def reach(self) -> int:
        """From a window's first position to its last."""
        return self.dilation * (self.kernel_size - 1)

    def count(self, size: int) -> int:
        """How many windows there are over so many positions."""
        last_start = size + self.before + self.after - self.reach - 1
        if not self.ceil:
            return last_start // self.stride + 1
        # As torch: with ceil_mode the last window may reach out, but must begin inside the input or its left padding.
        count = -(-last_start // self.stride) + 1
        return count - 1 if (count - 1) * self.stride >= size + self.before else count

    def count_transposed(self, size: int) -> int:
        """How many positions a transposed layer makes of so many, without output_padding."""
        return (size - 1) * self.stride - self.before - self.after + self.reach + 1


def shorten(
    mask: Tensor,
    kernel_size: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The mask behind a convolution or a pooling over positions.

    An output position is real where the layer would have made it had the sample been given without padding: of n
    positions (n + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1 are kept, none where that is negative.
    Behind holes, an output is real where its window touches a real position.

    Args:
        mask: (N, L), or (N, H, W) and (N, D, H, W) for layers over more axes; True or 1 at real positions. Of a mask
            of several axes of positions one of size 1 is shared by all positions along it and stays.
        kernel_size: in positions, an int or one for each axis as a layer has it; or the layer itself, a convolution,
            transposed too, or a pooling of torch.nn, and nothing else.
        stride, padding, dilation, ceil_mode: of the layer, likewise; padding may be "same" or "valid".

    Returns:
        (N, L') or of as many axes as `mask`, bool.

    Raises:
        ValueError: axes or sizes that do not fit; a layer that no mask can be shortened for.
        TypeError: a mask that is no tensor; arguments that are no whole numbers.

    Note:
        A sample that begins at position a keeps as many as it would alone where the stride divides a.

    Example:
        >>> anynorm.shorten(anynorm.mask_of([2, 5], 6), kernel_size=3, stride=2, padding=1)
        tensor([[ True, False, False],
                [ True,  True,  True]])
        >>> anynorm.shorten(anynorm.mask_of([2, 5], 6), torch.nn.Conv1d(8, 8, 3, stride=2, padding=1)).shape
        torch.Size([2, 3])
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"shorten: mask must be a tensor; got {type(mask).__name__}; pass mask_of(lengths, size)")
    if mask.dtype != torch.bool:
        check_zeros_and_ones("shorten", mask)
    axes = mask.dim() - 1
    if not 1 <= axes <= 3:
        raise ValueError(
            f"shorten: mask must be (N, L), (N, H, W) or (N, D, H, W); got {tuple(mask.shape)}; add the axis of samples"
        )
    if isinstance(kernel_size, nn.Module):
        windows = find_windows(kernel_size, axes)
    else:
        windows = make_windows(axes, kernel_size, stride, padding, dilation, ceil_mode)
    # An axis of size 1 beside others is shared by all positions along it; alone, it is one position.
    own_windows = [window if axes == 1 or mask.shape[axis] != 1 else None for axis, window in enumerate(windows, 1)]
    if isinstance(kernel_size, nn.modules.conv._ConvTransposeNd):
        extra = read_option("output_padding", kernel_size.output_padding, axes)
        check_reach(mask.shape[1:], own_windows, extra)
        return apply_transposed_windows(mask.bool(), own_windows, extra)
    check_reach(mask.shape[1:], own_windows)
    return apply_windows(mask.bool(), own_windows)


def check_reach(sizes: Sequence[int], windows: Sequence[Window | None], extra: Sequence[int] | None = None) -> None:
    """Refuse layers that make no position of these; `extra` is a transposed layer's output_padding."""
    for axis, (size, window) in enumerate(zip(sizes, windows)):
        if window is None:
            continue
        made = window.count(size) if extra is None else window.count_transposed(size) + extra[axis]
        if made < 1:
            raise ValueError(
                f"shorten: the layer's reach must fit into the padded positions; got {size} positions, {window}; "
                "the layer refuses such a batch, too"
            )


def find_windows(layer: Any, axes: int) -> list[Window]:
    """How a layer of torch.nn slides along each axis."""
    kinds = {**POOLS, **TRANSPOSED, **CONVOLUTIONS}
    known = next((count for kind, count in kinds.items() if isinstance(layer, kind)), None)
    if known != axes:
        raise ValueError(
            f"shorten: a layer must be a convolution or pooling of torch.nn over as many axes as the mask, {axes}; got "
            f"{type(layer).__name__}; pass kernel_size, stride, padding and dilation"
        )
    stride = layer.kernel_size if layer.stride is None else layer.stride
    padding, dilation = getattr(layer, "padding", 0), getattr(layer, "dilation", 1)
    return make_windows(axes, layer.kernel_size, stride, padding, dilation, getattr(layer, "ceil_mode", False))


def make_windows(
    axes: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> list[Window]:
    """One window for each axis, from what a layer's constructor takes."""
    kernels, dilations = read_option("kernel_size", kernel_size, axes, 1), read_option("dilation", dilation, axes, 1)
    strides = read_option("stride", stride, axes, 1)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"shorten: padding must be 'same', 'valid' or whole numbers; got {padding!r}; correct it")
        if padding == "same" and any(stride != 1 for stride in strides):
            raise ValueError(
                f"shorten: padding='same' needs stride 1, as in torch; got {strides}; pass padding in positions"
            )
        whole = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernels, dilations)]
        ends = [(total // 2, total - total // 2) for total in whole]
    else:
        ends = [(one, one) for one in read_option("padding", padding, axes)]
    return [
        Window(k, s, before, after, d, bool(ceil_mode))
        for k, s, (before, after), d in zip(kernels, strides, ends, dilations)
    ]


def read_option(name: str, value: Any, axes: int, least: int = 0) -> list[int]:
    """An option for each axis, from one for all or one for each."""
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) for one in values):
        raise TypeError(f"shorten: {name} must be whole numbers; got {value!r}; pass the layer's own {name}")
    if len(values) not in (1, axes) or any(one < least for one in values):
        raise ValueError(
            f"shorten: {name} must be one number of {least} or more for each axis of positions, {axes}; got {value!r}; "
            f"pass the layer's own {name}"
        )
    return values * axes if len(values) == 1 else values


def find_ends(mask: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Each sample's first real position along an axis, and the one behind its last; both 0 where nothing is real."""
    line = mask.movedim(axis, 1).flatten(2).any(2) if mask.dim() > 2 else mask
    places = torch.arange(line.shape[1], device=line.device)
    end = torch.where(line, places + 1, 0).amax(1)
    begin = torch.where(line, places, line.shape[1]).amin(1)
    return torch.minimum(begin, end), end


def align(values: Tensor, axis: int, axes: int) -> Tensor:
    """(N, size) as a mask whose positions lie along one of its axes, size 1 along the others."""
    return values.view([values.shape[0], *(values.shape[1] if other == axis else 1 for other in range(1, axes + 1))])


def has_real_positions(mask: Tensor) -> Tensor:
    """Which samples have any real position, in the axes of the mask."""
    return mask.flatten(1).any(1).view(-1, *[1] * (mask.dim() - 1))


def apply_windows(mask: Tensor, windows: Sequence[Window | None]) -> Tensor:
    """The mask behind windows; None is an axis that all positions share.

    In positions that include what the layer adds before, window j is real if j * stride >= begin and
    j * stride + reach < end + before + after; with ceil_mode if it begins before end + before and reaches at most
    stride - 1 further.
    """
    axes, inside = len(windows), has_real_positions(mask)
    # `padded` is the mask with what the layer adds; `outside` is where a sample, taken alone, would have been padded.
    outside, padded = torch.zeros_like(mask), mask
    for axis, window in enumerate(windows, 1):
        if window is None:
            continue
        begin, end = (t[:, None] for t in find_ends(mask, axis))
        first = torch.arange(window.count(mask.shape[axis]), device=mask.device) * window.stride
        beyond = window.stride - 1 if window.ceil else 0
        real = (first >= begin) & (first + window.reach < end + window.before + window.after + beyond)
        if window.ceil:
            real = real & (first < end + window.before)
        inside = inside & align(real, axis, axes)
        pads = [0] * (2 * (axes - axis)) + [window.before, window.after + beyond]
        padded, outside = F.pad(padded, pads), F.pad(outside, pads)
        position = torch.arange(padded.shape[axis], device=mask.device) - window.before
        outside = outside | align((position < begin) | (position >= end), axis, axes)
    # A window that touches nothing but holes inside a sample makes no real position.
    return inside & touches_any(padded | outside, windows, inside.shape)


def touches_any(mask: Tensor, windows: Sequence[Window | None], sizes: torch.Size) -> Tensor:
    """Which windows touch a position of the mask, for the first `sizes` windows along each axis."""
    kernels = [1 if window is None else window.reach + 1 for window in windows]
    strides = [1 if window is None else window.stride for window in windows]
    touched = MAX_POOL[len(windows) - 1](mask.unsqueeze(1).to(torch.float32), kernels, strides).squeeze(1) > 0
    for axis, window in enumerate(windows, 1):
        if window is not None:
            touched = touched.narrow(axis, 0, sizes[axis])
    return touched


def apply_transposed_windows(mask: Tensor, windows: Sequence[Window | None], extra: Sequence[int]) -> Tensor:
    """The mask behind a transposed convolution; `extra` is its output_padding.

    Of n positions (n - 1) * stride - 2 * padding + reach + output_padding + 1 are made; holes count as real.
    """
    axes, inside = len(windows), has_real_positions(mask)
    for axis, (window, added) in enumerate(zip(windows, extra), 1):
        if window is None:
            continue
        begin, end = (t[:, None] for t in find_ends(mask, axis))
        beyond = window.reach + added + 1 - window.before - window.after
        position = torch.arange(window.count_transposed(mask.shape[axis]) + added, device=mask.device)
        real = (position >= begin * window.stride) & (position < (end - 1) * window.stride + beyond)
        inside = inside & align(real, axis, axes)
    return inside
