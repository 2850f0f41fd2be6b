"""One norm frozen: which parts of it, by which class, and how it comes back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch.nn as nn

from ..modules.adapted import Adapted, FrozenNorm
from ..modules.batch import _BatchNorm
from ..modules.frozen import Frozen
from ..modules.fused import Fused
from ..modules.norm import Norm
from ..modules.sync import _Synchronized
from .adapters import Finder
from .sync import find_change

NEVER_MOVES = "its class never moves: there is nothing to freeze"


def find_state(norm: nn.Module, asked: Frozen, flags: dict[int, bool]) -> tuple[Frozen, str]:
    """What will be frozen of a norm, beside what is, or why nothing can be.

    Args:
        norm: in the model.
        asked: the switches.
        flags: of parameters that are frozen already, by identity, whether they wanted a gradient before: norms may
            share them.
    """
    known = vars(norm).get("frozen")
    before = replace(known, training=find_mode(norm)) if isinstance(known, Frozen) else Frozen(training=norm.training)
    # Those of domains have longer names.
    keeps_averages = any(t is not None for name, t in norm._buffers.items() if name.startswith("running_mean"))
    wanted = dict(find_parameters(norm)) if asked.affine else {}
    if any(t is not None and nn.parameter.is_lazy(t) for t in (*norm._parameters.values(), *norm._buffers.values())):
        return before, "it has not seen an input; run one batch first"
    if isinstance(norm, FrozenNorm):
        return before, NEVER_MOVES
    if not keeps_averages and not wanted:
        return before, "it keeps no running averages" + (" and has no gamma or beta" if asked.affine else "")
    state = replace(
        before,
        statistics=before.statistics or (asked.statistics and keeps_averages),
        updates=before.updates or (asked.updates and keeps_averages),
        affine=before.affine or bool(wanted),
        requires_grad={
            **{name: flags.get(id(p), p.requires_grad) for name, p in wanted.items()},
            **before.requires_grad,
        },
    )
    return state, ""


def find_parameters(norm: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Gamma and beta, whatever their names; where they are parametrized what they are made of."""
    yield from norm.named_parameters(recurse=False)
    for name, parameter in norm.named_parameters():
        if name.startswith("parametrizations."):
            yield name, parameter


def find_flags(norm: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """The parameters of a frozen norm, and whether they wanted a gradient before."""
    state = vars(norm).get("frozen")
    if isinstance(state, Frozen):
        for name, parameter in find_parameters(norm):
            if name in state.requires_grad:
                yield parameter, state.requires_grad[name]


def find_kind(
    norm: nn.Module, kind: type[nn.Module] | None, reason: str, state: Frozen
) -> tuple[type[nn.Module] | None, str]:
    """The class that can be frozen, None where the norm has it; or why there is none."""
    if type(norm) is nn.SyncBatchNorm:
        kind, reason = find_change(norm, False, Finder(sync=True))
    ours = kind or type(norm)
    is_known = isinstance(norm, Norm) and ours.forward in (Norm.forward, Fused.forward)  # parametrized, or a subclass
    if reason and not is_known:
        return None, reason
    if not issubclass(ours, Norm) or "forward" in vars(norm):
        return None, "its code is its own; anynorm.register tells what such a class computes"
    if ours.train is not Norm.train:
        return None, "its class has a `train` of its own"
    if state.statistics and not state.updates and not issubclass(ours, _BatchNorm):
        return None, "only batch norm moves averages by which it normalizes; freeze its updates too"
    if state.statistics and not state.updates and issubclass(ours, _Synchronized):
        return None, "ranks merge statistics in training only; freeze its updates too"
    return kind, ""


def stop(norm: Any, state: Frozen, kind: type[nn.Module] | None) -> None:
    """Freeze a norm."""
    if kind is not None:
        state.before, state.became = type(norm), find_recipe(kind)
        norm.__class__ = kind
    if state.affine:
        for name, parameter in find_parameters(norm):
            if name in state.requires_grad:
                parameter.requires_grad_(False)
                parameter.grad = None
    norm.frozen = state
    norm.training = state.training and not state.statistics


def restore(norm: Any) -> None:
    """Undo `stop`."""
    state: Frozen = norm.frozen
    mode = find_mode(norm)
    for parameter, flag in find_flags(norm):
        parameter.requires_grad_(flag)
    del norm.frozen
    norm.training = mode
    kind = find_class_before(norm, state)
    if kind is not type(norm):
        norm.__class__ = kind
        vars(norm).pop("label", None)


def find_mode(norm: Any) -> bool:
    """The mode that a frozen norm was last set to; torch's classes do not note it, but follow it."""
    state: Frozen = norm.frozen
    return state.training if state.statistics else bool(norm.training)


def find_class_before(norm: nn.Module, state: Frozen) -> type[nn.Module]:
    """The class that an unfrozen norm has: as before, where nothing else has changed it since."""
    is_same = state.before is not None and find_recipe(type(norm)) == state.became
    return state.before if state.before is not None and is_same else type(norm)


def find_recipe(kind: type[nn.Module]) -> Any:
    """What a class that was made at run time is made of, which pickle can write; others are found by their names."""
    return kind.recipe if issubclass(kind, Adapted) else kind
