"""`fold`: the batch norms of a model become part of its convolutions and linear layers, for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn as nn

from ...errors import UserError
from ..accelerate import plan_undone
from ..adapters import Finder
from ..operation import Options, Where, operate, select
from ..report import Entry, SurgeryReport, describe, is_ours
from ..rewrite import GraphForward
from ..sequential import ACTIVATION_ATTRIBUTE
from .graphs import measure_shapes, record
from .norms import FixedNorm, NotFoldable, is_any_norm, read_norm, waits_for_evaluation
from .plan import FoldPlan

WRAPPED = "folding makes new parameters, which the wrapper's books would not know"
NOTE = "folded for evaluation: do not train this model; save it whole or keep the code that folds, for its keys differ"
STILL_OURS = "the model still holds classes of anynorm: {names}"


def fold(
    model: nn.Module,
    *,
    example: Any = None,
    copy: bool = False,
    strict: bool = False,
    tolerance: float | None = None,
    per_layer: bool = False,
    where: Where = None,
) -> SurgeryReport:
    """Make the batch norms of a model part of the convolutions and linear layers beside them, in place.

    In evaluation a norm by running averages is scale * x + shift for each channel, and so is what a layer before or
    behind it can do as well. The layer's weight and bias change, nn.Identity takes the norm's place, and the model
    keeps its class, its code and all other names; nothing of this library stays in it. It computes the same in
    evaluation, in fewer passes; it cannot be trained on.

    Args:
        model: in evaluation (`model.eval()`), or with its norms frozen.
        example: arguments of a call (a tensor, a tuple, or a dict by name). It tells the sizes of tensors, which some
            places need, and the report says how far the outputs before and after are apart.
        copy: fold a copy, ``report.model``, and not the model.
        strict: put everything back and raise where outputs are apart by more than `tolerance`.
        tolerance: of the largest output; None for what rounding explains, 1e-5 in float32.
        per_layer: compare the outputs of layers too; inside the model they may differ.
        where: which norms: names, with ``*`` for anything, classes, or a function of (name, module).

    Returns:
        A report: in `changed` each norm that was folded and into what, in `left` each that was not and why. Folded are
        batch norms, also fused, synchronized or frozen ones and those of other packages, and instance norms with
        running averages, where all that lies between them and the layer commutes with them:

        - behind Conv1d-3d, ConvTranspose1d-3d and Linear, through sums and concatenations of such layers too;
        - before them: with padding by zeros only where the norm's shift is 0;
        - past dropout in evaluation, average pools, upsampling, borders that repeat the input, reshaping; past
          max-pools where no scale is negative; past borders of zeros where the shift is 0;
        - into another norm, where no layer is near.

        Left are norms that compute by their input, and places that are used twice, hooked, parametrized, tied to
        others, or that torch.fx cannot see.

    Raises:
        TypeError: `model` is not a module.
        ValueError: norms are in training; the model is wrapped by DistributedDataParallel or its like; `strict` without
            `example`, or where outputs differ. Whatever is raised, nothing was changed.

    Note:
        All is computed in float64 and rounded once to the layer's dtype. Parameters that change are new objects.
        A tensor's axes, where the model alone does not tell them, are those it has for the example. What is kept is
        what `forward` returns; a method that stops between a layer and its norm returns something else. A norm that is
        folded makes padding 0 no more, as ours do under a mask.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> print(anynorm.fold(model))  # doctest: +ELLIPSIS
        1 norms changed, 0 left
          1 x torch.nn.BatchNorm2d -> part of 0
          folded for evaluation: ...
        >>> model[1]
        Identity()
    """

    def plan(model: nn.Module, report: SurgeryReport) -> Callable[[], object]:
        return plan_fold(model, where, example, report)

    options = Options(copy, example, strict, tolerance, per_layer)
    return operate("fold", model, plan, options, WRAPPED)


def plan_fold(model: nn.Module, where: Where, example: Any, report: SurgeryReport) -> Callable[[], object]:
    """Find what is folded into what; what is returned changes the model."""
    is_wanted = select("fold", model, where)
    found = {name: module for name, module in model.named_modules() if is_any_norm(module)}
    wanted = {name: module for name, module in found.items() if is_wanted(name, module)}
    check_mode(wanted)
    norms, reasons = read_norms(wanted)
    recordings = record(model, list(found))
    if example is not None and norms:
        measure_shapes(model, recordings, example)
    folding = FoldPlan(model, norms, recordings)
    folding.fold_all()
    for each in folding.folded:
        into = " and ".join(folding.find_ends(each))
        report.changed.append(Entry(each.norm.name, describe(type(each.norm.norm)), became=f"part of {into}"))
    reasons |= {norm.name: folding.reasons[id_] for id_, norm in folding.norms.items()}
    report.left += [
        Entry(name, describe(type(wanted[name])), reason=reasons[name]) for name in wanted if name in reasons
    ]
    report.note = NOTE if report.changed else ""

    def change() -> None:
        folding.apply()
        leave_torch_alone(model, report)

    return change


def check_mode(norms: dict[str, nn.Module]) -> None:
    """Raise where norms that could be folded are in training."""
    training = [name or "the model" for name, norm in norms.items() if waits_for_evaluation(norm)]
    if training:
        more = f" and {len(training) - 1} more" if len(training) > 1 else ""
        raise UserError(
            f"fold: only norms in evaluation are constants; got {training[0]}{more} in training; "
            "call model.eval() first"
        )


def read_norms(found: dict[str, nn.Module]) -> tuple[dict[int, FixedNorm], dict[str, str]]:
    """The norms that are constants, by identity, and why the others, by name, are not."""
    finder = Finder()
    norms: dict[int, FixedNorm] = {}
    reasons: dict[str, str] = {}
    for name, module in found.items():
        try:
            norms[id(module)] = read_norm(name, module, finder)
        except NotFoldable as reason:
            reasons[name] = str(reason)
    return norms, reasons


def leave_torch_alone(model: nn.Module, report: SurgeryReport) -> None:
    """Turn norms of this library that were left back into torch's, and say which could not be."""
    undone = SurgeryReport()
    plan_undone(model, undone)()
    became = {entry.name: entry.became for entry in undone.changed}
    report.left = [Entry(entry.name, entry.kind, became.get(entry.name, ""), entry.reason) for entry in report.left]
    for module in model.modules():
        if type(module) is nn.Identity:
            vars(module).pop(ACTIVATION_ATTRIBUTE, None)
    ours = [name or type(module).__name__ for name, module in model.named_modules() if holds_ours(module)]
    if ours:
        more = f" and {len(ours) - 1} more" if len(ours) > 1 else ""
        report.note = "; ".join(filter(None, (report.note, STILL_OURS.format(names=f"{ours[0]}{more}"))))


def holds_ours(module: nn.Module) -> bool:
    """Whether a module's class is made by this library."""
    return isinstance(module, GraphForward) or any(is_ours(kind) for kind in type(module).__mro__)
