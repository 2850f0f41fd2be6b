"""A model whose `forward` is a graph, and which is otherwise what it was: class, methods, attributes, modules."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch.nn as nn
from torch import fx

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class GraphForward:
    """Stands before the user's class: an instance has that class, and the graph's `forward`.

    Attributes:
        graph: what `forward` runs.
        original_class: the class of the model that was traced.
        refused: methods that must not be called here, with what they call by itself.
    """

    graph: fx.Graph
    original_class: type[nn.Module]
    refused: dict[str, str]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A class made at run time cannot be found again by name; a GraphModule knows how its graph is kept.
        graph = fx.GraphModule(self, self.graph)  # type: ignore[arg-type] # annotated as the class of its graph, an fx.Graph
        find_state = getattr(self, "__getstate__", lambda: self.__dict__)  # every object has it since Python 3.11
        return restore, (self.original_class, self.refused, graph), find_state()


def restore(original: type[nn.Module], refused: dict[str, str], graph: fx.GraphModule) -> nn.Module:
    """An empty instance, which pickle and copy fill."""
    kind = make_class(original, refused, graph)
    return kind.__new__(kind)


def make_class(original: type[nn.Module], refused: dict[str, str], graph: fx.GraphModule) -> type[nn.Module]:
    """The user's class with the graph's `forward`."""
    members: dict[str, Any] = {name: make_refusal(original, name, why) for name, why in refused.items()}
    members |= {
        "graph": graph.graph,
        "original_class": original,
        "refused": refused,
        "forward": type(graph).forward,
    }
    members |= {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return types.new_class(original.__name__, (GraphForward, original), {}, lambda space: space.update(members))


def apply_graph(model: nn.Module, graph: fx.Graph, fused: Collection[str]) -> nn.Module:
    """Let a copy of the user's model run the graph: the same object with another class.

    What the graph never calls, and would now apply an activation twice, raises where it is called: the modules that
    hold a fused norm, and methods of the model that call such a norm by themselves.

    Args:
        model: a copy, whose norms are fused already.
        fused: names of the norms that were fused in this graph.
    """
    original: type[nn.Module] = model.original_class if isinstance(model, GraphForward) else type(model)
    direct = {name.partition(".")[0] for name in fused if is_direct(model, name)}
    refused = {**getattr(model, "refused", {}), **find_refused(original, direct)}
    for parent in {parent for name in fused for parent in find_parents(name)}:
        model.get_submodule(parent).forward = partial(refuse, parent)
    # A GraphModule writes and compiles the graph's code; its forward is all that is kept of it.
    model.__class__ = make_class(original, refused, fx.GraphModule(model, graph))
    return model


def is_direct(model: nn.Module, name: str) -> bool:
    """Whether a norm can be reached from the model without calling another module that holds it."""
    return all(isinstance(model.get_submodule(parent), CONTAINERS) for parent in find_parents(name))


def find_parents(name: str) -> list[str]:
    """Names of the modules, below the model, that hold a module."""
    return [name[:end] for end, letter in enumerate(name) if letter == "."]


def find_refused(kind: type[nn.Module], names: Collection[str]) -> dict[str, str]:
    """The user's methods beside `forward` that read one of these attributes, or a super class's `forward`."""
    found: dict[str, str] = {}
    for name, member in find_methods(kind):
        if name in found or name in ("forward", "__init__"):
            continue
        read = set(find_names(inspect.unwrap(member).__code__))
        touched = sorted(read & set(names)) or (["forward"] if {"super", "forward"} <= read else [])
        if touched and getattr(kind, name, None) is member:
            found[name] = touched[0]
    return found


def find_methods(kind: type[nn.Module]) -> Iterator[tuple[str, types.FunctionType]]:
    """The methods, by name, of a class and what it inherits from below nn.Module."""
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        yield from ((name, each) for name, each in vars(owner).items() if isinstance(each, types.FunctionType))


def find_names(code: types.CodeType) -> Iterator[str]:
    """All attributes and globals that a function reads, also in the functions inside it."""
    yield from code.co_names  # of bytecode, so that no source is needed
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from find_names(constant)


def make_refusal(original: type[nn.Module], name: str, what: str) -> Callable[..., Any]:
    """A method that says why it cannot be called."""

    def method(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        raise RuntimeError(
            f"{original.__name__}.{name} uses {what} by itself, and in this model, made by accelerate(fuse=True), "
            "norms have taken over what follows them; call this method of the model that was given to accelerate"
        )

    method.__name__ = name
    return method


def refuse(name: str, *arguments: Any, **options: Any) -> Any:
    """Stands for the `forward` of a module that only the graph may run."""
    raise RuntimeError(
        f"{name} was called by itself, and in this model, made by accelerate(fuse=True), norms in it have taken over "
        "what follows them; call the whole model, or this part of the model that was given to accelerate"
    )
