"""`sync`: every batch norm of a model becomes one over all ranks, in place; and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn as nn

from ..modules import batch, fused
from ..modules.adapted import Adapted, make_adapted
from ..modules.frozen import Frozen
from ..modules.norm import Norm
from ..modules.sync import SyncBatchNorm, _Synchronized
from ..ranks.frames import register_label
from .adapters import Finder
from .operation import Options, operate
from .report import UNFREEZE_FIRST, Entry, SurgeryReport, describe, is_ours

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, batch.BatchNorm1d, batch.BatchNorm2d, batch.BatchNorm3d)
SYNCHRONIZED: dict[type[nn.Module], type[nn.Module]] = {
    **dict.fromkeys((*PLAIN, nn.SyncBatchNorm), SyncBatchNorm),
    **dict.fromkeys((fused.BatchNormAct1d, fused.BatchNormAct2d, fused.BatchNormAct3d), fused.SyncBatchNormAct),
}
BASES = (nn.modules.batchnorm._BatchNorm, batch._BatchNorm)


def sync(
    model: nn.Module,
    undo: bool = False,
    process_group: ProcessGroup | None = None,
    *,
    copy: bool = False,
    example: Any = None,
    strict: bool = False,
    tolerance: float | None = None,
    per_layer: bool = False,
) -> SurgeryReport:
    """Turn every batch norm of a model into one over all ranks, in place: the same objects, with another class.

    Parameters, buffers, mode, hooks, sharing, names and fused activations stay. Call it on every rank, before or after
    DistributedDataParallel wraps the model. Norms that are synchronized already are told their names, for messages.

    Args:
        model: any module; a norm itself is allowed.
        undo: turn the norms back into what they were before `sync`, of the same dimension and library (pytorch#41081).
        process_group: the ranks that share statistics; None for all. Norms that are synchronized already change to it.
        copy, example, strict, tolerance, per_layer: as for `anynorm.accelerate`.

    Returns:
        A report of what changed, and of what was left and why: subclasses with code of their own, lazy norms that have
        not seen an input, and, with `undo`, norms that were built as SyncBatchNorm, whose dimension nobody knows.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `strict` without `example`, or where outputs differ. Whatever is raised, nothing was changed.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> print(anynorm.sync(model))
        1 norms changed, 0 left
          1 x torch.nn.BatchNorm2d -> anynorm.SyncBatchNorm
        >>> print(anynorm.sync(model, undo=True).changed[0].became)
        torch.nn.BatchNorm2d
    """

    def plan(model: nn.Module, report: SurgeryReport) -> Callable[[], object]:
        return plan_sync(model, undo, process_group, report)

    return operate("sync", model, plan, Options(copy, example, strict, tolerance, per_layer))


def plan_sync(
    model: nn.Module, undo: bool, process_group: ProcessGroup | None, report: SurgeryReport
) -> Callable[[], object]:
    """Find which norms change; what is returned changes them."""
    finder = Finder(sync=True)
    swaps: dict[str, type[nn.Module]] = {}
    labels: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, BASES):
            continue
        if isinstance(module, _Synchronized) and not undo:
            labels[name] = module
            if process_group is not None and module.process_group is not process_group:
                swaps[name] = type(module)
                report.changed.append(Entry(name, describe(type(module)), became=describe(type(module))))
                continue
        became, reason = find_change(module, undo, finder)
        if became is not None:
            swaps[name] = became
            report.changed.append(Entry(name, describe(type(module)), became=describe(became)))
        elif reason:
            report.left.append(Entry(name, describe(type(module)), reason=reason))

    def apply() -> None:
        for name, module in labels.items():
            set_label(module, name)
        for name, kind in swaps.items():
            change(model.get_submodule(name), name, kind, undo, process_group)

    return apply


def find_change(module: Any, undo: bool, finder: Finder) -> tuple[type[nn.Module] | None, str]:
    """Which class a norm gets, or why none."""
    kind = type(module)
    frozen = vars(module).get("frozen")
    if undo:
        if not isinstance(module, _Synchronized):
            return None, ""
        if module.before is None:
            return None, "it was built as SyncBatchNorm: nobody knows the dimension of its inputs; replace it by hand"
        before = make_adapted(*module.before) if isinstance(module.before, tuple) else module.before
        if frozen is not None and not issubclass(before, Norm):
            return None, UNFREEZE_FIRST  # torch's class would not stand still
        return before, ""
    if isinstance(module, _Synchronized):
        return None, ""
    if isinstance(frozen, Frozen) and frozen.statistics and not frozen.updates:
        return None, "by frozen statistics it follows the batches of its own rank; freeze its updates too"
    if isinstance(module, Adapted) and "forward" not in vars(module):
        return make_adapted(module.original, module.adapter, SyncBatchNorm), ""
    if kind not in SYNCHRONIZED:
        found = finder.find(module) if "forward" not in vars(module) else None
        if found is not None:
            return found[0], found[1] if found[0] is None else ""
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            return None, "it has not seen an input; run one batch first"
        return None, "its statistics are its own, or a subclass may have code of its own"
    if "forward" in vars(module):
        return None, "its forward was replaced on the object"
    return SYNCHRONIZED[kind], ""


def set_label(module: Any, name: str) -> None:
    """Give a layer the name that messages of this rank, and of others that wait for it, call it by."""
    module.label = name
    register_label(name)


def change(module: Any, name: str, kind: type[nn.Module], undo: bool, process_group: ProcessGroup | None) -> None:
    """Change the class, and remember what it was."""
    if undo:
        for attribute in ("before", "calls", "merged_count"):
            vars(module).pop(attribute, None)
        if kind is not nn.SyncBatchNorm:
            vars(module).pop("process_group", None)
        if not is_ours(kind):
            del module.label
    else:
        if not isinstance(module, _Synchronized):
            # Of a class that was made at run time what it is made of, which pickle can write.
            module.before = module.recipe if isinstance(module, Adapted) else type(module)
        set_label(module, name)
        if process_group is not None or not hasattr(module, "process_group"):
            module.process_group = process_group
    module.__class__ = kind
