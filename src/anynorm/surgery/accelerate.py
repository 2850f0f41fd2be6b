"""`accelerate`: every torch.nn norm of a model becomes ours, in place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn as nn

from ..modules import batch, lazy, sample

PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(room, name)
    for room, names in (
        (batch, [f"{kind}{n}d" for kind in ("BatchNorm", "InstanceNorm") for n in (1, 2, 3)]),
        (lazy, [f"Lazy{kind}{n}d" for kind in ("BatchNorm", "InstanceNorm") for n in (1, 2, 3)]),
        (sample, ["LayerNorm", "RMSNorm", "GroupNorm"]),
    )
    for name in names
}
BASES = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Entry:
    """One norm of a model: its first name there, its class before, its class now, and why it was left."""

    name: str
    kind: str
    became: str = ""
    reason: str = ""


@dataclass
class Report:
    """What `accelerate` changed and what it left, each norm once."""

    changed: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = Counter(f"{entry.kind} -> {entry.became}" for entry in self.changed)
        lines = [f"{len(self.changed)} norms changed, {len(self.left)} left"]
        lines += [f"  {count} x {kind}" for kind, count in kinds.items()]
        lines += [f"  left {entry.name} ({entry.kind}): {entry.reason}" for entry in self.left]
        return "\n".join(lines)


def accelerate(model: nn.Module, undo: bool = False) -> Report:
    """Turn every torch.nn norm of a model into ours, in place: the same objects, with another class.

    Parameters, buffers, mode, hooks, sharing and names stay, so optimizers and references go on working.

    Args:
        model: any module; a norm itself is allowed.
        undo: turn ours back into torch's.

    Returns:
        A report of what changed, and of what was left and why: subclasses of torch's norms with code of their own,
        norms whose `forward` was replaced on the object, SyncBatchNorm, and norms of nn.TransformerEncoderLayer, whose
        fast path in evaluation reads their weights and never calls them.

    Raises:
        TypeError: `model` is not a module.

    Note:
        Tools that look for torch's exact types (torch.ao.quantization's fuse_modules and convert, and
        torch.fx.experimental.optimization.fuse) or read source (torch.jit.script) want ``undo=True`` first.
        Instance and layer norm return channels_last where their input is; torch's return contiguous, so a ``view``
        behind them may have to become ``reshape``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        >>> print(anynorm.accelerate(model))
        1 norms changed, 0 left
          1 x torch.nn.BatchNorm1d -> anynorm.BatchNorm1d
        >>> print(anynorm.accelerate(model, undo=True).changed[0].became)
        torch.nn.BatchNorm1d
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate: model must be a torch.nn.Module; got {type(model).__name__}; pass the model itself"
        )
    pairs = {ours: theirs for theirs, ours in PAIRS.items()} if undo else PAIRS
    others = set(pairs.values())
    bypassed = {} if undo else find_bypassed(model)
    report = Report()
    for name, module in model.named_modules():
        kind = type(module)
        scripted = getattr(module, "original_name", None) in {theirs.__name__ for theirs in PAIRS}
        if scripted and isinstance(module, torch.jit.ScriptModule):
            report.left.append(Entry(name, describe(kind), reason="it is compiled by torch.jit.script"))
        if not isinstance(module, BASES) or kind in others:
            continue
        reason = "" if undo and kind in pairs else find_reason(module, bypassed)
        if reason:
            report.left.append(Entry(name, describe(kind), reason=reason))
        elif kind in pairs:
            module.__class__ = pairs[kind]  # type: ignore[assignment]
            report.changed.append(Entry(name, describe(kind), became=describe(pairs[kind])))
    return report


def describe(kind: type[nn.Module]) -> str:
    """The class as people write it."""
    if kind in PAIRS:
        return f"torch.nn.{kind.__name__}"
    if kind in PAIRS.values():
        return f"anynorm.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def find_bypassed(model: nn.Module) -> dict[int, str]:
    """Norms, by identity, that torch calls a fused kernel for in evaluation."""
    return {
        id(norm): "nn.TransformerEncoderLayer's fast path in evaluation reads its weights and never calls it"
        for layer in model.modules()
        if isinstance(layer, nn.TransformerEncoderLayer)
        for norm in (layer.norm1, layer.norm2)
    }


def find_reason(module: nn.Module, bypassed: dict[int, str]) -> str:
    """Why a norm is not changed, or nothing."""
    kind = type(module)
    if id(module) in bypassed:
        return bypassed[id(module)]
    if isinstance(module, nn.SyncBatchNorm):
        return "it merges statistics over processes, which ours does not do yet"
    if kind not in PAIRS:
        base = next(base for base in kind.__mro__[1:] if base in PAIRS or base in PAIRS.values() or base in BASES)
        return f"a subclass of {describe(base)} may have code of its own"
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    return ""
