"""Folds every norm for which a place is found: in float64 and on paper first, rounded once and applied at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch.nn as nn
from torch import Tensor, fx

from ..graph_model import find_foreign_reads
from ..operation import find_held, replace_everywhere
from ..sequential import count_places
from ..trace import is_hooked
from .graphs import Recording, Recordings
from .layers import Weights, find_tensor_obstacle, is_layer, round_weights
from .norms import FixedNorm, NotFoldable, write_norm
from .search import Search, Target

Groups = list[list[Search]]


@dataclass(frozen=True)
class Folded:
    """A norm that was folded, and into what."""

    norm: FixedNorm
    into: tuple[str, ...]


class FoldPlan:
    """What is folded, and what the layers and norms that are left compute then.

    Args:
        model: looked at, and changed by `apply` alone.
        norms: by identity.
        recordings: of the model.
    """

    model: nn.Module
    norms: dict[int, FixedNorm]
    names: dict[int, str]
    places: Counter[int]
    held: dict[int, str]
    tensors: Counter[Any]
    read_elsewhere: set[str]

    def __init__(self, model: nn.Module, norms: dict[int, FixedNorm], recordings: Recordings) -> None:
        self.model, self.norms = model, dict(norms)
        self.groups: Groups = [[Search(each, self.norms) for each in group] for group in recordings.groups]
        self.names = {id(module): name for name, module in model.named_modules()}
        self.places = count_places(model)
        self.held = find_held(model)
        self.tensors = count_tensors(model)
        kinds = {type(module) for module in model.modules()}
        self.read_elsewhere = {name for kind in kinds for name in find_foreign_reads(kind)}
        self.weights: dict[int, Weights] = {}
        self.made: dict[int, dict[str, nn.Parameter]] = {}
        self.changed_norms: set[int] = set()
        self.folded: list[Folded] = []
        self.successors: dict[int, nn.Module] = {}
        self.reasons: dict[int, str] = {id_: recordings.reasons.get(norm.name, "") for id_, norm in norms.items()}

    def fold_all(self) -> None:
        """Fold until nothing is left that can be: first into layers, then norms into each other."""
        todo = list(self.norms)
        into_norms = False
        while True:
            done = [id_ for id_ in todo if self.try_fold(id_, into_norms)]
            todo = [id_ for id_ in todo if id_ not in done]
            if done:
                into_norms = False
            elif into_norms:
                return
            else:
                into_norms = True

    def try_fold(self, id_: int, into_norms: bool) -> bool:
        """Fold a norm if it can be; else its reason is kept."""
        norm = self.norms[id_]
        try:
            group = self.find_group(norm)
            targets = self.find_targets(norm, group, into_norms)
            self.take_over(norm, targets)
        except NotFoldable as reason:
            if not into_norms:
                self.reasons[id_] = str(reason)
            return False
        del self.norms[id_]
        self.successors[id_] = norm.make_successor()
        for search in (search for group in self.groups for search in group):
            search.norms = self.norms
            search.replace(norm.norm, self.successors[id_])
        into = tuple(self.names[id(target.module)] for target in targets)
        self.folded.append(Folded(norm, into))
        return True

    def find_ends(self, folded: Folded) -> list[str]:
        """What a norm is part of at last, where it went into norms that were folded too."""
        further = {each.norm.name: each for each in self.folded}
        ends = [self.find_ends(further[name]) if name in further else [name] for name in folded.into]
        return list(dict.fromkeys(name for names in ends for name in names))

    def find_group(self, norm: FixedNorm) -> list[Search]:
        """The graphs of the part that calls a norm.

        Raises:
            NotFoldable: there is none, or more than one, or the norm must stay where it is.
        """
        check_use(norm.name, norm.norm)
        if id(norm.norm) in self.held:
            raise NotFoldable(f"{self.held[id(norm.norm)]} holds it too, past torch's registry: code may call it there")
        called = [group for group in self.groups if any(search.find_calls(norm.norm) for search in group)]
        if not called:
            raise NotFoldable(self.reasons[id(norm.norm)] or "the model never calls it")
        if len(called) > 1:
            raise NotFoldable("several parts of the model call it")
        (group,) = called
        self.check_alone(norm.norm, norm.name, group)
        return group

    def check_alone(self, module: nn.Module, name: str, group: list[Search]) -> None:
        """Raise where a module is used more than once, or where code that no graph shows may use it."""
        for search in group:
            if len(calls := search.find_calls(module)) > 1:
                raise NotFoldable(f"{name} is called {len(calls)} times")
            if find_reads(search.recording, module):
                raise NotFoldable(f"the forward reads tensors of {name} by themselves")
        part = group[0].recording
        if not part.is_whole:
            if self.places[id(module)] > 1:
                raise NotFoldable(f"{name} has {self.places[id(module)]} places in the model")
            if self.read_elsewhere.intersection(name.removeprefix(f"{part.name}.").split(".")):
                raise NotFoldable(f"code of another module may call {name} by itself")

    def find_targets(self, norm: FixedNorm, group: list[Search], into_norms: bool) -> list[Target]:
        """What takes a norm over, alike in all graphs that call it.

        Raises:
            NotFoldable: with the reason for both directions.
        """
        reasons = []
        for find in (Search.find_behind, Search.find_before):
            try:
                found = [
                    find(search, norm, call, into_norms) for search in group for call in search.find_calls(norm.norm)
                ]
                self.check_targets(norm, group, found)
            except NotFoldable as reason:
                reasons.append(str(reason))
            else:
                return found[0]
        raise NotFoldable(f"before it, {reasons[0]}; behind it, {reasons[1]}")

    def check_targets(self, norm: FixedNorm, group: list[Search], found: list[list[Target]]) -> None:
        """Raise where graphs differ, or where a target must stay as it is."""
        first, *others = found
        for other in others:
            if len(first) != len(other) or not all(a.equals(b) for a, b in zip(first, other, strict=True)):
                raise NotFoldable("the forward goes several ways")
        if len({id(target.module) for target in first}) < len(first):
            raise NotFoldable("one layer stands there twice")
        for target in first:
            name = self.names[id(target.module)]
            check_use(name, target.module)
            self.check_alone(target.module, name, group)
            users = [search for each in self.groups for search in each if search.find_calls(target.module)]
            if any(search not in group or not search.find_calls(norm.norm) for search in users):
                raise NotFoldable(f"{name} is called without it too")
            for parameter in target.module.parameters(recurse=False):
                if self.tensors[find_place(parameter)] > 1:
                    raise NotFoldable(f"{name} shares a parameter with another module")

    def take_over(self, norm: FixedNorm, targets: Iterable[Target]) -> None:
        """Compute what the targets are with the norm in them.

        Raises:
            NotFoldable: it cannot be kept in a target's dtype.
        """
        weights, made, norms = dict(self.weights), dict(self.made), dict(self.norms)
        for target in targets:
            module, id_ = target.module, id(target.module)
            channels = target.channels.to(norm.scale.device)
            scale, shift = norm.scale[channels], norm.shift[channels] * float(target.is_shifted)
            if not is_layer(module):
                norms[id_] = combine(norms[id_], scale, shift, target.side)
                self.changed_norms.add(id_)
                continue
            name = self.names[id_]
            if reason := find_tensor_obstacle(module, norm.scale, norm.dtype):
                raise NotFoldable(f"{name}: {reason}")
            before = weights.get(id_) or Weights.of(module)
            fold = before.fold_output if target.side == "output" else before.fold_input
            weights[id_] = fold(module, scale, shift)
            rounded = round_weights(module, weights[id_])
            if rounded is None:
                raise NotFoldable(f"{name}: its new weights would not be finite in {module.weight.dtype}")
            made[id_] = rounded
        self.weights, self.made, self.norms = weights, made, norms

    def apply(self) -> None:
        """Change the model."""
        modules = {id(module): module for module in self.model.modules()}
        for id_, parameters in self.made.items():
            for key, parameter in parameters.items():
                # New parameters: a model that shares the old ones, such as one that was fused, keeps what it computes.
                modules[id_].register_parameter(key, parameter)
        for id_ in self.changed_norms & set(self.norms):
            write_norm(self.norms[id_])
        for each in self.folded:
            replace_everywhere(self.model, each.norm.norm, self.successors[id(each.norm.norm)])


def combine(norm: FixedNorm, scale: Tensor, shift: Tensor, side: str) -> FixedNorm:
    """A norm with another one behind it ("output") or before it ("input")."""
    if side == "output":
        return replace(norm, scale=norm.scale * scale, shift=norm.shift * scale + shift)
    return replace(norm, scale=norm.scale * scale, shift=norm.scale * shift + norm.shift)


def check_use(name: str, module: nn.Module) -> None:
    """Raise where something else sees or changes a module's calls, or its tensors."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise NotFoldable(f"{name} does not know its size yet; call the model once before")
    if is_hooked(module):
        raise NotFoldable(f"{name} has hooks or a parametrization")
    if "forward" in vars(module):
        raise NotFoldable(f"the forward of {name} was replaced on the object")


def find_reads(recording: Recording, module: nn.Module) -> list[fx.Node]:
    """Where a forward reads a tensor of a module past its call."""
    return [
        node
        for node in recording.graph.nodes
        if node.op == "get_attr" and recording.modules.get(str(node.target).rpartition(".")[0]) is module
    ]


def find_place(tensor: Tensor) -> Any:
    """What says where a tensor's memory is."""
    return (tensor.device, tensor.data_ptr()) if not tensor.is_meta and tensor.numel() else id(tensor)


def count_tensors(model: nn.Module) -> Counter[Any]:
    """How many modules hold each parameter."""
    return Counter(
        find_place(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None and not isinstance(parameter, nn.parameter.UninitializedParameter)
    )
