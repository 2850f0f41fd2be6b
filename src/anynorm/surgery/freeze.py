"""`freeze` and `unfreeze`: what of a model's norms stands still while the rest is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch.nn as nn

from ..errors import UserError
from ..modules.adapted import Adapted, FrozenNorm
from ..modules.batch import _BatchNorm
from ..modules.frozen import Frozen
from ..modules.fused import Fused
from ..modules.norm import Norm
from ..modules.sync import _Synchronized
from .accelerate import BASES, plan_swaps
from .adapters import Finder
from .operation import Where, operate, select
from .report import Entry, SurgeryReport, describe
from .sync import find_change

NEVER_MOVES = "its class never moves: there is nothing to freeze"
WRAPPED = "DistributedDataParallel and its like keep books of which parameters want gradients"


def freeze(
    model: nn.Module,
    statistics: bool = True,
    updates: bool = True,
    affine: bool = True,
    *,
    where: Where = None,
    copy: bool = False,
    example: Any = None,
    strict: bool = False,
    tolerance: float | None = None,
    per_layer: bool = False,
) -> SurgeryReport:
    """Stop the norms of a model, in place, until `unfreeze`; also through `model.train()`, copies and pickling.

    Three parts can be stopped, each by itself. Norms that keep no running averages (layer, group, RMS norm) have only
    the third.

    Args:
        model: any module; a norm itself is allowed.
        statistics: normalize by the running averages in training too, as in evaluation. Such a norm stays in evaluation
            mode whatever `model.train()` says.
        updates: do not move the running averages, nor the counter of batches.
        affine: gamma and beta want no gradient; a gradient that they hold is dropped, or an optimizer would go on with
            it.
        where: which norms: names, with ``*`` for anything, each with all that is inside (``"layer1"``), classes, a
            tuple of both, or a function of (name, module); None for all.
        copy: change a copy, ``report.model``, and not the model.
        example, strict, tolerance, per_layer: as for `anynorm.accelerate`; in evaluation nothing may change.

    Returns:
        A report of what was frozen, and of what was left and why: subclasses with code of their own, and norms without
        running averages where only these were to be frozen. Batch norms of torch.nn become ours, and torch's again when
        they are unfrozen.

    Raises:
        TypeError: `model` is not a module.
        ValueError: nothing is to be frozen; a name in `where` that no module has; a model in DistributedDataParallel,
            where `affine` would change what it expects; `strict` without `example`.

    Note:
        By frozen statistics and with frozen gamma and beta, a norm computes what it does in evaluation, and keeps nothing
        of its input for backward; with a fused activation it keeps the input. Parameters
        that were frozen stay in the optimizer, which passes over what has no gradient. The state_dict is as before;
        that a norm is frozen is not in it.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> print(anynorm.freeze(model))
        1 norms changed, 0 left
          1 x torch.nn.BatchNorm2d -> anynorm.BatchNorm2d, frozen: statistics, updates, affine
        >>> model.train()[1].training
        False
        >>> print(anynorm.unfreeze(model).changed[0].became)
        torch.nn.BatchNorm2d
    """
    asked = Frozen(statistics, updates, affine)
    if not asked.describe():
        raise UserError("freeze: statistics, updates or affine must be True; got False for all; unfreeze undoes it")

    def plan(model: nn.Module, report: SurgeryReport) -> Callable[[], object]:
        chosen = select("freeze", model, where)
        return plan_freeze(model, asked, chosen, report)

    return operate(
        "freeze",
        model,
        plan,
        copy=copy,
        example=example,
        strict=strict,
        tolerance=tolerance,
        per_layer=per_layer,
        wrapped=WRAPPED if affine else "",
    )


def unfreeze(
    model: nn.Module,
    *,
    where: Where = None,
    copy: bool = False,
    example: Any = None,
    strict: bool = False,
    tolerance: float | None = None,
    per_layer: bool = False,
) -> SurgeryReport:
    """Let frozen norms move again: mode, classes and which parameters want gradients are as before `freeze`.

    Running averages, their momentum and counters were not touched, so nothing of them is lost.

    Args:
        model: any module, also a copy of the one that was frozen.
        where, copy, example, strict, tolerance, per_layer: as for `anynorm.freeze`.

    Returns:
        A report of the norms that were frozen.

    Raises:
        TypeError, ValueError: as `anynorm.freeze`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), anynorm.BatchNorm1d(8))
        >>> _ = anynorm.freeze(model, affine=False)
        >>> len(anynorm.unfreeze(model).changed), model.train()[1].training
        (1, True)
    """

    def plan(model: nn.Module, report: SurgeryReport) -> Callable[[], object]:
        chosen = select("unfreeze", model, where)
        found = [
            (name, norm)
            for name, norm in model.named_modules()
            if isinstance(vars(norm).get("frozen"), Frozen) and chosen(name, norm)
        ]
        for name, norm in found:
            report.changed.append(
                Entry(name, describe(type(norm)), became=describe(find_class_before(norm, norm.frozen)))
            )

        def change() -> None:
            for _, norm in found:
                restore(norm)

        return change

    return operate(
        "unfreeze",
        model,
        plan,
        copy=copy,
        example=example,
        strict=strict,
        tolerance=tolerance,
        per_layer=per_layer,
        wrapped=WRAPPED if any(norm.frozen.affine for norm in find_frozen(model)) else "",
    )


def find_frozen(model: Any) -> list[Any]:
    """The frozen modules of a model, and none of what is no model."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [norm for norm in modules if isinstance(vars(norm).get("frozen"), Frozen)]


def plan_freeze(
    model: nn.Module, asked: Frozen, chosen: Callable[[str, nn.Module], bool], report: SurgeryReport
) -> Callable[[], object]:
    """Find what is frozen of each norm, and which class it gets; what is returned does it."""
    found: list[tuple[Any, Frozen, type[nn.Module] | None]] = []
    others = SurgeryReport()
    classes = plan_swaps(model, False, others, Finder())
    reasons = {entry.name: entry.reason for entry in others.left}
    wanted = {id(p): flag for norm in model.modules() for p, flag in find_flags(norm)}
    for name, norm in model.named_modules():
        if not (isinstance(norm, (Norm, *BASES)) or name in classes) or not chosen(name, norm):
            if name in reasons and chosen(name, norm):
                report.left.append(Entry(name, describe(type(norm)), reason=reasons[name]))
            continue
        kind = classes.get(name)
        state, reason = find_state(norm, asked, wanted)
        if kind is not None and issubclass(kind, FrozenNorm):
            reason = NEVER_MOVES
        if not reason and state.statistics | state.updates:
            kind, reason = find_kind(norm, kind, reasons.get(name, ""), state)
        elif not reason:
            kind = None  # whose gamma and beta alone are frozen stays what it is
        if reason:
            report.left.append(Entry(name, describe(type(norm)), reason=reason))
            continue
        found.append((norm, state, kind))
        became = f"{describe(kind or type(norm))}, frozen: {state.describe()}"
        report.changed.append(Entry(name, describe(type(norm)), became=became))

    def change() -> None:
        for norm, state, kind in found:
            stop(norm, state, kind)

    return change


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
