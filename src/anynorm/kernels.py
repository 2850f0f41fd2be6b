"""The compiled path: `plain.forward`, `forward_given` and `backward` once more, in C++, for tensors in ordinary memory.

Imported by `ops` alone. A pooling and a tensor become a `Plan`, eight integers that say how memory is walked; what has
no plan goes to `plain`, and so does everything where the compiled module is missing or ANYNORM_KERNELS=0.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from . import plain
from .plain import find_memory_format
from .pooling import Pooling, remember
from .statistics import Moments

try:
    from . import _kernels as compiled  # type: ignore[attr-defined]
except ImportError:
    compiled = None

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Axes in the order of memory, one letter for each run of alike: n keeps statistics of its own, a does and has a gamma
# of its own, p is pooled, b is pooled and has a gamma of its own.
SAMPLES_FIRST = re.compile("n?a?b?p?")
SAMPLES_LAST = re.compile("n?pa?b?")
BATCH = re.compile("p?ap?|p")


@dataclass(frozen=True)
class Plan:
    """How a tensor is walked.

    Attributes:
        packed: what the compiled module takes: n, g, k, s, channels last, pooled over n, centred, dtype.
        pools: how many elements share nothing: the size of mean and m2.
        channels: the size of gamma and beta.
        shape: of mean and m2, as they broadcast over the view.
        count: elements of a pool.
    """

    packed: tuple[int, ...]
    pools: int
    channels: int
    shape: tuple[int, ...]
    count: int


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
    pooling: Pooling, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, given: bool
) -> Plan | None:
    """The walk over x, or None where it is not one of the two.

    Args:
        shape, strides: of x.
        given: statistics are given, one for every channel, so samples share them.
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
    packed = (n, g, k, s, int(last), int(pool_n), int(pooling.centred), CODES[dtype])
    return Plan(packed, prod(statistics), g * k, statistics, n * s if pool_n else k * s)


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


def has_memory(*tensors: Tensor | None) -> bool:
    """Whether the elements stand in memory as they read; -x and zeros that are only noted do not."""
    return all(t is None or not (t.is_neg() or t._is_zerotensor()) for t in tensors)


def arrange(x: Tensor) -> Tensor:
    """x itself where its result is laid out alike, else a contiguous copy: cheaper than walks in torch operations."""
    return x if x.is_contiguous(memory_format=find_memory_format(x)) else x.contiguous()


def empty_output(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=find_memory_format(x))


def arrange_like(g: Tensor, x: Tensor) -> Tensor:
    """g laid out as x is; a gradient may arrive expanded."""
    return g if g.stride() == x.stride() else empty_output(x).copy_(g)


def ready(t: Tensor | None, dtype: torch.dtype, size: int) -> Tensor | None:
    """A parameter as the kernels read it: contiguous, in the dtype of the computation."""
    if t is None:
        return None
    if t.numel() != size:
        raise RuntimeError(f"kernels: a parameter has {t.numel()} elements where {size} are needed")
    if t.dtype != dtype:
        t = t.to(dtype)
    return t if t.is_contiguous() else t.contiguous()


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def find_parameter_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def prepare(x: Tensor, pooling: Pooling, given: bool, *others: Tensor | None) -> tuple[Tensor, Plan] | None:
    """x as the kernels read it, and its walk; None where `plain` must serve."""
    if OFF or not has_memory(x, *others):
        return None
    x = arrange(x)
    plan = find_plan(pooling, x.shape, x.stride(), x.dtype, given)
    return None if plan is None else (x, plan)


def forward(
    x: Tensor, pooling: Pooling, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Moments]:
    """See `plain.forward`."""
    prepared = prepare(x, pooling, False, weight, bias)
    if prepared is None:
        return plain.forward(x, pooling, weight, bias, eps)
    x, plan = prepared
    y = empty_output(x)
    dtype = find_parameter_dtype(x)
    gamma, beta = ready(weight, dtype, plan.channels), ready(bias, dtype, plan.channels)
    mean = torch.empty(plan.shape, dtype=torch.float64) if pooling.centred else None
    m2 = torch.empty(plan.shape, dtype=torch.float64)
    compiled.forward(
        plan.packed, eps, torch.get_num_threads(),
        x.data_ptr(), y.data_ptr(), address(gamma), address(beta), address(mean), m2.data_ptr(),
    )  # fmt: skip
    return y, Moments(plan.count, mean, m2)


def forward_given(
    x: Tensor, pooling: Pooling, weight: Tensor | None, bias: Tensor | None, eps: float, given: Moments
) -> Tensor:
    """See `plain.forward_given`."""
    prepared = prepare(x, pooling, True, weight, bias, given.mean, given.m2)
    if prepared is None or given.count != 1:
        return plain.forward_given(x, pooling, weight, bias, eps, given)
    x, plan = prepared
    y = empty_output(x)
    dtype = find_parameter_dtype(x)
    gamma, beta = ready(weight, dtype, plan.channels), ready(bias, dtype, plan.channels)
    mean, var = ready(given.mean, dtype, plan.pools), ready(given.m2, dtype, plan.pools)
    compiled.forward_given(
        plan.packed, eps, torch.get_num_threads(),
        x.data_ptr(), y.data_ptr(), address(gamma), address(beta), address(mean), address(var),
    )  # fmt: skip
    return y


def backward(
    g: Tensor,
    x: Tensor,
    pooling: Pooling,
    weight: Tensor | None,
    moments: Moments,
    eps: float,
    *,
    given: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `plain.backward`."""
    prepared = prepare(x, pooling, given, g, weight, moments.mean, moments.m2)
    if prepared is None or (given and moments.count != 1):
        return plain.backward(g, x, pooling, weight, moments, eps, given=given, needs=needs)
    x, plan = prepared
    g = arrange_like(g, x)
    dtype = find_parameter_dtype(x)
    wide = dtype if given else torch.float64
    gamma, mean, m2 = (
        ready(weight, dtype, plan.channels),
        ready(moments.mean, wide, plan.pools),
        ready(moments.m2, wide, plan.pools),
    )
    dx = empty_output(x) if needs[0] else None
    dgamma, dbeta = (torch.empty(plan.channels, dtype=dtype) if needed else None for needed in needs[1:3])
    compiled.backward(
        plan.packed, eps, torch.get_num_threads(), given,
        g.data_ptr(), x.data_ptr(), address(dx), address(gamma), address(mean), address(m2), address(dgamma),
        address(dbeta),
    )  # fmt: skip
    return dx, dgamma, dbeta
