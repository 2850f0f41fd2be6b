"""`convert`: the norms of a model become norms of another kind, and start as near to the old ones as they can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch.nn as nn
from torch import Tensor

from ..errors import UserError
from ..modules.adapted import Adapted
from .accelerate import BASES, find_bypassed
from .conversion import (
    CHANNEL_NORMS,
    FEATURE_NORMS,
    KINDS,
    OPTIONS,
    Refused,
    check_convertible,
    find_affine,
    hand_over,
    is_alike,
    make,
)
from .differences import call, evaluating
from .operation import Options, Where, find_held, operate, replace_everywhere, select
from .report import Entry, SurgeryReport, describe

NOTE = "train on, or at least look at the loss: the new norms only start near the old function"
NO_AVERAGES = "running averages start at mean 0 and variance 1: anynorm.recalibrate(model, loader) finds them"
WRAPPED = "DistributedDataParallel and its like keep books of parameters and buffers"


def convert(
    model: nn.Module,
    to: str,
    *,
    where: Where = None,
    copy: bool = False,
    example: Any = None,
    strict: bool = False,
    tolerance: float | None = None,
    per_layer: bool = False,
    **options: Any,
) -> SurgeryReport:
    """Replace the norms of a model by norms of another kind, with the same gamma, beta and eps.

    From batch norm to group, layer or RMS norm, running averages go into gamma and beta, so that the new norm computes
    what the old one did for samples whose own statistics are the average ones. Batch norm, ghost batch norm, batch
    renormalization and synchronized batch norm hand their averages on.

    Args:
        model: any module that holds norms.
        to: ``"group"``; ``"layer"``: each sample over channels and positions, as GroupNorm with one group; ``"rms"``:
            the same without subtracting the mean; ``"instance"``; ``"batch"``, ``"ghost"``, ``"renorm"``, ``"sync"``;
            ``"identity"``: no norm at all. Norms over features, such as nn.LayerNorm, become layer, RMS norm or
            identity.
        where: which norms: names, with ``*`` for anything, classes, a tuple of both, or a function of (name, module);
            None for all.
        copy: change a copy, ``report.model``, and not the model.
        example: arguments of a call (a tensor, a tuple, or a dict by name). By its shapes groups of one element are
            found, and batch norms of group norms can be made; the report says how far the outputs moved.
        strict: put everything back and raise where they moved by more than `tolerance`.
        tolerance: of the largest output; None for what rounding explains, which another kind of norm will not keep.
        per_layer: compare the outputs of layers too.
        options: for the new norms: ``num_groups`` (the most; 32, and each group gets two channels or more),
            ``ghost_size`` (32), ``r_max``, ``d_max``, ``warmup``, ``process_group``.

    Returns:
        A report of what changed, and of what was left and why: norms of that kind already, subclasses with code of
        their own, parametrized ones, parameters shared with other modules, groups of one element, frozen norms.

    Raises:
        TypeError: `model` is not a module, or an option is not known.
        ValueError: `to` is not known; a name in `where` that no module has; a model in DistributedDataParallel.

    Note:
        Parameters are the same objects with other values; where a norm had none, new ones are made that an optimizer
        has to be told of. Hooks, mode and sharing stay; the keys of the state_dict are those of the new kind.

    Source:
        Wu and He 2018, arXiv:1803.08494, for group norm. The start is this library's own.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> print(anynorm.convert(model, "group", num_groups=4))
        1 norms changed, 0 left
          1 x torch.nn.BatchNorm2d -> anynorm.GroupNorm
          train on, or at least look at the loss: the new norms only start near the old function
        >>> model[1].num_groups
        4
    """
    if to not in KINDS:
        raise UserError(f"convert: to must be one of {', '.join(KINDS)}; got {to!r}")
    known = OPTIONS.get(to, ())
    if unknown := sorted(set(options) - set(known)):
        takes = f"takes {', '.join(known)}" if known else "takes no options"
        raise TypeError(f"convert: {to!r} {takes}; got {', '.join(unknown)}; leave it out")

    def plan(model: nn.Module, report: SurgeryReport) -> Callable[[], object]:
        chosen = select("convert", model, where)
        return plan_convert(model, to, chosen, {} if example is None else find_shapes(model, example), options, report)

    asked = Options(copy, example, strict, tolerance, per_layer)
    return operate("convert", model, plan, asked, WRAPPED)


def plan_convert(
    model: nn.Module,
    to: str,
    chosen: Callable[[str, nn.Module], bool],
    shapes: dict[int, tuple[int, ...]],
    options: dict[str, Any],
    report: SurgeryReport,
) -> Callable[[], object]:
    """Make every new norm; what is returned puts them in."""
    counts = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found: list[tuple[nn.Module, nn.Module, tuple[Tensor | None, Tensor | None]]] = []
    held, bypassed = find_held(model), find_bypassed(model)
    for name, norm in model.named_modules():
        if not isinstance(norm, (*BASES, *CHANNEL_NORMS, *FEATURE_NORMS, Adapted)) or not chosen(name, norm):
            continue
        try:
            if not name:
                raise Refused("it is the model itself; put it in torch.nn.Sequential")
            check_convertible(norm, counts)
            if id(norm) in held:
                raise Refused(f"{held[id(norm)]} holds it too, past torch's registry: code may call it there")
            if id(norm) in bypassed:
                raise Refused(bypassed[id(norm)])
            new = make(norm, to, shapes.get(id(norm)), options)
            if is_alike(norm, new):
                raise Refused("it is such a norm already")
        except Refused as reason:
            report.left.append(Entry(name, describe(type(norm)), reason=str(reason)))
            continue
        affine = (None, None) if to == "identity" else find_affine(norm, new, to)
        found.append((norm, new, affine))
        report.changed.append(Entry(name, describe(type(norm)), became=describe(type(new))))
    # Those of batch norms are handed on; the very tensors.
    averages = [(norm._buffers.get("running_mean"), new._buffers.get("running_mean")) for norm, new, _ in found]
    if found:
        report.note = "" if to in ("batch", "sync") else NOTE
        report.note = NO_AVERAGES if any(own is not None and own is not old for old, own in averages) else report.note

    def change() -> None:
        for norm, new, affine in found:
            hand_over(norm, new, affine)
            replace_everywhere(model, norm, new)

    return change


def find_shapes(model: nn.Module, example: Any) -> dict[int, tuple[int, ...]]:
    """The shapes of what reaches each norm that the example runs through, by identity."""
    shapes: dict[int, tuple[int, ...]] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            shapes[id(module)] = tuple(inputs[0].shape)

    norms = [module for module in model.modules() if isinstance(module, (*BASES, *CHANNEL_NORMS, Adapted))]
    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(note).remove)
        stack.enter_context(evaluating(model))
        call(model, example)
    return shapes
