"""Packages that look classes up by exact type do not find a subclass: here ours are registered with them.

Opacus would take a batch norm for a layer that keeps samples apart, and its promise of privacy would be gone in
silence; captum's attributions would be refused, or wrong behind a fused activation; torch's fusers would leave norms.
`import_hook.py` says when, `fusers.py` what torch's fusers are told.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch.nn as nn

from ..modules import batch, domain, ghost, group, instance, layer, lazy, renorm, rms, sync
from ..modules.pattern import AnyNorm
from ..modules.recurrent.layers import GRU, LSTM
from ..pooling import parse
from .report import FUSED, PAIRS, describe

BATCH_NORMS: tuple[type[nn.Module], ...] = tuple(
    getattr(module, f"{kind}{n}d")
    for module, kind in (
        (batch, "BatchNorm"),
        (lazy, "LazyBatchNorm"),
        (ghost, "GhostBatchNorm"),
        (renorm, "BatchRenorm"),
        (domain, "DomainBatchNorm"),
    )
    for n in (1, 2, 3)
) + (sync.SyncBatchNorm,)
INSTANCE_NORMS: tuple[type[nn.Module], ...] = tuple(
    getattr(module, f"{kind}{n}d")
    for module, kind in ((instance, "InstanceNorm"), (lazy, "LazyInstanceNorm"))
    for n in (1, 2, 3)
)
SAMPLE_NORMS = (layer.LayerNorm, group.GroupNorm, rms.RMSNorm, *INSTANCE_NORMS[:3])
NOTE = (
    "tools that look for torch's exact types: Opacus, captum and the fusers of torch.ao.quantization are told of ours; "
    "torch.ao.quantization.convert and torch.fx.experimental.optimization.fuse want undo=True first"
)


def register_validators(module: ModuleType) -> None:
    """Opacus' validators: what mixes samples, and what has no per-sample gradients, is no valid layer."""
    validators, fixers = module.ModuleValidator.VALIDATORS, module.ModuleValidator.FIXERS
    error = module.errors.UnsupportableModuleError
    for ours in BATCH_NORMS:
        validators[ours] = validators[nn.BatchNorm2d]
        if not issubclass(ours, nn.modules.lazy.LazyModuleMixin):  # it does not know its channels yet
            fixers[ours] = fixers[nn.BatchNorm2d]
    for ours in INSTANCE_NORMS:
        validators[ours], fixers[ours] = validators[nn.InstanceNorm2d], fixers[nn.InstanceNorm2d]

    def refuse(layer: nn.Module) -> list[Exception]:
        return [error(explain_refusal(layer))]

    def check_pattern(layer: AnyNorm) -> list[Exception]:
        left, right = parse(layer.pattern)
        mixed = layer.track_running_stats or not set(left[0]) <= set(right)
        return [error(f"anynorm.AnyNorm('{layer.pattern}') shares statistics between samples")] if mixed else []

    for ours in (*FUSED.values(), LSTM, GRU):
        validators[ours] = refuse
    validators[AnyNorm] = check_pattern


def register_grad_samplers(module: ModuleType) -> None:
    """Opacus' per-sample gradients: those of torch's namesakes; no others, since a residual would be left out."""

    def refuse(layer: nn.Module, *_: Any) -> dict[nn.Parameter, Any]:
        raise NotImplementedError(f"opacus: {explain_refusal(layer)}")

    theirs = {ours: kind for kind, ours in PAIRS.items()}
    for hooks in (module.GradSampleHooks, module.GradSampleHooksFastGradientClipping):
        samplers = hooks.GRAD_SAMPLERS
        samplers.update((ours, samplers[theirs[ours]]) for ours in SAMPLE_NORMS)
        samplers.update((ours, refuse) for ours in FUSED.values())


def register_captum(module: ModuleType) -> None:
    """captum's layer-wise relevance propagation knows one norm; DeepLift must know every activation."""
    from captum.attr._core import deep_lift, lrp

    lrp.SUPPORTED_LAYERS_WITH_RULES[batch.BatchNorm2d] = lrp.SUPPORTED_LAYERS_WITH_RULES[nn.BatchNorm2d]

    def refuse(layer: nn.Module, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"captum's DeepLift: {explain_refusal(layer)}")

    deep_lift.SUPPORTED_NON_LINEAR.update((ours, refuse) for ours in FUSED.values())


def explain_refusal(layer: nn.Module) -> str:
    """Why a layer cannot be used there, and the remedy."""
    if isinstance(layer, (LSTM, GRU)):
        return f"{describe(type(layer))} has no per-sample gradients here; use torch's layer"
    remedy = "anynorm.accelerate(model, undo=True) first, or a model that was not fused"
    return f"{describe(type(layer))} is norm, sum and activation in one, which it must see apart; {remedy}"


VARIANTS = tuple(kind for kind in BATCH_NORMS if kind not in PAIRS.values())  # that torch has not
