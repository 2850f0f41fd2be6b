"""Norm, sum and activation in a model's graph: find them and make one call of them.

A chain is fused only where nobody else sees what lies between: the norm is called once, its output and the sum have one
user each, and nothing between them works in place.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import fx

from ..activations import list_activations
from ..modules.norm import Norm
from .activation import name_call, read_node
from .in_place import IN_PLACE
from .report import FUSED, Entry, SurgeryReport, describe
from .sequential import count_places, find_module_obstacle, make_unfused_entry
from .trace import is_hooked

# Function or method, and what adds where shapes or dtypes differ.
SUMS: dict[Any, Callable[[Any, Any], Any]] = {
    operator.add: operator.add,
    torch.add: operator.add,
    "add": operator.add,
    operator.iadd: operator.iadd,
    IN_PLACE["iadd"]: operator.iadd,
    "add_": operator.iadd,
}
TRUSTED = ("_operator", "math", "builtins", "torch", "anynorm")  # where functions tell by their name what is in place
# What returns new memory, by name; anything else may return a view of its inputs.
ALLOCATING = {"add", "sub", "mul", "truediv", "div", "matmul", "bmm", "cat", "stack"}
ALLOCATING |= {"linear", "conv1d", "conv2d", "conv3d"}
ALLOCATING |= {name.lower() for name in nn.modules.activation.__all__} - {"multiheadattention"}
ALLOCATING_MODULES = {
    kind.__module__ for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm, nn.ReLU, nn.MaxPool2d)
}

NO_ACTIVATION = "not fused: no activation follows that can be fused"


@dataclass(frozen=True)
class Chain:
    """A norm's call, perhaps a sum with a residual, and the activation behind it."""

    norm: fx.Node
    sum: fx.Node | None
    residual: Any
    activation: fx.Node


def fuse_graph(model: nn.Module, graph: fx.Graph, report: SurgeryReport) -> list[str]:
    """Fuse what can be fused, in the graph and in the model's modules, and return the names of the norms that were.

    Args:
        model: a copy, whose norms are ours.
        graph: of that model.
    """
    modules = dict(model.named_modules())
    counts = count_places(model)
    reported = {entry.name for entry in report.left}
    fused: list[str] = []
    erase_identities(graph, modules)
    for node in list(graph.nodes):
        activation, reason = read_node(node, modules)
        if not activation and not reason:
            continue
        chains = [
            (chain, reason or find_chain_obstacle(chain, modules, counts)) for chain in find_chains(node, modules)
        ]
        free = [chain for chain, obstacle in chains if not obstacle]
        if free:
            entry = fuse_chain(free[0], activation, graph, modules)
            report.fused.append(entry)
            report.left = [other for other in report.left if other.name != entry.name]
            fused.append(entry.name)
            continue
        for chain, obstacle in chains:
            name = str(chain.norm.target)
            if name not in reported:
                reported.add(name)
                called = describe(type(modules[str(node.target)])) if node.op == "call_module" else name_call(node)
                report.left.append(make_unfused_entry(name, modules[name], called, obstacle))
    return fused


