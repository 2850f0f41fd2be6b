"""Which modules are norms, what their gamma is, and which of them hooks cannot see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ...modules import batch
from ...modules.adapted import Adapted, read
from ...modules.ghost import _Ghost
from ...modules.norm import Norm
from ...modules.sync import _Synchronized
from ...surgery.adapters import find_adapters
from ...surgery.recalibration.data import unwrap

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, batch._BatchNorm)
NORMS = (*BATCH_NORMS, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, Norm)
SYNCHRONIZED = (_Synchronized, nn.SyncBatchNorm)


def find_norms(model: nn.Module) -> dict[str, Any]:
    """Every norm by its name in the model inside of wrappers; each object once."""
    found = {}
    for name, module in unwrap(model).named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if isinstance(module, NORMS) or find_adapters(module):
            found[".".join(part for part in name.split(".") if part != "_orig_mod")] = module
    return found


def find_compiled(model: nn.Module) -> set[nn.Module]:
    """Every module that torch.compile runs, whose hooks it would not call, or would take into its graph."""
    found: set[nn.Module] = set()
    for module in model.modules():
        is_compiled = isinstance(vars(module).get("_modules", {}).get("_orig_mod"), nn.Module)
        if is_compiled or getattr(module, "_compiled_call_impl", None) is not None:
            found.update(module.modules())
    return found


def keeps_averages(norm: Any) -> bool:
    """Whether it is a batch norm with running averages."""
    if not isinstance(norm, BATCH_NORMS):
        return False
    return isinstance(norm.running_mean, Tensor) and isinstance(norm.running_var, Tensor)


def moves_averages(norm: Any) -> bool:
    """Whether a batch in training is meant to move its running averages."""
    if not (keeps_averages(norm) and norm.training and norm.track_running_stats):
        return False
    frozen = getattr(norm, "frozen", None)
    return frozen is None or not frozen.updates


def find_gamma(norm: Any) -> tuple[Tensor | None, float]:
    """The parameter, and what gamma is more than it."""
    if isinstance(norm, Adapted):
        return read(norm, norm.adapter.weight), norm.adapter.weight_offset
    weight = getattr(norm, "weight", None)
    return (weight if isinstance(weight, Tensor) else None), 0.0


def count_parts(norm: Any, samples: int) -> float:
    """Into how many parts with statistics of their own a norm cuts its batch; below 1 where other ranks add theirs."""
    if not norm.training:
        return 1.0
    if isinstance(norm, _Ghost):
        return max(1.0, samples / norm.ghost_size)
    if isinstance(norm, SYNCHRONIZED) and torch.distributed.is_available() and torch.distributed.is_initialized():
        return 1 / max(torch.distributed.get_world_size(norm.process_group), 1)
    return 1.0


def list_nonfinite(norm: Any) -> Iterator[str]:
    """What of its own state is NaN or infinite."""
    gamma, _ = find_gamma(norm)
    known = (("gamma", gamma), *((name, getattr(norm, name, None)) for name in ("running_mean", "running_var")))
    for name, t in known:
        if isinstance(t, Tensor) and not nn.parameter.is_lazy(t) and not bool(t.detach().isfinite().all()):
            yield name


def find_rank() -> int:
    """Which of several processes this is; 0 where it is alone."""
    group = torch.distributed
    return group.get_rank() if group.is_available() and group.is_initialized() else 0
