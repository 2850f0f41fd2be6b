"""What a model's norms take by themselves: each on the shape it has in the model, torch.nn's and ours."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anynorm.apps.timing.cases import Case
from anynorm.apps.timing.limits import find_caches, find_last_level
from anynorm.doctor.call import Call

from .causes import Parts, find_causes
from .measure import time_mode
from .results import make_rows

KINDS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
SECONDS = 0.05  # for a shape in a mode


@dataclass(frozen=True)
class NormTimes:
    """Microseconds of all norms of a model together: torch.nn's, and the parts of ours."""

    torch: float
    ours: Parts


def find_norm_cases(model: nn.Module, call: Call) -> Counter[Case]:
    """The norms of torch.nn that a call runs, as cases, and how often each runs.

    An input that is neither contiguous nor channels_last counts as contiguous.
    """
    found: Counter[Case] = Counter()

    def record(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        is_last = x.dim() in LAST and not x.is_contiguous() and x.is_contiguous(memory_format=LAST[x.dim()])
        found[Case("model", type(norm).__name__, find_arguments(norm), tuple(x.shape), is_last, x.dtype)] += 1

    hooks = [norm.register_forward_pre_hook(record) for norm in model.modules() if isinstance(norm, KINDS)]
    try:
        with torch.no_grad():
            call.of(model.eval())
    finally:
        for hook in hooks:
            hook.remove()
    return found


def find_arguments(norm: nn.Module) -> tuple[int, ...]:
    """The sizes that a norm is made with."""
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        return tuple(norm.normalized_shape)
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups, norm.num_channels
    return (norm.num_features,)  # type: ignore[return-value] # torch annotates it as Tensor | Module


def time_norms(cases: Counter[Case], mode: str, seconds: float = SECONDS) -> NormTimes | None:
    """Time each case alone and add up; None where the kernels are off.

    Args:
        mode: of `MODES`.
        seconds: for each case.
    """
    cache = find_last_level(find_caches())
    theirs, parts = 0.0, []
    for case, count in cases.items():
        rounds, _ = time_mode(case, ["anynorm", "kernel", "fresh", "torch"], mode, case.draw(), seconds)
        rows = make_rows(case, mode, rounds, {}, cache)
        found = find_causes(rows)
        if not found:
            return None
        theirs += count * next(row.median_us for row in rows if row.peer == "torch")
        one = found[rows[0].key]
        parts.append([count * part for part in (one.kernel, one.memory, one.call, one.limit)])
    return NormTimes(theirs, Parts(*map(sum, zip(*parts, strict=True)))) if parts else None
