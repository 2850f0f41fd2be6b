"""Packages that look classes up by exact type do not find a subclass: here they are told of ours.

Opacus would take a batch norm for a layer that keeps samples apart, and its promise of privacy would be gone in
silence; captum's attributions would be refused, or wrong behind a fused activation. Neither package is imported here:
what is there already is told at once, and what is imported later right after its import.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch.nn as nn

from ..modules import batch, ghost, group, instance, layer, lazy, renorm, rms, sync
from ..modules.pattern import AnyNorm
from ..modules.recurrent.layers import GRU, LSTM
from ..pooling import parse
from .report import FUSED, PAIRS, describe

BATCH_NORMS: tuple[type[nn.Module], ...] = tuple(
    getattr(room, f"{kind}{n}d")
    for room, kind in (
        (batch, "BatchNorm"),
        (lazy, "LazyBatchNorm"),
        (ghost, "GhostBatchNorm"),
        (renorm, "BatchRenorm"),
    )
    for n in (1, 2, 3)
) + (sync.SyncBatchNorm,)
INSTANCE_NORMS: tuple[type[nn.Module], ...] = tuple(
    getattr(room, f"{kind}{n}d")
    for room, kind in ((instance, "InstanceNorm"), (lazy, "LazyInstanceNorm"))
    for n in (1, 2, 3)
)
SAMPLE_NORMS = (layer.LayerNorm, group.GroupNorm, rms.RMSNorm, *INSTANCE_NORMS[:3])
NOTE = (
    "tools that look for torch's exact types: Opacus and captum are told of ours; torch.ao.quantization and "
    "torch.fx.experimental.optimization.fuse want undo=True first"
)


def tell_validators(module: ModuleType) -> None:
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
        return [error(say_refused(layer))]

    def check_pattern(layer: AnyNorm) -> list[Exception]:
        left, right = parse(layer.pattern)
        mixed = layer.track_running_stats or not set(left[0]) <= set(right)
        return [error(f"anynorm.AnyNorm('{layer.pattern}') shares statistics between samples")] if mixed else []

    for ours in (*FUSED.values(), LSTM, GRU):
        validators[ours] = refuse
    validators[AnyNorm] = check_pattern


def tell_grad_samplers(module: ModuleType) -> None:
    """Opacus' per-sample gradients: those of torch's namesakes; no others, since a residual would be left out."""

    def refuse(layer: nn.Module, *_: Any) -> dict[nn.Parameter, Any]:
        raise NotImplementedError(f"opacus: {say_refused(layer)}")

    theirs = {ours: kind for kind, ours in PAIRS.items()}
    for hooks in (module.GradSampleHooks, module.GradSampleHooksFastGradientClipping):
        samplers = hooks.GRAD_SAMPLERS
        samplers.update((ours, samplers[theirs[ours]]) for ours in SAMPLE_NORMS)
        samplers.update((ours, refuse) for ours in FUSED.values())


def tell_captum(module: ModuleType) -> None:
    """captum's layer-wise relevance propagation knows one norm; DeepLift must be told of every activation."""
    from captum.attr._core import deep_lift, lrp

    lrp.SUPPORTED_LAYERS_WITH_RULES[batch.BatchNorm2d] = lrp.SUPPORTED_LAYERS_WITH_RULES[nn.BatchNorm2d]

    def refuse(layer: nn.Module, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"captum's DeepLift: {say_refused(layer)}")

    deep_lift.SUPPORTED_NON_LINEAR.update((ours, refuse) for ours in FUSED.values())


def say_refused(layer: nn.Module) -> str:
    """Why a layer cannot be used there, and the remedy."""
    if isinstance(layer, LSTM | GRU):
        return f"{describe(type(layer))} has no per-sample gradients here; use torch's layer"
    remedy = "anynorm.accelerate(model, undo=True) first, or a model that was not fused"
    return f"{describe(type(layer))} is norm, sum and activation in one, which it must see apart; {remedy}"


TOLD: dict[str, Callable[[ModuleType], None]] = {
    "opacus.validators": tell_validators,
    "opacus.grad_sample": tell_grad_samplers,
    "captum.attr": tell_captum,
}


def tell(module: ModuleType) -> None:
    """Tell one package; it must not fail to import where its private tables have changed, but nor must it be silent."""
    try:
        TOLD[module.__name__](module)
    except (ImportError, AttributeError, KeyError, TypeError) as problem:
        warnings.warn(
            f"anynorm: {module.__name__} could not be told of anynorm's classes ({problem!r}), and does not know a "
            "subclass of torch's norms; use anynorm.accelerate(model, undo=True) before it",
            stacklevel=2,
        )


class Listener(MetaPathFinder):
    """Finds nothing itself: it lets the other finders find one of these packages, and tells it once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in TOLD:
            return None
        others = [finder.find_spec for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((found for find in others if (found := find(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                tell(module)

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


def listen() -> None:
    """Tell what has been imported, and listen for what will be; called once, at import."""
    for name in TOLD:
        if (module := sys.modules.get(name)) is not None:
            tell(module)
    if not any(isinstance(finder, Listener) for finder in sys.meta_path):
        sys.meta_path.insert(0, Listener())
