"""Sequences of unlike lengths without padding: jagged nested tensors and packed sequences, as rows and back.

Rows are all positions of all sequences, (positions, C). Layer and RMS norm look at one row; batch norm at all of them:
for these the rows are an ordinary input. Instance and group norm need to know whose row each is.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..activations import check_finish, finish
from ..affine import scale_shift
from ..engine.protocol import is_renamed_memory
from ..engine.request import Request
from ..errors import check_channels, check_floating, check_groups
from ..sources import Given, update_running
from ..statistics import Moments, at_least_one, find_wide_dtype

# An input, jagged or not, or a packed one; a norm returns what it got.
Rows = TypeVar("Rows", Tensor, PackedSequence)


def is_ragged(x: Any) -> bool:
    """Whether x is a packed sequence or a jagged nested tensor."""
    if isinstance(x, PackedSequence):
        return True
    if type(x) is Tensor or not isinstance(x, Tensor) or is_renamed_memory(x):
        return False
    return x.is_nested and x.layout == torch.jagged


def find_ragged_axis(x: Tensor) -> int:
    """The axis of positions in a jagged tensor."""
    return next(axis for axis, size in enumerate(x.shape) if axis and not isinstance(size, int))


def open_rows(function: str, x: Any) -> Tensor:
    """The positions of all sequences, (positions, C...), a view of x."""
    if isinstance(x, PackedSequence):
        return x.data
    if x.lengths() is not None:
        raise ValueError(
            f"{function}: a jagged input must have no holes; got one with lengths; call contiguous() first"
        )
    found: Tensor = x.values().movedim(find_ragged_axis(x) - 1, 0)
    return found


def close_rows(rows: Tensor, x: Any) -> Any:
    """Rows as what x is: packed or jagged, with the sequences of x."""
    if isinstance(x, PackedSequence):
        return PackedSequence(rows, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
    axis = find_ragged_axis(x)
    values = rows.movedim(0, axis - 1)
    return torch.nested.nested_tensor_from_jagged(values, offsets=x.offsets(), jagged_dim=axis)


def find_owners(x: Any) -> tuple[Tensor, int]:
    """The sequence that each row belongs to, and how many sequences there are."""
    if isinstance(x, PackedSequence):
        count = int(x.batch_sizes[0])
        # Rows are packed step after step; at each step the longest sequences, which come first, still run.
        is_running = torch.arange(count, device=x.batch_sizes.device) < x.batch_sizes[:, None]
        return is_running.nonzero()[:, 1].to(x.data.device), count
    lengths = x.offsets().diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths), len(lengths)


def open_residual(function: str, x: Any, residual: Any) -> Tensor | None:
    """The residual's rows; it must be as ragged as x."""
    if residual is None:
        return None
    if type(residual) is not type(x):
        raise ValueError(
            f"{function}: residual must be ragged as the input is; got {type(residual).__name__}, input "
            f"{type(x).__name__}; convert one of them"
        )
    rows = open_rows(function, residual)
    if rows.shape != open_rows(function, x).shape:
        raise RuntimeError(
            f"{function}: residual must have the shape of the input; got {tuple(rows.shape)} rows, input "
            f"{tuple(open_rows(function, x).shape)}; convert one of them"
        )
    return rows


def by_sequence(
    function: str, x: Any, weight: Tensor | None, bias: Tensor | None, residual: Any, request: Request
) -> Any:
    """Instance norm, or group norm of `request.sizes` groups: statistics of each sequence and channel or group.

    y[i,c] = (x[i,c] - mean[o,g]) / sqrt(var[o,g] + eps) * weight[c] + bias[c],  o the owner of row i, g the group of c
    """
    rows, added = open_rows(function, x), open_residual(function, x, residual)
    source, eps, activation, _, _, groups = request
    channels, averages = rows.shape[1], (source[0], source[1])
    check_floating(function, rows)
    activation = check_finish(function, rows, activation, added)
    check_groups(function, rows, groups or 1)
    check_channels(function, channels, weight=weight, bias=bias, running_mean=averages[0], running_var=averages[1])
    if type(source) is Given and any(t is None for t in averages):
        raise RuntimeError(f"{function}: use_input_stats=False needs running statistics; got None; pass running_mean")
    wide = rows.to(find_wide_dtype(rows)).view(len(rows), groups or channels, channels // (groups or channels))
    if type(source) is Given:
        mean, var = (t.to(wide.dtype).view(1, -1, 1) for t in source)
    else:
        owners, count = find_owners(x)
        moments = find_sequence_moments(wide, owners, count)
        assert moments.mean is not None
        mean, var = moments.mean[owners], moments.var[owners]
        if averages[0] is not None:
            update_running(*averages, squeeze(moments), (0,), source.momentum)
    y = scale_shift(((wide - mean) * torch.rsqrt(var + eps)).view(rows.shape), weight, bias)
    return close_rows(finish(y, activation, added).to(rows.dtype), x)


def find_sequence_moments(wide: Tensor, owners: Tensor, count: int) -> Moments:
    """Moments of each sequence and group, (sequences, groups, 1), in two passes."""
    _, groups, size = wide.shape

    def add(rows: Tensor) -> Tensor:
        return wide.new_zeros(count, groups, 1).index_add(0, owners, rows.sum(2, keepdim=True))

    counts = torch.bincount(owners, minlength=count).to(wide.dtype).view(-1, 1, 1) * size
    mean = add(wide) / at_least_one(counts)
    mean = mean + add(wide - mean[owners]) / at_least_one(counts)
    return Moments(counts, mean, add((wide - mean[owners]).square()))


def squeeze(moments: Moments) -> Moments:
    """(sequences, channels)"""
    assert moments.mean is not None
    assert isinstance(moments.count, Tensor)
    return Moments(moments.count[..., 0], moments.mean[..., 0], moments.m2[..., 0])
