"""Which walk over memory serves a tensor? A pooling and a tensor's strides become a `Layout`, the sizes in a `Plan`."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch

from ..pooling import Pooling
from .plain import suggest_memory_format

compiled: Any = None  # the compiled module; None where it was not built
with suppress(ImportError):
    from .. import _kernels  # type: ignore[attr-defined] # without stubs

    compiled = _kernels

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Axes in the order of memory, one letter for each run of alike: n keeps statistics of its own, a does and has a gamma
# of its own, p is pooled, b is pooled and has a gamma of its own.
SAMPLES_FIRST = re.compile("n?a?b?p?")
SAMPLES_LAST = re.compile("n?pa?b?")
BATCH = re.compile("p?ap?|p")


class Layout(NamedTuple):
    """How a tensor is walked, as the compiled module takes it by these names.

    Memory is [n][g][k][s], or [n][s][g][k] with channels last; gamma and beta vary over (g, k).

    Attributes:
        pool_n: whether one g is pooled over all n; else each (n, g) has statistics of its own.
        dtype: of x, as in `CODES`.
        statistics: 0 they come from x; 1 they are given in the dtype of the parameters; 2 they are given in float64.
        sample_rows: with a mask, how many n are one sample whose positions are its rows; 0 where positions are s.
    """

    n: int
    g: int
    k: int
    s: int
    channels_last: bool
    pool_n: bool
    centred: bool
    dtype: int
    statistics: int
    sample_rows: int


@dataclass(frozen=True)
class Plan:
    """How a tensor is walked, and what the kernels need to know of what belongs to it.

    Attributes:
        pooling: what it is a plan for.
        compiled: the layout as the compiled module keeps it, checked once.
        layout: the same, to look at.
        pools: how many elements share nothing: the size of mean and m2.
        channels: the size of gamma and beta.
        shape: of mean and m2, as they broadcast over the view.
        count: elements of a pool.
        memory_format: of results, which differ from x at most in the strides of axes of size 1.
        sizes, strides, dtype: of x.
        parameter: the dtype that kernels read gamma and beta in.
        statistics_dtype: of given statistics; float64 where they come from x.
        bytes, parameter_bytes: of x, and of gamma as kernels read it.
        like: shape and dtype of the gradients of gamma and beta as kernels make them.
    """

    pooling: Pooling
    compiled: Any
    layout: Layout
    pools: int
    channels: int
    shape: tuple[int, ...]
    count: int
    centred: bool
    memory_format: torch.memory_format
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    parameter: torch.dtype
    statistics_dtype: torch.dtype
    bytes: int
    parameter_bytes: int
    like: tuple[torch.Size, torch.dtype]


def open_sizes(pooling: Pooling, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Sizes and strides of the opened view, without making it."""
    sizes, steps = list(shape), list(strides)
    for axis, parts in pooling.splits:
        known = -prod(parts)
        parts = tuple(sizes[axis] // known if part == -1 else part for part in parts)
        step = steps[axis]
        inner = [step * prod(parts[i + 1 :]) for i in range(len(parts))]
        sizes[axis : axis + 1], steps[axis : axis + 1] = parts, inner
    return sizes, steps


def make_plan(
    pooling: Pooling,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    statistics: int,
    masked: bool = False,
) -> Plan | None:
    """The plan for x, or None where no walk serves; `kernels.make_plan` remembers it.

    Args:
        shape, strides: of x.
        statistics: as `Layout.statistics`; given ones are one for every channel, so that samples share them.
        masked: whether a mask will tell which positions count.
    """
    if dtype not in CODES:
        return None
    extents, steps = open_sizes(pooling, shape, strides)
    hidden = {*pooling.pooled, *pooling.samples} if statistics else set(pooling.pooled)
    letters, sizes = find_letters(pooling, hidden, extents, steps)
    n, g, k, s = (sizes[letters.index(letter)] if letter in letters else 1 for letter in "nabp")
    last = pool_n = False
    if BATCH.fullmatch(letters):
        before, _, after = letters.partition("a")
        n, s = (sizes[0] if before else 1), (sizes[-1] if after else 1)
        pool_n = True
    elif statistics:
        return None
    elif SAMPLES_LAST.fullmatch(letters) and not SAMPLES_FIRST.fullmatch(letters):
        last = True
    elif not SAMPLES_FIRST.fullmatch(letters):
        return None
    statistics_shape = tuple(1 if axis in hidden else extent for axis, extent in enumerate(extents))
    sample_rows = 0
    if masked and s == 1 and not last:
        follows = letters != "p" and has_lone_position(pooling, extents)
        is_last = len(shape) > 3 and strides[1] < min(strides[2:])
        last = follows and is_last and not pool_n
        sample_rows = 0 if last or (follows and not is_last) else max(1, n // shape[0]) if pool_n else 1
    layout = Layout(n, g, k, s, last, pool_n, pooling.centred, CODES[dtype], statistics, sample_rows)
    parameter = torch.float64 if dtype is torch.float64 else torch.float32
    return Plan(
        pooling=pooling,
        compiled=compiled.Plan(**layout._asdict()),
        layout=layout,
        pools=prod(statistics_shape),
        channels=g * k,
        shape=statistics_shape,
        count=n * s if pool_n else k * s,
        centred=pooling.centred,
        memory_format=suggest_memory_format(shape, strides),
        sizes=shape,
        strides=strides,
        dtype=dtype,
        parameter=parameter,
        statistics_dtype=parameter if statistics == 1 else torch.float64,
        bytes=prod(shape) * dtype.itemsize,
        parameter_bytes=g * k * parameter.itemsize,
        like=(torch.Size((g * k,)), parameter),
    )


def has_lone_position(pooling: Pooling, sizes: list[int]) -> bool:
    """Whether channels are followed by positions, but by one: padded, as by more, it must be walked alike."""
    behind = range(max(pooling.affine, default=-1) + 1, len(sizes))
    return any(axis in pooling.pooled and sizes[axis] == 1 for axis in behind)


def find_letters(pooling: Pooling, hidden: set[int], sizes: list[int], strides: list[int]) -> tuple[str, list[int]]:
    """Letters and sizes of the axes in the order of memory, alike neighbours as one.

    "?" where memory has holes, or where statistics or parameters are not in the order of memory.
    """
    axes = sorted((a for a, size in enumerate(sizes) if size > 1), key=lambda a: strides[a], reverse=True)
    expected = 1
    for axis in reversed(axes):
        if strides[axis] != expected:
            return "?", [0]
        expected *= sizes[axis]
    for ordered in ([a for a in axes if a not in hidden], [a for a in axes if a in pooling.affine]):
        if ordered != sorted(ordered):
            return "?", [0]
    letters = ""
    merged: list[int] = []
    for axis in axes:
        letter = ("np", "ab")[axis in pooling.affine][axis in hidden]
        if letters.endswith(letter):
            merged[-1] *= sizes[axis]
        else:
            letters += letter
            merged.append(sizes[axis])
    return letters, merged
