"""Norm and activation side by side in `nn.Sequential`: find them, fuse them in place, take them apart again.

The norm stays the same object with another class. The activation's place takes `nn.Identity`, so that indices and
state_dict keys stay; the activation itself is kept there, out of sight, for the way back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch.nn as nn
from torch import fx

from ..activations import find_activation
from ..modules.fused import Fused
from .activation import read_module
from .report import FUSED, PAIRS, UNDO_FIRST, Entry, SurgeryReport, describe, is_ours
from .rewrite import GraphForward
from .trace import is_hooked

ACTIVATION_ATTRIBUTE = "replaced"  # the attribute of nn.Identity that holds the activation


@dataclass(frozen=True)
class Place:
    """A norm and what follows it in a Sequential, by name.

    Attributes:
        sequential: name of the Sequential in the model.
        first, second: keys of the norm and of its successor there.
        activation: as in ``activation=``.
    """

    sequential: str
    first: str
    second: str
    activation: str

    @property
    def norm(self) -> str:
        """Name of the norm in the model."""
        return join_name(self.sequential, self.first)

    @property
    def successor(self) -> str:
        """Name of the activation, or of the nn.Identity in its place."""
        return join_name(self.sequential, self.second)


def join_name(parent: str, key: str) -> str:
    """A name below another."""
    return f"{parent}.{key}" if parent else key


def find_pairs(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Sequential, key and next key of all neighbours in Sequentials that run their members one after the other."""
    for name, module in model.named_modules():
        same = all(
            getattr(type(module), name, None) is getattr(nn.Sequential, name) for name in ("forward", "__iter__")
        )
        if same and "forward" not in vars(module):
            keys = [key for key, child in module._modules.items() if child is not None]
            yield from ((name, first, second) for first, second in pairwise(keys))


def is_norm(module: nn.Module) -> bool:
    """Whether it is one of torch's norms or of ours, by exact type."""
    return type(module) in PAIRS or type(module) in PAIRS.values()


def count_places(model: nn.Module) -> Counter[int]:
    """In how many places of the model each module, by identity, is registered."""
    return Counter(id(child) for parent in model.modules() for child in parent._modules.values())


def plan_fusion(model: nn.Module, graphs: Collection[fx.Graph], report: SurgeryReport) -> list[Place]:
    """What can be fused in place; what cannot, though an activation follows, is added to the report.

    Args:
        graphs: of the model, where it can be traced: they show outputs of norms that are used elsewhere too.
    """
    counts = count_places(model)
    left = {id(model.get_submodule(entry.name)) for entry in report.left}
    places = []
    for sequential, first, second in find_pairs(model):
        norm = model.get_submodule(join_name(sequential, first))
        successor = model.get_submodule(join_name(sequential, second))
        if id(norm) in left or not is_norm(norm):
            continue
        activation, reason = read_module(successor)
        if not activation and not reason:
            continue
        place = Place(sequential, first, second, activation)
        reason = (
            find_module_obstacle(place.norm, norm, counts)
            or reason
            or find_module_obstacle(place.successor, successor, counts)
            or find_user_obstacle(place, graphs)
        )
        if reason:
            left.add(id(norm))
            report.left.append(make_unfused_entry(place.norm, norm, describe(type(successor)), reason))
        else:
            places.append(place)
    return places


def make_unfused_entry(name: str, norm: nn.Module, successor: str, reason: str) -> Entry:
    """The report's line about a norm that is not fused with its successor."""
    return Entry(name, describe(type(norm)), reason=f"not fused with {successor}: {reason}")


def find_module_obstacle(name: str, module: nn.Module, counts: Counter[int]) -> str:
    """Why a norm or an activation must not be fused wherever it is, or ""."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{name} does not know its size yet; call the model once before"
    if is_hooked(module):
        return f"{name} has hooks or a parametrization, which would see another output"
    if "forward" in vars(module):
        return f"the forward of {name} was replaced on the object"
    if counts[id(module)] > 1:
        return f"{name} is shared, it has {counts[id(module)]} places in the model"
    return ""


def find_user_obstacle(place: Place, graphs: Collection[fx.Graph]) -> str:
    """Why a norm cannot be fused in place, where a graph shows that something else reads its output, or ""."""
    for node in (node for graph in graphs for node in graph.nodes):
        if node.op == "call_module" and node.target == place.norm:
            if [(user.op, user.target) for user in node.users] != [("call_module", place.successor)]:
                return "the norm's output is used elsewhere too"
    return ""


def fuse_place(model: nn.Module, place: Place) -> None:
    """Fuse in place; the norm is ours already."""
    sequential = model.get_submodule(place.sequential)
    norm, activation = sequential._modules[place.first], sequential._modules[place.second]
    assert norm is not None
    assert activation is not None
    identity = nn.Identity().train(activation.training)
    # Into __dict__, past nn.Module: the activation must not appear among the modules of the model.
    identity.__dict__[ACTIVATION_ATTRIBUTE] = activation
    norm.__class__ = FUSED[type(norm)]
    norm.activation = place.activation  # type: ignore[assignment] # its class was just exchanged
    sequential._modules[place.second] = identity


def plan_undo(model: nn.Module, report: SurgeryReport) -> list[Place]:
    """Fused norms that can be taken apart: nn.Identity stands behind them in a Sequential.

    The others are added to the report as left.
    """
    counts = count_places(model)
    pairs = {
        join_name(sequential, first): (sequential, first, second) for sequential, first, second in find_pairs(model)
    }
    places = []
    for name, norm in model.named_modules():
        if not isinstance(norm, Fused) or norm.frozen is not None:
            continue
        if is_ours(type(norm)) and norm.plain not in PAIRS.values():
            report.left.append(Entry(name, describe(type(norm)), reason=UNDO_FIRST))
            continue
        sequential, first, second = pairs.get(name, ("", "", ""))
        successor = model.get_submodule(join_name(sequential, second))
        # A graph calls what it called when it was made: there only an nn.Identity that was called as the activation.
        called = not isinstance(model, (fx.GraphModule, GraphForward)) or ACTIVATION_ATTRIBUTE in vars(successor)
        if type(successor) is nn.Identity and called and type(norm) in FUSED.values() and counts[id(norm)] == 1:
            places.append(Place(sequential, first, second, norm.activation))
        else:
            reason = "a fused norm is taken apart where torch.nn.Identity stands behind it in a Sequential"
            report.left.append(Entry(name, describe(type(norm)), reason=reason))
    return places


def take_apart(model: nn.Module, place: Place) -> None:
    """Torch's norm again, and behind it the activation that was there, or a new one."""
    sequential = model.get_submodule(place.sequential)
    norm, identity = sequential._modules[place.first], sequential._modules[place.second]
    assert isinstance(norm, Fused)
    assert identity is not None
    activation = vars(identity).get(ACTIVATION_ATTRIBUTE)
    if activation is None and (found := find_activation(place.activation)):
        known, number = found
        activation = known.module(**known.settings, **({known.option: number} if known.option else {}))
    theirs = {ours: theirs for theirs, ours in PAIRS.items()}
    del norm.activation
    vars(norm).pop("label", None)
    norm.__class__ = theirs[norm.plain]  # type: ignore[assignment] # its class was just exchanged
    if activation is not None:
        sequential._modules[place.second] = activation.train(identity.training)
