"""The compiled path: the formula once more, in C++, for tensors in ordinary memory.

`walks` says how memory is walked; what has no walk goes to `plain`, and so does everything where the compiled module is
missing or ANYNORM_KERNELS=0.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..pooling import Pooling
from ..statistics import Moments
from . import addresses
from .addresses import (
    Saved,
    Statistics,
    find_addresses,
    find_mask_address,
    make_statistics,
    open_statistics,
)
from .memory import find_address
from .plain import find_memory_format
from .request import Request
from .walks import Plan, make_plan
from .walks import compiled as compiled

PLANS_KEPT = 4096  # for each pooling


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
READS_TENSORS: bool = not OFF and compiled.find_torch()  # else their addresses are found in Python
if READS_TENSORS:
    compiled.set_activations(addresses.CHOICES)


def describe() -> dict[str, str]:
    """What is in use, for people."""
    if OFF:
        return {"kernels": f"off, the plain path serves: {OFF}"}
    isas = ", ".join(compiled.instruction_sets())
    return {
        "kernels": f"{compiled.instruction_set()} (this machine has {isas}; ANYNORM_ISA chooses)",
        "threads": compiled.thread_runtime() or "none: torch has no OpenMP runtime that can be shared",
    }


def arrange(x: Tensor) -> Tensor:
    """x itself where its result is laid out alike, else a contiguous copy: cheaper than walks in torch operations."""
    return x if x.is_contiguous() else x.contiguous(memory_format=find_memory_format(x))


def find_plan(x: Tensor, pooling: Pooling, statistics: int = 0, masked: bool = False) -> Plan | None:
    """The plan of x, remembered with its pooling; None where `plain` must serve."""
    key = (x.shape, x.stride(), x.dtype, statistics, masked)
    try:
        plan: Plan | None = pooling.plans[key]
        return plan
    except KeyError:
        plan = None if OFF or x.numel() == 0 else make_plan(pooling, *key)
        if len(pooling.plans) >= PLANS_KEPT:
            pooling.plans.clear()
        pooling.plans[key] = plan
        return plan


def arrange_for(x: Tensor, pooling: Pooling, statistics: int = 0, masked: bool = False) -> tuple[Tensor, Plan | None]:
    """x as `arrange` leaves it, or a contiguous copy where only that has a plan, and the plan.

    A copy costs less than the formula in torch operations; its results are contiguous, too.
    """
    x = arrange(x)
    plan = find_plan(x, pooling, statistics, masked)
    if plan is None and not x.is_contiguous():
        flat = x.contiguous()
        plan = find_plan(flat, pooling, statistics, masked)
        x = x if plan is None else flat
    return x, plan


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    request: Request,
    plan: Plan,
    *,
    keep: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """y = activation(norm(x) + residual), see `plain.compose`; and mean and m2, or the given mean and variance.

    Args:
        x: as `arrange` leaves it.
        request: its source is `Batch` or `Given`.
        keep: whether the statistics are wanted, to stay as they are; else they may be None.
    """
    if READS_TENSORS:
        found: tuple[Tensor, Statistics | None] | None
        found = compiled.forward_tensors(plan, x, weight, bias, residual, request, keep)
        if found is not None:
            return found
    return addresses.forward(x, weight, bias, residual, request, plan, keep=keep)


def find_moments(x: Tensor, pooling: Pooling, mask: Tensor | None = None) -> Moments | None:
    """Statistics alone, as synchronization and recalibration need them; None where x has no walk."""
    x = arrange(x)
    plan = find_plan(x, pooling, masked=mask is not None)
    if plan is None:
        return None
    return open_statistics(find_statistics(x, plan, mask), plan, mask)


def find_statistics(x: Tensor, plan: Plan, mask: Tensor | None = None) -> Tensor:
    """What `forward` leaves as statistics, alone."""
    statistics = make_statistics(plan)
    mean, m2, _ = find_addresses(statistics, plan)
    compiled.statistics(
        plan.compiled,
        threads=torch.get_num_threads(),
        x=find_address("input", x, plan.bytes),
        mask=find_mask_address(mask, plan),
        mean=mean,
        m2=m2,
    )
    return statistics


def backward(
    g: Tensor, saved: Saved, plan: Plan, eps: float, activation: str | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, gamma, beta and the residual; `needs` says which of the four are wanted.

    xhat   = (x - mean) * rstd
    dbeta  = sum g,  dgamma = sum g * xhat                        over everything that shares a gamma
    dx     = rstd * (gamma * g - mean(gamma * g) - xhat * mean(gamma * g * xhat))      means over the pool
    dx     = rstd * gamma * g                                                          where statistics were given
    """
    x, weight, bias, residual, mask, statistics = saved
    is_sum = activation is None and mask is None and needs[3]  # the compiled call would return g itself
    if READS_TENSORS and not is_sum:
        known = statistics if isinstance(statistics, tuple) else (statistics,)
        how = plan, eps, activation, isinstance(statistics, tuple), None, None
        found: tuple[Any, ...] | None = compiled.backward_tensors(
            g, (x, weight, bias, residual, mask, *known), how, tuple(needs)
        )
        if found is not None:
            return found[:4]
    return addresses.backward(g, saved, plan, eps, activation, needs)
