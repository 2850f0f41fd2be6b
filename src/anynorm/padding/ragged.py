"""Sequences of unlike lengths without padding: jagged nested tensors and packed sequences, as rows and back.

Rows are all positions of all sequences, (positions, C). Layer and RMS norm look at one row; batch norm at all of them:
for these the rows are an ordinary input. Instance and group norm need to know whose row each is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..activations import check_finish, finish
from ..engine.protocol import is_renamed_memory
from ..errors import check_channels, check_floating, check_groups
from ..sources import update_running
from ..statistics import Moments, at_least_one, find_wide_dtype


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
    return x.values().movedim(find_ragged_axis(x) - 1, 0)


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


def by_rows(norm: Callable[..., Tensor], x: Any, residual: Any, *arguments: Any, activation: str | None) -> Any:
    """Apply a norm to the rows of x, which to it are an ordinary input."""
    rows = norm(
        open_rows(norm.__name__, x),
        *arguments,
        activation=activation,
        residual=open_residual(norm.__name__, x, residual),
    )
    return close_rows(rows, x)


def by_sequence(
    function: str,
    x: Any,
    residual: Any,
    groups: int | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    activation: str | None,
    running: tuple[Tensor, Tensor, float] | None = None,
    from_batch: bool = True,
) -> Any:
    """Instance norm, or with `groups` group norm: a mean and a variance for each sequence and channel or group.

    y[i,c] = (x[i,c] - mean[o,g]) / sqrt(var[o,g] + eps) * weight[c] + bias[c],  o the owner of row i, g the group of c

    Args:
        function: whose call it is, for errors.
        running: running mean and variance, and the weight of the new value.
        from_batch: whether the statistics come from x; else from `running`.
    """
    rows, added = open_rows(function, x), open_residual(function, x, residual)
    channels, averages = rows.shape[1], running or (None, None)
    check_floating(function, rows)
    activation = check_finish(function, rows, activation, added)
    check_groups(function, rows, groups or 1)
    check_channels(function, channels, weight=weight, bias=bias, running_mean=averages[0], running_var=averages[1])
    if not from_batch and running is None:
        raise RuntimeError(f"{function}: use_input_stats=False needs running statistics; got None; pass running_mean")
    wide = rows.to(find_wide_dtype(rows)).view(len(rows), groups or channels, channels // (groups or channels))
    if from_batch:
        mean, var = take_batch_statistics(wide, x, running)
    else:
        mean, var = (t.to(wide.dtype).view(1, -1, 1) for t in running[:2])  # type: ignore[index]
    y = ((wide - mean) * torch.rsqrt(var + eps)).view(rows.shape)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return close_rows(finish(y, activation, added).to(rows.dtype), x)


def take_batch_statistics(wide: Tensor, x: Any, running: tuple[Tensor, Tensor, float] | None) -> tuple[Tensor, Tensor]:
    """Mean and variance for each row and group, those of the row's sequence; running averages are moved."""
    owners, count = find_owners(x)
    moments = find_sequence_moments(wide, owners, count)
    mean, var = moments.mean[owners], moments.var[owners]  # type: ignore[index]
    if running is not None:
        update_running(running[0], running[1], squeeze(moments), (0,), running[2])
    return mean, var


def find_sequence_moments(wide: Tensor, owners: Tensor, count: int) -> Moments:
    """Moments of each sequence and group, (sequences, groups, 1), in two passes."""
    _, groups, size = wide.shape

    def add(rows: Tensor) -> Tensor:
        return wide.new_zeros(count, groups, 1).index_add(0, owners, rows.sum(2, keepdim=True))

    counts = torch.bincount(owners, minlength=count).to(wide.dtype).view(-1, 1, 1) * size
    mean = add(wide) / at_least_one(counts)
    # Once more about the mean: what the first sum rounded away.
    mean = mean + add(wide - mean[owners]) / at_least_one(counts)
    return Moments(counts, mean, add((wide - mean[owners]).square()))


def squeeze(moments: Moments) -> Moments:
    """Moments (sequences, channels, 1) without their last axis."""
    assert moments.mean is not None
    assert isinstance(moments.count, Tensor)
    return Moments(moments.count[..., 0], moments.mean[..., 0], moments.m2[..., 0])
