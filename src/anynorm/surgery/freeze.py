"""`freeze` and `unfreeze`: what of a model's norms stands still while the rest is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn as nn

from ..errors import UserError
from ..modules.adapted import FrozenNorm
from ..modules.frozen import Frozen
from ..modules.norm import Norm
from .accelerate import BASES, plan_swaps
from .adapters import Finder
from .freezing import NEVER_MOVES, find_class_before, find_flags, find_kind, find_state, restore, stop
from .operation import Options, Where, operate, select
from .report import Entry, SurgeryReport, describe

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
        By frozen statistics and with frozen gamma and beta, a norm computes what it does in evaluation, and keeps
        nothing of its input for backward; with a fused activation it keeps the input. Parameters
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

    options = Options(copy, example, strict, tolerance, per_layer)
    return operate("freeze", model, plan, options, WRAPPED if affine else "")


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

    options = Options(copy, example, strict, tolerance, per_layer)
    moves_gradients = any(norm.frozen.affine for norm in find_frozen(model))
    return operate("unfreeze", model, plan, options, WRAPPED if moves_gradients else "")


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
