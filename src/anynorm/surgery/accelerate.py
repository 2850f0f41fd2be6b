"""`accelerate`: every torch.nn norm of a model becomes ours, in place; and what follows a norm can be fused with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn

from ..modules.adapted import Adapted
from ..modules.fused import Fused
from ..modules.norm import Norm
from ..modules.sync import SyncBatchNorm, _Synchronized
from ..torch_private import NormBase
from .activation import read_module
from .adapters import Finder
from .exact_types import NOTE
from .graph_model import make_graph_model
from .operation import Options, operate
from .report import FUSED, PAIRS, UNDO_FIRST, UNFREEZE_FIRST, Entry, SurgeryReport, describe, is_ours
from .sequential import Place, count_places, find_module_obstacle, fuse_place, plan_fusion, plan_undo, take_apart
from .trace import trace

NAMED_NORM = re.compile("norm(?!al(?!i[sz])|ous)", re.IGNORECASE)  # LlamaRMSNorm, Normalize; no NormalDistribution
UNKNOWN = "no norm of torch.nn, and nothing is known of its class: anynorm.register({name}, ...) tells what it computes"
BASES = (NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def accelerate(
    model: nn.Module,
    undo: bool = False,
    fuse: bool = False,
    *,
    trust: tuple[type[nn.Module], ...] = (),
    copy: bool = False,
    example: Any = None,
    strict: bool = False,
    tolerance: float | None = None,
    per_layer: bool = False,
) -> SurgeryReport:
    """Turn every norm of a model into ours, in place: the same objects, with another class.

    torch.nn's norms, and classes of other packages that compute what those compute: what timm, transformers,
    torchvision and MONAI have, subclasses without a `forward` of their own, and those named to `anynorm.register`. Such
    a module is compared with ours on random input first, stays an instance of its class, and gets our `forward`.

    Parameters, buffers, mode, hooks, sharing and names stay, so optimizers and references go on working.

    Args:
        model: any module; a norm itself is allowed.
        undo: turn ours back into torch's, and take fused norms in Sequentials apart.
        fuse: fuse norms with the activation behind them too, and with a sum between.
        trust: further classes that are norms of their input; what they compute is found by comparing.
        copy: change a copy, ``report.model``, and not the model.
        example: arguments of a call (a tensor, a tuple, or a dict by name); the model is called with them in evaluation
            before and after, and the report says how far the outputs are apart.
        strict: put everything back and raise where they are apart by more than `tolerance`.
        tolerance: of the largest output; None for what rounding explains, 1e-5 in float32.
        per_layer: compare the outputs of layers too.

    Returns:
        A report of what changed, and of what was left and why: subclasses of torch's norms with code of their own, of
        which nothing is known, or which compute something else, norms whose `forward` was replaced on the object,
        SyncBatchNorm, which `sync` turns into ours and back, norms of nn.TransformerEncoderLayer, whose fast path in
        evaluation reads their weights and never calls them, and other modules that call themselves norms. With `fuse`
        also the norms that were not fused.

        ``report.model`` is the model to go on with. Norm and activation side by side in a Sequential are fused in
        place; the activation's place takes nn.Identity. Norm, sum and activation, and functional activations, need a
        graph: where torch.fx can trace the model and finds some, ``report.model`` is a copy whose `forward` is that
        graph: an instance of the model's class, with its methods, attributes and names, on the same parameters and
        buffers; the model itself keeps them apart. Else it is the model.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `undo` and `fuse` together; `strict` without `example`, or where outputs differ. Whatever is raised,
            nothing was changed.

    Note:
        Tools that look for torch's exact types (torch.ao.quantization's convert of modules, and
        torch.fx.experimental.optimization.fuse) or read source (torch.jit.script) want ``undo=True`` first; Opacus,
        captum and torch.ao.quantization's fusers are told of ours, whichever is imported first.
        Instance and layer norm return channels_last where their input is; torch's return contiguous, so a ``view``
        behind them may have to become ``reshape``. What fusing changes beside: docs/fused.md.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        >>> print(anynorm.accelerate(model))  # doctest: +ELLIPSIS
        1 norms changed, 0 left
          1 x torch.nn.BatchNorm1d -> anynorm.BatchNorm1d
          tools that look for torch's exact types: Opacus, captum and the fusers of ... want undo=True first
        >>> print(anynorm.accelerate(model, fuse=True))  # doctest: +ELLIPSIS
        1 norms changed, 1 fused, 0 left
          1 x anynorm.BatchNorm1d -> anynorm.BatchNormAct1d
          1 x anynorm.BatchNorm1d, relu -> anynorm.BatchNormAct1d in model
          tools ...
        >>> print(anynorm.accelerate(model, undo=True).changed[0].became)
        torch.nn.BatchNorm1d
    """
    if undo and fuse:
        raise ValueError("accelerate: undo and fuse exclude each other; got both; call it twice")

    def plan(model: nn.Module, report: SurgeryReport) -> Callable[[], object]:
        return plan_undone(model, report) if undo else plan_accelerated(model, fuse, Finder(trust), report)

    options = Options(copy, example, strict, tolerance, per_layer)
    return operate("accelerate", model, plan, options)


def plan_accelerated(model: nn.Module, fuse: bool, finder: Finder, report: SurgeryReport) -> Callable[[], object]:
    """Find what becomes of every norm, and the graph; what is returned changes the model."""
    swaps = plan_swaps(model, False, report, finder)
    places: list[Place] = []
    activations: dict[str, str] = {}
    if fuse:
        traces = trace(model)
        places = plan_fusion(model, traces.graphs, report)
        report_fused(model, places, report)
        activations = plan_activations(model, swaps, report)
        report.model = make_graph_model(model, lambda twin: swap(twin, swaps, places, activations), traces, report)
    report.note = NOTE if report.changed else ""

    def change() -> None:
        swap(model, swaps, places, activations)
        for module in model.modules():
            if isinstance(module, Norm) and module.frozen is not None:
                # What is unfrozen now stays ours. Another object: the way back needs the old one as it was.
                module.frozen = replace(module.frozen, before=None)

    return change


def plan_undone(model: nn.Module, report: SurgeryReport) -> Callable[[], object]:
    """Find what becomes torch's again; what is returned changes the model."""
    swaps = plan_swaps(model, True, report, Finder())
    fused = plan_undo(model, report)
    report.changed += [make_undo_entry(model, place) for place in fused]

    def change() -> None:
        swap(model, swaps)
        for place in fused:
            take_apart(model, place)

    return change


