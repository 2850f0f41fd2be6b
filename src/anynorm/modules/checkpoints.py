"""What a norm takes from a checkpoint whose counter is no counter, or whose variance is negative by rounding.

Averaged checkpoints have counted 7.5 batches, those kept in half precision Inf. torch loads both in silence. The
counter weighs batches with ``momentum=None`` only, so it is no reason to refuse the rest.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import has_values

COUNTERS = ("num_batches_tracked", "num_batches_per_step")
MOST_IN_HALF = 65_504  # Where float16 ends: a counter that is Inf has seen at least as many.
MOST = 2**53
LEAST_VARIANCE = -torch.finfo(torch.float32).eps  # A hundredth of the default eps.


def repair_state(state: dict[str, Any], prefix: str, suffix: str = "") -> dict[str, Any]:
    """A norm's entries as they are taken; a copy where any is changed, which is said."""
    changed: dict[str, Tensor] = {}
    for key in (prefix + name + suffix for name in COUNTERS):
        counter = state.get(key)
        if has_values(counter) and not counter.is_complex() and (taken := repair_counter(key, counter)) is not counter:
            changed[key] = taken
    key = f"{prefix}running_var{suffix}"
    var = state.get(key)
    if has_values(var) and not var.is_complex() and bool((var < 0).any()) and not bool((var < LEAST_VARIANCE).any()):
        warnings.warn(f"{key} is negative by rounding, and taken as 0 there; got {float(var.min()):.6g}", stacklevel=2)
        changed[key] = var.detach().clamp(min=0)
    return {**state, **changed} if changed else state


def repair_counter(key: str, counter: Tensor) -> Tensor:
    """Whole numbers of 0 or more: rounded, 65,504 for Inf, 0 for NaN and what is negative."""
    if not counter.is_floating_point() and not bool((counter < 0).any()):
        return counter
    wide = counter.detach().double()
    taken = wide.nan_to_num(nan=0, posinf=MOST_IN_HALF).round().clamp(0, MOST)
    if not torch.equal(taken, wide):
        warnings.warn(
            f"{key} must be a whole number of 0 or more; got {counter.tolist()}, taken as {taken.long().tolist()}; it "
            "weighs batches with momentum=None, starts the schedule of batch renormalization, and matters nowhere else",
            stacklevel=2,
        )
    return taken.long()
