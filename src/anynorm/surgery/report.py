"""What surgery did to a model, in a form to read and to print; and which class becomes which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch.nn as nn

from ..modules import batch, fused, group, instance, layer, lazy, rms
from ..modules.adapted import Adapted
from .differences import Difference

PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(module, name)
    for module, names in (
        (batch, [f"BatchNorm{n}d" for n in (1, 2, 3)]),
        (instance, [f"InstanceNorm{n}d" for n in (1, 2, 3)]),
        (lazy, [f"Lazy{kind}{n}d" for kind in ("BatchNorm", "InstanceNorm") for n in (1, 2, 3)]),
        (layer, ["LayerNorm"]),
        (rms, ["RMSNorm"]),
        (group, ["GroupNorm"]),
    )
    for name in names
}
FUSED: dict[type[nn.Module], type[fused.Fused]] = {
    kind.plain: kind
    for kind in vars(fused).values()
    if isinstance(kind, type) and issubclass(kind, fused.Fused) and "plain" in vars(kind)
}
UNFREEZE_FIRST = "it is frozen: anynorm.unfreeze(model) comes first"
UNDO_FIRST = "it merges statistics over processes: anynorm.sync(model, undo=True) comes first"


@dataclass(frozen=True)
class Entry:
    """One norm of a model.

    Attributes:
        name: its first name there.
        kind, became: its class before and now.
        reason: why it was left, or left unfused.
        then: what was fused behind it, ``"relu"`` or ``"add, relu"``.
        where: the model it was fused in, ``"model"`` for the given one or ``"report.model"``.
    """

    name: str
    kind: str
    became: str = ""
    reason: str = ""
    then: str = ""
    where: str = ""


@dataclass
class SurgeryReport:
    """What was done to a model.

    Attributes:
        changed: the norms of the given model that have another class now, or were frozen, folded or converted.
        left: the norms that were left, or left unfused, and why.
        fused: the norms that took over what followed them.
        model: the model to go on with: the given one, or with ``fuse=True`` a new one on the same parameters.
        note: what other tools must know, in a sentence.
        differences: how far each output on the example moved; empty where none was given.
        layers: the same for each layer that the model had before and after, where that was asked for.
    """

    changed: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    fused: list[Entry] = field(default_factory=list)
    model: nn.Module = field(default_factory=nn.Module, repr=False, compare=False)
    note: str = ""
    differences: list[Difference] = field(default_factory=list)
    layers: list[Difference] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = Counter(f"{entry.kind} -> {entry.became}" for entry in self.changed)
        fusions = Counter(f"{entry.kind}, {entry.then} -> {entry.became} in {entry.where}" for entry in self.fused)
        count = f", {len(self.fused)} fused" if self.fused else ""
        lines = [f"{len(self.changed)} norms changed{count}, {len(self.left)} left"]
        lines += [f"  {count} x {kind}" for kind, count in kinds.items()]
        lines += [f"  {count} x {fusion}" for fusion, count in fusions.items()]
        lines += write_left(self.left)
        lines += [f"  {difference}" for difference in (*self.layers, *self.differences)]
        lines += [f"  {self.note}"] if self.note else []
        return "\n".join(lines)


def write_left(left: Iterable[Entry]) -> list[str]:
    """Return a line for each class and reason among norms that were left: the first one's name and how many more."""
    names: dict[tuple[str, str], list[str]] = {}
    for entry in left:
        names.setdefault((entry.kind, entry.reason), []).append(entry.name or "the model")
    return [
        f"  left {name}{f' and {len(more)} more' if more else ''} ({kind}): {reason}"
        for (kind, reason), (name, *more) in names.items()
    ]


def is_ours(kind: type) -> bool:
    """Return whether a class is one of this library's."""
    return kind.__module__.partition(".")[0] == "anynorm"


def describe(kind: type[nn.Module]) -> str:
    """Return the name of a class as people write it: anynorm.BatchNorm2d, torch.nn.BatchNorm2d.

    An adapted norm has the name of the class it had; of it is said what it computes.
    """
    if issubclass(kind, Adapted):
        return f"anynorm, {kind.adapter.describe()}"
    if is_ours(kind):
        return f"anynorm.{kind.__name__}"
    if getattr(nn, kind.__name__, None) is kind:
        return f"torch.nn.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"