def erase_identities(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Take calls of nn.Identity out: models put it where others have dropout, between a norm and its activation."""
    for node in list(graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if type(module) is nn.Identity and not is_hooked(module) and "forward" not in vars(module):
            if len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)


def report_unfused(model: nn.Module, graph: fx.Graph, norms: Collection[str], report: SurgeryReport) -> None:
    """Report the norms that are neither fused nor left for another reason: what follows them is no activation."""
    modules = dict(model.named_modules())
    reported = {entry.name for entry in (*report.fused, *report.left)}
    for node in graph.nodes:
        name = str(node.target)
        if node.op != "call_module" or name not in norms or name in reported:
            continue
        reported.add(name)
        followers = [kind for user in node.users if (kind := find_user_class(user, name)) is not None]
        only = f"only {list_activations()} can be fused"
        reason = f"not fused with {describe(followers[0])}: {only}" if followers else NO_ACTIVATION
        report.left.append(Entry(name, describe(type(modules[name])), reason=reason))


def find_user_class(node: fx.Node, norm: str) -> type[nn.Module] | None:
    """The class of the user's module that a node behind a norm belongs to, where that module does not hold the norm."""
    name, kind = next(reversed(node.meta.get("nn_module_stack", {}).values()), ("", nn.Module))
    # fx writes the stack of modules that each node was recorded in; the innermost is last.
    outside = name and not norm.startswith(f"{name}.") and kind.__module__.partition(".")[0] not in ("torch", "anynorm")
    return kind if outside else None


def find_chains(activation: fx.Node, modules: dict[str, nn.Module]) -> Iterator[Chain]:
    """The norms whose output, or whose sum with something, an activation takes: none, one or two."""
    source = activation.args[0] if activation.args else None
    if not isinstance(source, fx.Node):
        return
    if is_norm(source, modules):
        yield Chain(source, None, None, activation)
    elif source.op in ("call_function", "call_method") and source.target in SUMS and len(source.args) >= 2:
        for norm, residual in (source.args[:2], source.args[1::-1]):
            if isinstance(norm, fx.Node) and is_norm(norm, modules):
                yield Chain(norm, source, residual, activation)


def is_norm(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node calls a norm that has a fused twin."""
    return node.op == "call_module" and type(modules[str(node.target)]) in FUSED


def find_chain_obstacle(chain: Chain, modules: dict[str, nn.Module], counts: Counter[int]) -> str:
    """Why a chain must not be fused, or ""."""
    target = str(chain.norm.target)
    called = [target, str(chain.activation.target)] if chain.activation.op == "call_module" else [target]
    for name in called:
        if reason := find_module_obstacle(name, modules[name], counts):
            return reason
    reads = [str(node.target) for node in chain.norm.graph.nodes if node.op in ("call_module", "get_attr")]
    uses = [name for name in reads if name == target or name.startswith(f"{target}.")]
    if len(uses) > 1:
        return f"the norm or its tensors are used {len(uses)} times"
    if set(chain.norm.users) != {chain.sum or chain.activation}:
        return "the norm's output is used elsewhere too"
    return find_sum_obstacle(chain, modules) if chain.sum else ""


def find_sum_obstacle(chain: Chain, modules: dict[str, nn.Module]) -> str:
    """Why the sum cannot move into the norm, or ""."""
    assert chain.sum is not None
    if set(chain.sum.users) != {chain.activation}:
        return "the sum is used elsewhere too"
    if not isinstance(chain.residual, fx.Node) or chain.residual is chain.norm:
        return "what is added is no other tensor"
    if len(chain.sum.args) > 2 or chain.sum.kwargs:
        return "the sum has further arguments"
    if SUMS[chain.sum.target] is operator.iadd and chain.sum.args[0] is not chain.norm:
        return "the sum is written into a tensor that others may see"
    if len(chain.norm.all_input_nodes) > 1:
        return "the norm takes more than its input"
    (x,) = chain.norm.all_input_nodes
    # Fused, the norm stands where the sum stood: its input is read later, and the residual is kept for backward.
    watched, where = find_aliases(x, modules), "the norm's input before the sum"
    node = chain.norm
    while (node := node.next).op != "output":
        if node is chain.sum:  # It keeps nothing for backward; fused, the residual is kept and must not change.
            watched, where = find_aliases(chain.residual, modules), "the residual after the sum"
        elif node is not chain.activation and not watched.isdisjoint(find_written(node, modules)):
            return f"{node.name} may change {where}"
    return ""


def find_aliases(node: fx.Node, modules: dict[str, nn.Module]) -> set[fx.Node]:
    """All nodes that may return the same memory, as far as it is not known that they do not."""
    found: set[fx.Node] = set()
    # Both ways: what the node may be a view of, and what may be a view of the node.
    todo = [node]
    while todo:
        if (node := todo.pop()) not in found:
            found.add(node)
            todo += find_sources(node, modules)
            todo += [user for user in node.users if node in find_sources(user, modules)]
    return found


def find_sources(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """The inputs that a node's output may be a view of."""
    if written := find_written(node, modules):
        return written
    if node.op == "call_module":
        kind = type(modules[str(node.target)])
        is_new = kind is not nn.Identity and (kind.__module__ in ALLOCATING_MODULES or issubclass(kind, Norm))
    else:
        is_new = name_call(node) in ALLOCATING
    return [] if is_new else node.all_input_nodes


def find_written(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """The inputs that a call may change, as far as its name and its arguments tell; unknown code may change any."""
    inputs = node.all_input_nodes
    if node.op == "call_module":
        module = modules[str(node.target)]
        if not type(module).__module__.startswith(("torch.nn.", "anynorm.")) or is_hooked(module):
            return inputs
        return inputs[:1] if getattr(module, "inplace", False) else []
    if node.op not in ("call_function", "call_method"):
        return []
    name, package = name_call(node), getattr(node.target, "__module__", None) or "torch"
    if "out" in node.kwargs or (node.op == "call_function" and package.split(".")[0] not in TRUSTED):
        return inputs
    flagged = any(value is True for value in (*node.args, node.kwargs.get("inplace")))
    named = name.endswith("_") or (node.op == "call_function" and name in ("setitem", *IN_PLACE))
    return inputs[:1] if flagged or named else []


def fuse_chain(chain: Chain, activation: str, graph: fx.Graph, modules: dict[str, nn.Module]) -> Entry:
    """Make one call of a chain, where its sum stood: all that it reads is there by then."""
    norm, target = modules[str(chain.norm.target)], str(chain.norm.target)
    kind, became = type(norm), FUSED[type(norm)]
    norm.__class__ = became
    norm.activation = activation  # type: ignore[assignment] # fused classes have it
    call = chain.norm
    if chain.sum is not None:
        norm.add = SUMS[chain.sum.target]  # type: ignore[assignment] # fused classes have it
        (x,) = (*chain.norm.args, *chain.norm.kwargs.values())
        with graph.inserting_before(chain.sum):
            call = graph.call_module(target, (x, chain.residual))
    chain.activation.replace_all_uses_with(call)
    for node in (chain.activation, chain.sum, chain.norm):
        if node is not None and node is not call:
            graph.erase_node(node)
    then = activation if chain.sum is None else f"add, {activation}"
    return Entry(target, describe(kind), became=describe(became), then=then, where="report.model")