def swap(
    model: nn.Module,
    swaps: dict[str, type[nn.Module]],
    places: Iterable[Place] = (),
    activations: dict[str, str] | None = None,
) -> None:
    """Change classes, then fuse in place."""
    for name, kind in swaps.items():
        module = model.get_submodule(name)
        # The same object: optimizers, hooks and references keep it. The classes hold their state under the same names.
        module.__class__ = kind
        if isinstance(module, Norm):
            module.label = name
        else:
            for attribute in ("label", "fused_activation"):
                vars(module).pop(attribute, None)
    for place in places:
        fuse_place(model, place)
    for name, activation in (activations or {}).items():
        model.get_submodule(name).fused_activation = activation  # type: ignore[assignment] # adapted norms have it


def plan_activations(model: nn.Module, swaps: dict[str, type[nn.Module]], report: SurgeryReport) -> dict[str, str]:
    """The activations, by name of the norm, that adapted norms hold as a module of their own and take over."""
    counts = count_places(model)
    found: dict[str, str] = {}
    for name, norm in model.named_modules():
        kind = swaps.get(name, type(norm))
        behind = [getattr(norm, key, None) for key in kind.adapter.then] if issubclass(kind, Adapted) else []
        *before, last = [child for child in behind if child is not None] or [None]
        if last is None or getattr(norm, "fused_activation", None) is not None:
            continue
        activation, reason = read_module(last)
        reason = next((r for child in (*before, last) if (r := find_module_obstacle(name, child, counts))), reason)
        if all(type(child) is nn.Identity for child in before) and activation and not reason:
            found[name] = activation
            became = describe(kind)
            report.fused.append(Entry(name, describe(type(norm)), became=became, then=activation, where="model"))
        elif reason:
            report.left.append(
                Entry(name, describe(type(norm)), reason=f"not fused with {describe(type(last))}: {reason}")
            )
    return found


def report_fused(model: nn.Module, places: list[Place], report: SurgeryReport) -> None:
    """Report what is fused in place, which is a change too."""
    changed = {entry.name: entry for entry in report.changed}
    for place in places:
        kind = type(model.get_submodule(place.norm))
        ours = PAIRS.get(kind, kind)
        became = describe(FUSED[ours])
        changed[place.norm] = Entry(place.norm, describe(kind), became=became)
        report.fused.append(Entry(place.norm, describe(ours), became=became, then=place.activation, where="model"))
    report.changed = list(changed.values())


