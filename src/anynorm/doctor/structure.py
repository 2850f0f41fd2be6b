"""Which layers stand before and behind each norm, by the graphs that torch.fx records of the model or of its parts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import takewhile
from typing import NamedTuple

import torch.nn as nn
from torch import fx

from ..surgery.activation import read_node
from ..surgery.fold.graphs import Recording, record
from ..surgery.fold.layers import is_layer
from ..surgery.fold.passing import describe_node, find_module, name_function, reads_shape

FURTHEST = 8  # steps away from a norm


class Step(NamedTuple):
    """A call on the way to a norm, or away from it.

    Attributes:
        said: the call in words: ``Conv2d 0``, ``relu``.
        name: the module's name in the model; "" for a function.
        module: None for a function.
        function: its name; "" for a module.
        activation: whether it is one.
        is_shared: whether its output goes elsewhere too, or it is called elsewhere.
    """

    said: str
    name: str
    module: nn.Module | None
    function: str
    activation: bool
    is_shared: bool


class Surroundings(NamedTuple):
    """What is around a norm, the nearest first; in each way up to where it parts or joins.

    Attributes:
        before, after: the calls.
        calls: how often a graph calls the norm.
    """

    before: tuple[Step, ...]
    after: tuple[Step, ...]
    calls: int


def find_surroundings(model: nn.Module, norms: Collection[str]) -> dict[str, Surroundings]:
    """What is around each norm that a graph shows."""
    found: dict[str, Surroundings] = {}
    first = {id(module): name for name, module in model.named_modules()}
    for group in record(model, norms).groups:
        for recording in group:
            for name, around in read(recording, first, norms):
                # What a flag or the mode changes is not known.
                found[name] = around if name not in found else find_common(found[name], around)
    return found


def find_common(one: Surroundings, other: Surroundings) -> Surroundings:
    """What two ways through a model have in common around a norm."""
    before, after = (
        tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*each, strict=False)))
        for each in ((one.before, other.before), (one.after, other.after))
    )
    return Surroundings(before, after, max(one.calls, other.calls))


def read(recording: Recording, names: dict[int, str], norms: Collection[str]) -> Iterator[tuple[str, Surroundings]]:
    """The surroundings of a graph's norms; of one that is called several times, of its first call."""
    calls: dict[str, list[fx.Node]] = {}
    for node in recording.graph.nodes:
        module = find_module(node, recording.modules)
        name = names.get(id(module), "")
        if module is not None and name in norms:
            calls.setdefault(name, []).append(node)
    for name, (node, *more) in calls.items():
        before = tuple(make_step(each, recording, names) for each in walk_back(node))
        after = tuple(make_step(each, recording, names) for each in walk_on(node))
        yield name, Surroundings(before, after, 1 + len(more))


def walk_back(node: fx.Node) -> Iterator[fx.Node]:
    """What makes a node's input, up to where it has several."""
    for _ in range(FURTHEST):
        sources = node.all_input_nodes
        if len(sources) != 1 or sources[0].op not in ("call_module", "call_function", "call_method"):
            return
        node = sources[0]
        yield node


def walk_on(node: fx.Node) -> Iterator[fx.Node]:
    """What takes a node's output, as long as one alone does."""
    for _ in range(FURTHEST):
        users = [user for user in node.users if not reads_shape(user, node)]
        if len(users) != 1 or users[0].op == "output":
            return
        node = users[0]
        yield node


def make_step(node: fx.Node, recording: Recording, names: dict[int, str]) -> Step:
    module = find_module(node, recording.modules)
    function = "" if module is not None else name_function(node)
    # Its own name, or why it cannot be fused: both are said of activations alone.
    is_activation = any(read_node(node, recording.modules)) and not (module is not None and is_layer(module))
    users = [user for user in node.users if not reads_shape(user, node)]
    calls = 0 if module is None else sum(find_module(each, recording.modules) is module for each in node.graph.nodes)
    said = describe_node(node, recording.modules)
    name = "" if module is None else names.get(id(module), "")
    return Step(said, name, module, function, is_activation, len(users) > 1 or calls > 1)
