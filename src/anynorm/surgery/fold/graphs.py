"""How a model calls its layers: graphs of the whole, or of the largest parts that torch.fx can trace.

They are looked at and never run in the model's place: folding changes layers, the model keeps its code. A graph is
recorded for each way that `forward` may go: by a flag among its arguments, by mode, under autocast.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor, fx

from ...randomness import has_drawn, restore_randomness, save_randomness
from ..differences import call, evaluating
from ..trace import Tracer, changed_modes, copy_sharing, find_attributes, set_mode
from .layers import is_layer

Flags = dict[str, bool]
MOST_FLAGS = 3


class CallTracer(Tracer):
    """Records norms and layers as calls, whatever package their classes are from."""

    def __init__(self, norms: Collection[str]) -> None:
        super().__init__()
        self.norms = norms

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = module_qualified_name in self.norms or is_layer(m) or isinstance(m, torch.jit.ScriptModule)
        return known or super().is_leaf_module(m, module_qualified_name)


@dataclass(eq=False)
class Recording:
    """A graph of a part of the model.

    Attributes:
        name: the part's name in the model.
        modules: the model's modules by their names in the part.
        flags: the arguments of `forward` that it holds for.
        calls: for each call of the example, the shape of what each node returns.
        is_whole: whether it is all of the model; else code outside may call what is inside.
    """

    name: str
    graph: fx.Graph
    modules: dict[str, nn.Module]
    flags: Flags
    is_whole: bool
    calls: list[dict[fx.Node, tuple[int, ...]]] = field(default_factory=list)


@dataclass
class Recordings:
    """What was recorded, in groups that show the same part, and why some norms, by name, are in none."""

    groups: list[list[Recording]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


def record(model: nn.Module, norms: Collection[str]) -> Recordings:
    """Record the model, or the parts of it that hold these norms."""
    found = Recordings()
    record_part(model, "", set(norms), found)
    return found


def record_part(part: nn.Module, name: str, norms: set[str], found: Recordings) -> None:
    """Record a part, or the parts of it; what a graph shows as one call, though norms are inside, is such a part."""
    prefix = f"{name}." if name else ""
    inside = {norm for norm in norms if norm.startswith(prefix) and norm != name}
    if not inside:
        return
    reason = "a container" if isinstance(part, nn.ModuleList | nn.ModuleDict) else ""
    graphs: list[tuple[fx.Graph, Flags]] = []
    if not reason:
        graphs, reason = trace_ways(part, {norm.removeprefix(prefix) for norm in inside})
    if reason:
        if reason != "a container":
            said = f"{describe_part(name)} has no graph: {reason}"
            for norm in inside:
                found.reasons.setdefault(norm, said)
        for key, child in part.named_children():
            record_part(child, f"{prefix}{key}", norms, found)
        return
    modules = dict(part.named_modules())
    found.groups.append([Recording(name, graph, dict(modules), flags, not name) for graph, flags in graphs])
    called = {str(node.target) for graph, _ in graphs for node in graph.nodes if node.op == "call_module"}
    for target in sorted(called):
        module = modules[target]
        if f"{prefix}{target}" in norms or is_layer(module) or isinstance(module, torch.jit.ScriptModule):
            continue
        if type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential):
            continue  # torch's own, whose fast paths read what is inside past any call
        record_part(module, f"{prefix}{target}", norms, found)


def describe_part(name: str) -> str:
    return name or "the model"


def trace_ways(part: nn.Module, norms: set[str]) -> tuple[list[tuple[fx.Graph, Flags]], str]:
    """The graphs of all ways that a part's forward may go, and why they cannot be known, or ""."""
    flags, reason = find_flags(part)
    if reason:
        return [], reason
    graphs: dict[str, tuple[fx.Graph, Flags]] = {}
    states = save_randomness()
    values = itertools.product((False, True), repeat=len(flags))
    ways = [dict(zip(flags, value, strict=True)) for value in values]
    modes = [False, None] if any(module.training for module in part.modules()) else [None]
    try:
        for way, mode, changed in itertools.product(ways, modes, (False, True)):
            twin = copy_sharing(part)
            with changed_modes(changed):
                graph = trace_way(twin if mode is None else set_mode(twin, mode), norms, way)
            graphs.setdefault(f"{graph}", (graph, way))
    except Exception as error:
        reason = f"torch.fx cannot trace it: {' '.join(str(error).split())}"
    if has_drawn(states):
        restore_randomness(states)
        reason = reason or "its forward draws random numbers, which may choose the way"
    return list(graphs.values()), reason


def trace_way(part: nn.Module, norms: set[str], flags: Flags) -> fx.Graph:
    """One graph."""
    before = find_attributes(part)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = CallTracer(norms).trace(part, concrete_args=dict(flags) or None)
    if find_attributes(part) != before:
        raise TypeError("its forward changes attributes of the model, which others may read")
    return graph


def find_flags(part: nn.Module) -> tuple[list[str], str]:
    """The arguments of a forward that are switches, and why not all ways can be tried, or ""."""
    if isinstance(part, torch.jit.ScriptModule):
        return [], "it is compiled by torch.jit.script"
    if "forward" in vars(part):
        return [], "its forward was replaced on the object"
    flags = []
    for parameter in inspect.signature(part.forward).parameters.values():
        if parameter.default is None or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return [], f"its forward takes optional arguments ({parameter.name}), and may ask whether they came"
        if isinstance(parameter.default, bool):
            flags.append(parameter.name)
    return flags, "" if len(flags) <= MOST_FLAGS else f"its forward has {len(flags)} switches ({', '.join(flags)})"


def measure_shapes(model: nn.Module, recordings: Recordings, example: Any) -> None:
    """Call the model with the example, and each graph with what its part was given then."""
    given: dict[str, list[tuple[Any, Any]]] = {}
    names = {group[0].name for group in recordings.groups}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name in names:
            calls = given.setdefault(name, [])

            def keep(module: nn.Module, args: Any, kwargs: Any, calls: list[tuple[Any, Any]] = calls) -> None:
                calls.append((copy.copy(args), dict(kwargs)))

            hook = model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
            stack.callback(hook.remove)
        call(model, example)
    with evaluating(model):
        for group in recordings.groups:
            part = model.get_submodule(group[0].name)
            for recording in group:
                for args, kwargs in given[recording.name]:
                    shapes = run_shapes(part, recording, args, kwargs)
                    recording.calls += [shapes] if shapes else []


def run_shapes(part: nn.Module, recording: Recording, args: Any, kwargs: Any) -> dict[fx.Node, tuple[int, ...]]:
    """The shapes in one call of a graph; none where it is not for such arguments."""
    shapes: dict[fx.Node, tuple[int, ...]] = {}

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                shapes[n] = tuple(result.shape)
            return result

    try:
        bound = inspect.signature(part.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        bound.arguments.update(recording.flags)
        Shapes(part, garbage_collect_values=True, graph=recording.graph).run(
            *bound.arguments.values(), enable_io_processing=False
        )
    except Exception:
        return {}  # another way than the example's
    return shapes
