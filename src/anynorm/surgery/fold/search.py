"""Where can a norm go? Back to the layers that make its input, or on to the layers that take its output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor, fx

from ..fuse import SUMS, find_aliases, find_written
from .axes import Axes
from .graphs import Recording
from .layers import count_dims, find_border_obstacle, is_layer
from .norms import FixedNorm, NotFoldable
from .passing import (
    describe_node,
    find_module,
    find_passing_obstacle,
    is_concatenation,
    is_moving,
    reads_shape,
)


@dataclass(frozen=True, eq=False)
class Target:
    """A module that takes over a norm.

    Attributes:
        node: its call.
        module: a layer, or another norm.
        side: "output" for what stands behind it, "input" for what stands before it.
        channels: for each of its channels there, the norm's.
        is_shifted: whether it takes the shift too; of a sum's parts only the first does.
    """

    node: fx.Node
    module: nn.Module
    side: str
    channels: Tensor
    is_shifted: bool = True

    def equals(self, other: Target) -> bool:
        """Whether another graph says the same."""
        same = self.module is other.module and self.side == other.side and self.is_shifted == other.is_shifted
        return same and torch.equal(self.channels, other.channels)


class Search:
    """Looks for the places of norms in one graph.

    Args:
        recording: the graph; its `modules` say what stands in the place of norms that are folded already.
        norms: all norms that can be folded, by identity.
    """

    recording: Recording
    norms: dict[int, FixedNorm]
    modules: dict[str, nn.Module]
    axes: Axes

    def __init__(self, recording: Recording, norms: dict[int, FixedNorm]) -> None:
        self.recording, self.norms = recording, norms
        self.modules = recording.modules
        self.axes = Axes(recording)

    def find_calls(self, module: nn.Module) -> list[fx.Node]:
        """The calls of a module."""
        return [node for node in self.recording.graph.nodes if find_module(node, self.modules) is module]

    def replace(self, norm: nn.Module, successor: nn.Module) -> None:
        """Go on with another module in the place of a norm."""
        self.modules.update({name: successor for name, module in self.modules.items() if module is norm})

    def find_behind(self, norm: FixedNorm, call: fx.Node, into_norms: bool) -> list[Target]:
        """The modules before a norm that take it over.

        Raises:
            NotFoldable: there are none.
        """
        source = read_input(call, self.modules)
        return list(self.walk_back(norm, source, call, [], into_norms))

    def walk_back(
        self, norm: FixedNorm, node: fx.Node, user: fx.Node, path: list[fx.Node], into_norms: bool
    ) -> Iterator[Target]:
        said = describe_node(node, self.modules)
        if any(each is not user and not reads_shape(each, node) for each in node.users):
            raise NotFoldable(f"the output of {said} is used elsewhere too")
        module = find_module(node, self.modules)
        if module is not None and is_layer(module):
            yield Target(node, module, "output", self.axes.map_back(norm, node, module, path))
        elif module is not None and into_norms and id(module) in self.norms:
            yield self.find_norm_target(norm, node, self.norms[id(module)], "output", path)
        elif node.op in ("call_function", "call_method") and node.target in SUMS:
            yield from self.walk_sum(norm, node, path, into_norms)
        elif is_concatenation(node):
            yield from self.walk_cat(norm, node, path, into_norms)
        else:
            if node.op in ("placeholder", "get_attr", "output"):
                raise NotFoldable(f"it takes {said}")
            if reason := find_passing_obstacle(node, self.modules, norm.scale, norm.shift):
                raise NotFoldable(f"{said}: {reason}")
            source = node.args[0]
            assert isinstance(source, fx.Node)
            yield from self.walk_back(norm, source, node, [node, *path], into_norms)

    def walk_sum(self, norm: FixedNorm, node: fx.Node, path: list[fx.Node], into_norms: bool) -> Iterator[Target]:
        """scale * (a + b) + shift = (scale * a + shift) + scale * b."""
        parts: Any = node.args
        if (
            len(parts) != 2
            or node.kwargs
            or not all(isinstance(part, fx.Node) for part in parts)
            or parts[0] is parts[1]
        ):
            raise NotFoldable("it takes a sum that is not one of two tensors")
        if any(is_moving(each, self.modules) for each in path):
            raise NotFoldable("it takes a sum that is reshaped")
        first, second = (list(self.walk_back(norm, part, node, path, into_norms)) for part in parts)
        dims = {count_dims(target.module) if is_layer(target.module) else -1 for target in (*first, *second)}
        if len(dims) > 1 or count_width(first) != count_width(second):
            raise NotFoldable("it takes a sum of tensors of other axes")
        yield from first
        yield from (replace(target, is_shifted=False) for target in second)

    def walk_cat(self, norm: FixedNorm, node: fx.Node, path: list[fx.Node], into_norms: bool) -> Iterator[Target]:
        """Each part takes the numbers of its channels."""
        given = {**dict(zip(("tensors", "dim"), node.args, strict=False)), **node.kwargs}
        parts, dim = given.get("tensors"), given.get("dim", 0)
        if dim != 1 or norm.takes_single or not isinstance(parts, Sequence) or len(set(parts)) != len(parts):
            raise NotFoldable("it takes a concatenation along another axis")
        if any(is_moving(each, self.modules) for each in path):
            raise NotFoldable("it takes a concatenation that is reshaped")
        start = 0
        for part in parts:
            if not isinstance(part, fx.Node):
                raise NotFoldable("it takes a concatenation of what is no tensor")
            targets = list(self.walk_back(norm, part, node, [node, *path], into_norms))
            yield from (replace(target, channels=target.channels + start) for target in targets)
            start += count_width(targets)
        if start != len(norm.scale):
            raise NotFoldable("it takes a concatenation of other channels")

    def find_before(self, norm: FixedNorm, call: fx.Node, into_norms: bool) -> list[Target]:
        """The modules behind a norm that take it over, each of them all.

        Raises:
            NotFoldable: one of them cannot.
        """
        source = read_input(call, self.modules)
        if norm.behind:
            raise NotFoldable(f"it applies {type(norm.behind[0]).__name__} itself")
        targets = list(self.walk_on(norm, call, call, [], into_norms))
        watched = find_aliases(source, self.modules)
        last = {target.node for target in targets}
        node = call
        while last:
            node = node.next
            last.discard(node)
            if last and not watched.isdisjoint(find_written(node, self.modules)):
                raise NotFoldable(f"{describe_node(node, self.modules)} may change its input meanwhile")
        return targets

    def walk_on(
        self, norm: FixedNorm, call: fx.Node, node: fx.Node, path: list[fx.Node], into_norms: bool
    ) -> Iterator[Target]:
        users = [user for user in node.users if not reads_shape(user, node)]
        if not users:
            raise NotFoldable("nothing takes its output")
        for user in users:
            module = find_module(user, self.modules)
            if module is not None and is_layer(module):
                read_input(user, self.modules)
                channels = self.axes.map_on(norm, call, user, module, path)
                said = describe_node(user, self.modules)
                if bool(norm.shift.any()) and (reason := find_border_obstacle(module)):
                    raise NotFoldable(f"{said}: {reason}")
                yield Target(user, module, "input", channels)
            elif module is not None and into_norms and id(module) in self.norms:
                yield self.find_norm_target(norm, user, self.norms[id(module)], "input", path)
            elif user.op == "output":
                raise NotFoldable(f"its output is one of {self.recording.name or 'the model'}")
            elif reason := find_passing_obstacle(user, self.modules, norm.scale, norm.shift):
                raise NotFoldable(f"{describe_node(user, self.modules)}: {reason}")
            else:
                yield from self.walk_on(norm, call, user, [*path, user], into_norms)

    def find_norm_target(
        self, norm: FixedNorm, node: fx.Node, other: FixedNorm, side: str, path: list[fx.Node]
    ) -> Target:
        """Another norm that takes over this one."""
        read_input(node, self.modules)
        said = describe_node(node, self.modules)
        if not other.is_open or (side == "output" and other.behind):
            raise NotFoldable(f"{said}: no norm can be folded into it")
        same = norm.dims == other.dims and norm.takes_single == other.takes_single
        if not same or len(norm.scale) != len(other.scale) or any(is_moving(each, self.modules) for each in path):
            raise NotFoldable(f"{said}: a norm of other axes")
        return Target(node, other.norm, side, torch.arange(len(norm.scale), device="cpu"))


def count_width(targets: Sequence[Target]) -> int:
    """How many channels a tensor has that these make."""
    return max(int(target.channels.max()) for target in targets) + 1


def read_input(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """The one input of a call.

    Raises:
        NotFoldable: it has more.
    """
    given = [*node.args, *node.kwargs.values()]
    if len(given) != 1 or not isinstance(given[0], fx.Node):
        raise NotFoldable(f"{describe_node(node, modules)} is given more than its input")
    return given[0]
