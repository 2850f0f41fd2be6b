"""The compiled path: the formula once more, in C++, for tensors in ordinary memory.

Imported by `ops` alone. A pooling and a tensor become a `Plan`, ten integers that say how memory is walked; what has no
plan goes to `plain`, and so does everything where the compiled module is missing or ANYNORM_KERNELS=0.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from .activations import ACTIVATIONS, IDENTITY
from .plain import find_memory_format
from .pooling import Pooling, remember
from .statistics import Moments

try:
    from . import _kernels as compiled  # type: ignore[attr-defined]
except ImportError:
    compiled = None

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
CHOICES = {IDENTITY: 0} | {name: code for code, name in enumerate((None, *ACTIVATIONS))}  # as enum Activation counts
PLANS_KEPT = 4096  # for each pooling

Statistics = Tensor | tuple[Tensor, Tensor]  # all pools' mean and m2 in one, or a given mean and variance
Running = tuple[Tensor, Tensor, float]  # running mean and variance, and the weight of the new value

# Axes in the order of memory, one letter for each run of alike: n keeps statistics of its own, a does and has a gamma
# of its own, p is pooled, b is pooled and has a gamma of its own.
SAMPLES_FIRST = re.compile("n?a?b?p?")
SAMPLES_LAST = re.compile("n?pa?b?")
BATCH = re.compile("p?ap?|p")


@dataclass(frozen=True)
class Plan:
    """How a tensor is walked.

    Attributes:
        walk: sizes, as the compiled module keeps them.
        packed: the same, to look at: n, g, k, s, channels last, pooled over n, centred, dtype, given, rows of a sample.
        pools: how many elements share nothing: the size of mean and m2.
        channels: the size of gamma and beta.
        shape: of mean and m2, as they broadcast over the view.
        count: elements of a pool.
    """

    walk: Any
    packed: tuple[int, ...]
    pools: int
    channels: int
    shape: tuple[int, ...]
    count: int
    centred: bool


def why_off() -> str:
    """Why the kernels are not in use, or an empty string."""
    if os.environ.get("ANYNORM_KERNELS", "1") == "0":
        return "ANYNORM_KERNELS=0"
    if compiled is None:
        return "the compiled module is not installed (was there a C++ compiler?)"
    wanted = os.environ.get("ANYNORM_ISA", "")
    if not compiled.choose_instruction_set(wanted):
        return f"ANYNORM_ISA={wanted}: this machine has {', '.join(compiled.instruction_sets())}"
    return ""


OFF = why_off()


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


def describe() -> dict[str, str]:
    """What is in use, for people."""
    if OFF:
        return {"kernels": f"off, the plain path serves: {OFF}"}
    isas = ", ".join(compiled.instruction_sets())
    return {
        "kernels": f"{compiled.instruction_set()} (this machine has {isas}; ANYNORM_ISA chooses)",
        "threads": compiled.thread_runtime() or "none: torch has no OpenMP runtime that can be shared",
    }


@remember
def find_plan(
    pooling: Pooling,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    given: int,
    masked: bool = False,
) -> Plan | None:
    """The walk over x, or None where it is not one of the two.

    Args:
        shape, strides: of x.
        given: 1 where statistics are given in the dtype of the parameters, 2 in float64, one for every channel, so that
            samples share them; else 0.
        masked: whether a mask will tell which positions count.
    """
    if dtype not in CODES:
        return None
    extents, steps = open_sizes(pooling, shape, strides)
    hidden = {*pooling.pooled, *pooling.samples} if given else set(pooling.pooled)
    letters, sizes = find_letters(pooling, hidden, extents, steps)
    n, g, k, s = (sizes[letters.index(letter)] if letter in letters else 1 for letter in "nabp")
    last = pool_n = False
    if BATCH.fullmatch(letters):
        before, _, after = letters.partition("a")
        n, s = (sizes[0] if before else 1), (sizes[-1] if after else 1)
        pool_n = True
    elif given:
        return None
    elif SAMPLES_LAST.fullmatch(letters) and not SAMPLES_FIRST.fullmatch(letters):
        last = True
    elif not SAMPLES_FIRST.fullmatch(letters):
        return None
    statistics = tuple(1 if axis in hidden else extent for axis, extent in enumerate(extents))
    # Where positions are rows, as in (N, L, C), sums begin anew with each sample, so that padding changes no bit.
    sample_rows = n // shape[0] if masked and pool_n and s == 1 and n > shape[0] else 0
    packed = (n, g, k, s, last, pool_n, pooling.centred, CODES[dtype], given, sample_rows)
    count = n * s if pool_n else k * s
    return Plan(compiled.Plan(*packed), packed, prod(statistics), g * k, statistics, count, pooling.centred)


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


def arrange(x: Tensor) -> Tensor:
    """x itself where its result is laid out alike, else a contiguous copy: cheaper than walks in torch operations."""
    return x if x.is_contiguous() or x.is_contiguous(memory_format=find_memory_format(x)) else x.contiguous()


def arrange_like(t: Tensor, x: Tensor) -> Tensor:
    """t laid out as x is; a gradient may arrive expanded."""
    return t if t.stride() == x.stride() else torch.empty_like(x).copy_(t)


def ready(t: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """A parameter as the kernels read it: contiguous, in the dtype of the computation."""
    if t.numel() != size:
        raise RuntimeError(f"kernels: a parameter has {t.numel()} elements where {size} are needed")
    return t if t.dtype is dtype and t.is_contiguous() else t.to(dtype).contiguous()


def parameter_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def find_walk(x: Tensor, pooling: Pooling, given: int = 0, masked: bool = False) -> Plan | None:
    """The plan of x, remembered with its pooling; None where `plain` must serve."""
    key = (x.shape, x.stride(), x.dtype, given, masked)
    try:
        return pooling.plans[key]
    except KeyError:
        plan = None if OFF or x.numel() == 0 else find_plan(pooling, *key)
        if len(pooling.plans) >= PLANS_KEPT:
            pooling.plans.clear()
        pooling.plans[key] = plan
        return plan


def forward(
    x: Tensor,
    plan: Plan,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    statistics: Statistics | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    running: Running | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """y = activation(norm(x) + residual), see `plain.forward`.

    Args:
        x: as `arrange` leaves it.
        statistics: room for mean and m2, or the given mean and variance; None where nobody wants them.
        running: averages to move.
        mask: as in `ops.normalize`.
    """
    y = torch.empty_like(x)
    dtype = parameter_dtype(x)
    gamma = weight if weight is None else ready(weight, dtype, plan.channels)
    beta = bias if bias is None else ready(bias, dtype, plan.channels)
    if residual is not None:
        residual = arrange_like(residual, x)
    mean, m2 = find_addresses(statistics, plan)
    averages = (0, 0, 0, 0.0) if running is None else (running[0].data_ptr(), running[1].data_ptr(), 0, running[2])
    compiled.forward(
        plan.walk, eps, torch.get_num_threads(), CHOICES[activation],
        x.data_ptr(), address(residual), y.data_ptr(), address(gamma), address(beta), mean, m2,
        find_weight(mask, plan), *averages,
    )  # fmt: skip
    return y


def make_statistics(plan: Plan) -> Tensor:
    """Room for the means and then the m2 of all pools; of an uncentred norm for the m2 alone."""
    return torch.empty(plan.pools * (2 if plan.centred else 1), dtype=torch.float64)


def find_addresses(statistics: Statistics | None, plan: Plan) -> tuple[int, int]:
    """Where mean and m2, or a given mean and variance, are."""
    if statistics is None:
        return 0, 0
    if isinstance(statistics, tuple):
        return statistics[0].data_ptr(), statistics[1].data_ptr()
    start = statistics.data_ptr()
    return (start, start + 8 * plan.pools) if plan.centred else (0, start)


def open_statistics(statistics: Tensor, plan: Plan, mask: Tensor | None = None) -> Moments:
    """What the kernels left in the room for statistics."""
    count: int | Tensor = plan.count if mask is None else find_count(mask, plan)
    if not plan.centred:
        return Moments(count, None, statistics.view(plan.shape))
    mean, m2 = statistics.view(2, *plan.shape).unbind()
    return Moments(count, mean, m2)


def find_weight(mask: Tensor | None, plan: Plan) -> int:
    """Where the mask is: one float for each of n and s, in this order, as a contiguous mask has them."""
    if mask is None:
        return 0
    n, _, _, s, *_ = plan.packed
    if mask.numel() != n * s or not mask.is_contiguous() or mask.dtype is not torch.float32:
        raise RuntimeError(f"kernels: a mask must be {n * s} contiguous floats; got {mask.numel()} of {mask.dtype}")
    return mask.data_ptr()


def find_count(mask: Tensor, plan: Plan) -> Tensor:
    """Elements of each pool that count, as they broadcast over its mean."""
    n, _, k, s, _, pool_n, *_ = plan.packed
    if pool_n:
        return mask.sum(dtype=torch.float64)
    count = mask.view(n, s).sum(1, dtype=torch.float64) * k
    return count.view([size if axis == 0 else 1 for axis, size in enumerate(plan.shape)])


def ready_statistics(given: tuple[Tensor, Tensor], plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
    """A given mean and variance as the kernels read them."""
    dtype = parameter_dtype(x)
    return ready(given[0], dtype, plan.pools), ready(given[1], dtype, plan.pools)


def find_moments(x: Tensor, pooling: Pooling) -> Moments | None:
    """Statistics alone, as synchronization and recalibration need them; None where x has no walk."""
    x = arrange(x)
    plan = find_walk(x, pooling)
    if plan is None:
        return None
    statistics = make_statistics(plan)
    mean, m2 = find_addresses(statistics, plan)
    compiled.forward(plan.walk, 0.0, torch.get_num_threads(), 0, x.data_ptr(), 0, 0, 0, 0, mean, m2, 0, 0, 0, 0, 0.0)
    return open_statistics(statistics, plan)


def can_move(plan: Plan, x: Tensor, mean: Tensor, var: Tensor, momentum: float | Tensor) -> bool:
    """Whether the kernels can move running averages: in memory, as wide as parameters are, by a plain number."""
    dtype = parameter_dtype(x)
    return (
        not plan.packed[2] > 1
        and type(momentum) is float
        and momentum >= 0
        and mean.dtype is dtype
        and var.dtype is dtype
        and mean.is_contiguous()
        and var.is_contiguous()
        and mean.numel() == var.numel() == plan.channels
    )


def backward(
    g: Tensor,
    x: Tensor,
    plan: Plan,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics,
    eps: float,
    needs: Sequence[bool],
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, gamma, beta and the residual, see `plain.backward`.

    Args:
        x: as `arrange` left it for `forward`.
        needs: which of the four are wanted.
    """
    g = arrange_like(g, x)
    dtype = parameter_dtype(x)
    gamma = weight if weight is None else ready(weight, dtype, plan.channels)
    beta = bias if bias is None else ready(bias, dtype, plan.channels)
    if residual is not None:
        residual = arrange_like(residual, x)
    dx = torch.empty_like(x) if needs[0] else None
    dgamma = torch.empty(plan.channels, dtype=dtype) if needs[1] else None
    dbeta = torch.empty(plan.channels, dtype=dtype) if needs[2] else None
    dresidual = torch.empty_like(x) if needs[3] else None
    mean, m2 = find_addresses(statistics, plan)
    compiled.backward(
        plan.walk, eps, torch.get_num_threads(), CHOICES[activation],
        g.data_ptr(), x.data_ptr(), address(residual), address(dx), address(dresidual), address(gamma), address(beta),
        mean, m2, find_weight(mask, plan), address(dgamma), address(dbeta),
    )  # fmt: skip
    return dx, dgamma, dbeta, dresidual
