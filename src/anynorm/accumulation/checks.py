"""What cannot take part, and why: before anything runs, and at the call of a norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from ..functional.batch import BATCH_NORM
from ..modules import batch
from ..modules.pattern import AnyNorm
from ..modules.recurrent.norms import _BatchRows
from ..padding.masks import describe
from ..pooling import parse

OWN_WAY = "it pools or corrects in its own way; accumulate anynorm.BatchNorm1d/2d/3d, or call it batch by batch"


def check_model(model: nn.Module, batches: list[Any]) -> dict[Any, str]:
    """Refuse a model or batches that cannot be accumulated; the names of the model's batch norms."""
    if not batches:
        raise ValueError("accumulate: one or more micro-batches are needed; got none; skip the step")
    if not torch.is_grad_enabled():
        raise RuntimeError("accumulate: it computes gradients; got torch.no_grad(); call it outside")
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "accumulate: it runs forward several times and sums no gradients over ranks; got DistributedDataParallel; "
            "pass model.module, then all_reduce the gradients"
        )
    names: dict[Any, str] = {}
    for name, module in model.named_modules():
        reason = find_reason(module)
        if reason:
            raise ValueError(
                f"accumulate: {name or 'the model'} cannot take part; got {type(module).__name__}; {reason}"
            )
        if isinstance(module, batch._BatchNorm):
            names[module] = name or "the model"
    return names


def find_reason(module: Any) -> str:
    """Why a module would be wrong in silence, and what helps; empty where it can take part."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc] # torch annotates self
        return "it has not seen an input; run one batch first"
    from_batch = module.training or getattr(module, "running_mean", None) is None
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, batch._BatchNorm) and from_batch:
        return "its statistics are out of reach; call anynorm.accelerate(model) first"
    if isinstance(module, batch._BatchNorm) and module.training and not is_plain(module):
        return OWN_WAY
    if isinstance(module, _BatchRows) and module.training:
        return "batch norm inside a recurrence takes its statistics step by step; choose norm='layer'"
    if isinstance(module, AnyNorm) and from_batch and pools_samples(module):
        return "its statistics are its own; use anynorm.BatchNorm1d/2d/3d where the pattern is theirs"
    return ""


def check_layer(layer: Any, names: dict[Any, str]) -> None:
    """Refuse a batch norm that is met in a forward and that `check_model` did not see, or saw in another state."""
    if layer not in names:
        raise ValueError(
            f"accumulate: loss must call no batch norm in training that is not in model; got {describe(layer)}; pass "
            "torch.nn.ModuleList([model, other]), whose gradients and buffers are then kept, too"
        )
    if not is_plain(layer):
        raise ValueError(f"accumulate: {names[layer]} cannot take part; got {type(layer).__name__}; {OWN_WAY}")


def is_plain(norm: batch._BatchNorm) -> bool:
    """Whether it is batch norm in training, too; ghost batch norm and batch renormalization are not."""
    return norm.front is BATCH_NORM


def pools_samples(norm: AnyNorm) -> bool:
    """Whether the first axis is among those that share statistics."""
    left, right = parse(norm.pattern)
    return any(name not in right for name in left[0])


def make_order_error(place: int, got: str, expected: str) -> RuntimeError:
    """The error for micro-batches that call different norms, or the same in another order."""
    return RuntimeError(
        f"accumulate: all micro-batches must call the same batch norms in the same order; got {got} at call {place}, "
        f"where the first micro-batch has {expected}; look for a branch that depends on the data"
    )


def make_inner_gradient_error() -> RuntimeError:
    """The error for a loss that differentiates: its gradient would be without the other micro-batches' part."""
    return RuntimeError(
        "accumulate: loss must not differentiate, since a gradient through a batch norm needs every micro-batch; got "
        "torch.autograd.grad or backward() inside it; take a step of its own for a gradient penalty, or norms that "
        "need no batch"
    )