def make_undo_entry(model: nn.Module, place: Place) -> Entry:
    """The report's line about a fused norm that is taken apart."""
    norm = model.get_submodule(place.norm)
    assert isinstance(norm, Fused)
    theirs = next(theirs for theirs, ours in PAIRS.items() if ours is norm.plain)
    return Entry(place.norm, describe(type(norm)), became=describe(theirs))


def plan_swaps(model: nn.Module, undo: bool, report: SurgeryReport, finder: Finder) -> dict[str, type[nn.Module]]:
    """Which norm, by name, becomes which class; changes and what is left are added to the report."""
    pairs = {ours: theirs for theirs, ours in PAIRS.items()} if undo else PAIRS
    others = set(pairs.values())
    bypassed = {} if undo else find_bypassed(model)
    swaps: dict[str, type[nn.Module]] = {}
    for name, module in model.named_modules():
        kind = type(module)
        if undo and isinstance(module, Norm) and module.frozen is not None:
            report.left.append(Entry(name, describe(kind), reason=UNFREEZE_FIRST))
            continue
        if isinstance(module, Adapted):
            if undo:
                if isinstance(module, _Synchronized):
                    report.left.append(Entry(name, describe(kind), reason=UNDO_FIRST))
                    continue
                swaps[name] = module.original
                report.changed.append(Entry(name, describe(kind), became=describe(module.original)))
            continue
        scripted = getattr(module, "original_name", None) in {theirs.__name__ for theirs in PAIRS}
        if scripted and isinstance(module, torch.jit.ScriptModule):
            report.left.append(Entry(name, describe(kind), reason="it is compiled by torch.jit.script"))
        found = None if undo or id(module) in bypassed else finder.find(module)
        if found is not None and "forward" not in vars(module):
            swaps |= plan_adapted(name, module, found, report)
            continue
        if not isinstance(module, BASES) or kind in others or (is_ours(kind) and not undo):
            if not undo and is_unknown_norm(module):
                report.left.append(Entry(name, describe(kind), reason=UNKNOWN.format(name=kind.__name__)))
            continue
        reason = "" if undo and kind in pairs else find_norm_obstacle(module, bypassed)
        if reason:
            report.left.append(Entry(name, describe(kind), reason=reason))
        elif kind in pairs:
            swaps[name] = pairs[kind]
            report.changed.append(Entry(name, describe(kind), became=describe(pairs[kind])))
    return swaps


def plan_adapted(name: str, module: nn.Module, found: tuple[Any, str], report: SurgeryReport) -> dict[str, Any]:
    """What becomes of a norm of somebody else's class."""
    kind, note = found
    if kind is None:
        report.left.append(Entry(name, describe(type(module)), reason=note))
        return {}
    became = f"{describe(kind)} ({note})" if note else describe(kind)
    report.changed.append(Entry(name, describe(type(module)), became=became))
    return {name: kind}


def is_unknown_norm(module: nn.Module) -> bool:
    """Whether a module calls itself a norm and is none that is known; a container, which holds norms, is none."""
    kind = type(module)
    if not NAMED_NORM.search(kind.__name__) or kind.__module__.partition(".")[0] in ("torch", "anynorm"):
        return False
    own = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    inside = [child for child in module.modules() if child is not module]
    if any(isinstance(child, (*BASES, Norm)) or NAMED_NORM.search(type(child).__name__) for child in inside):
        return False
    return own or not inside


def find_bypassed(model: nn.Module) -> dict[int, str]:
    """Why norms, by identity, are never called in evaluation: torch runs a fused kernel on their weights."""
    return {
        id(norm): "nn.TransformerEncoderLayer's fast path in evaluation reads its weights and never calls it"
        for layer in model.modules()
        if isinstance(layer, nn.TransformerEncoderLayer)
        for norm in (layer.norm1, layer.norm2)
    }


def find_norm_obstacle(module: nn.Module, bypassed: dict[int, str]) -> str:
    """Why a norm is not changed, or ""."""
    kind = type(module)
    if id(module) in bypassed:
        return bypassed[id(module)]
    if isinstance(module, nn.SyncBatchNorm):
        return "it merges statistics over processes: anynorm.sync(model) turns it into ours"
    if is_ours(kind):
        return UNDO_FIRST if kind is SyncBatchNorm else "torch.nn has no such norm"
    if kind not in PAIRS:
        base = next(base for base in kind.__mro__[1:] if base in PAIRS or base in PAIRS.values() or base in BASES)
        return f"a subclass of {describe(base)} may have code of its own"
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    return ""
