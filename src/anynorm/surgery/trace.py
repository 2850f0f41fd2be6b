"""A model as a graph of calls, recorded by torch.fx, and only where that graph can stand for the model.

torch.fx freezes without a word what it cannot see: the training mode, random numbers, `torch.no_grad`, custom backward
passes, `+=`, a model's own attributes. Each of these is noticed here and given as the reason why there is no graph.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor, fx
from torch.nn.utils.parametrize import is_parametrized

from ..modules.norm import Norm
from ..randomness import has_drawn, restore_randomness, save_randomness
from ..torch_private import find_saved_tensor_hooks, tree_leaves
from .in_place import IN_PLACE

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
DEVICES = ("cpu", "cuda")
LOST_OVERRIDES = ("state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict", "_apply")


class Recorder(fx.Proxy):
    """A proxy that records ``a += b``, which torch.fx turns into ``a = a + b``: others that see a would not notice."""


def make_recording_method(operate: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The method of a proxy that records a call of an in-place operation."""
    return lambda a, b: a.tracer.create_proxy("call_function", operate, (a, b), {})


for _name, _operate in IN_PLACE.items():
    setattr(Recorder, f"__{_name}__", make_recording_method(_operate))


class Tracer(fx.Tracer):
    """Records norms and hooked modules as calls, and raises where a graph would lose what surrounds an operation."""

    proxy_buffer_attributes = True  # a buffer that forward reads is a node, not a constant
    modes: Any = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Norm) or is_hooked(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if isinstance(m, nn.Sequential) and m not in (self.submodule_paths or {}):  # a slice, made on the way
            return forward(*args, **kwargs)  # it has no name in the model, so its members are recorded one by one
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Recorder(node, self)

    def create_node(self, kind: str, *arguments: Any, **options: Any) -> fx.Node:
        if self.modes is None:  # at the first placeholder, before forward runs
            self.modes = find_modes()
        if find_modes() != self.modes:
            lost = "torch.no_grad, autocast, a checkpoint or an autograd function"
            raise fx.proxy.TraceError(f"part of its forward runs under {lost}, which a graph would lose")
        return super().create_node(kind, *arguments, **options)


@dataclass
class Traces:
    """The graphs that were recorded, in training and in evaluation, and why they cannot stand for the model, or ""."""

    graphs: list[fx.Graph] = field(default_factory=list)
    reason: str = ""


def trace(model: nn.Module) -> Traces:
    """Record a model in both modes, on copies: nothing that its `forward` does to itself reaches the model."""
    random_states = save_randomness()
    # A branch on the mode shows as two graphs that differ; so does one on the other modes, which change along with it.
    traces = Traces(reason=find_model_obstacle(model))
    for training in (True, False):
        try:
            with changed_modes(not training):
                graph, reason = trace_mode(set_mode(copy_sharing(model), training))
        except Exception as error:
            reason = f"torch.fx cannot trace it: {' '.join(str(error).split())}"
        else:
            traces.graphs.append(graph)
        traces.reason = traces.reason or reason
    # Whatever was drawn is given back: tracing leaves no trace in what the user draws next.
    if has_drawn(random_states):
        restore_randomness(random_states)
        traces.reason = traces.reason or "its forward draws random numbers, which a graph would freeze"
    if len({str(graph) for graph in traces.graphs}) == 2:
        traces.reason = traces.reason or "its forward differs between training and evaluation, or under autocast"
    return traces


def trace_mode(model: nn.Module) -> tuple[fx.Graph, str]:
    """The graph of the model in the mode it is in, and why it cannot stand for the model, or ""."""
    attributes = find_attributes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = Tracer().trace(model)
        reason = find_tensor_obstacle(graph, model)
        if find_attributes(model) != attributes:
            reason = reason or "its forward changes attributes of the model, which a graph would not"
        fx.GraphModule(model, copy.deepcopy(graph))  # Writes the code; not every constant can be written.
    return graph, reason


def set_mode(model: nn.Module, training: bool) -> nn.Module:
    """The model in a mode. Its own `train` is not called: it may do more, such as merging weights that are shared."""
    for module in model.modules():
        module.training = training
    return model


def copy_sharing(model: nn.Module) -> nn.Module:
    """A copy whose modules are its own and whose parameters, buffers and hooks are the model's."""
    modules = list(model.modules())
    own = {id(module) for module in modules}
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    for module in modules:
        # Not registered, and computed by a hook: the tensors of torch.nn.utils.weight_norm, which cannot be copied.
        shared += [value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf]
        hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
        shared += [hook for hook in hooks if id(getattr(hook, "__self__", None)) not in own]
    # A memo that names what was copied already: deepcopy takes the originals for their copies.
    twin = copy.deepcopy(model, {id(value): value for value in shared})
    if [*map(id, twin.parameters())] != [*map(id, model.parameters())]:
        raise TypeError("a copy does not share its parameters, for it copies itself in its own way")
    return twin


def is_hooked(module: nn.Module) -> bool:
    """Whether something else sees or changes the module's calls: hooks, also those of weight norm; parametrizations."""
    return any(getattr(module, name) for name in HOOKS) or is_parametrized(module)


def find_model_obstacle(model: nn.Module) -> str:
    """Why a graph of this model could not take its place, as far as can be seen before it is traced."""
    kind = type(model)
    if is_hooked(model) or "forward" in vars(model):
        return "it has hooks or a replaced forward of its own, which a graph would lose"
    if any(isinstance(module, nn.modules.lazy.LazyModuleMixin) for module in model.modules()):
        return "it has lazy modules that do not know their size yet; call the model once before"
    for name in LOST_OVERRIDES:
        if getattr(kind, name) is not getattr(nn.Module, name):
            return f"it overrides {name}, which a graph would lose"
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.default is None or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return f"its forward takes optional arguments ({parameter.name}), and a graph cannot ask whether they came"
    return ""


def find_tensor_obstacle(graph: fx.Graph, model: nn.Module) -> str:
    """Whether `forward` reads tensors that it made, or plain attributes: a graph would freeze or register them."""
    known = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    if all(node.target in known for node in graph.nodes if node.op == "get_attr"):
        return ""
    return "its forward uses tensors that are neither parameters nor buffers, which a graph would freeze"


def find_attributes(model: nn.Module) -> list[list[Any]]:
    """The attributes of all modules: plain values as they are, of others the type."""
    plain = (int, float, str, type(None))
    return [
        [leaf if isinstance(leaf, plain) else type(leaf) for leaf in tree_leaves(vars(module))]
        for module in model.modules()
    ]


def find_modes() -> tuple[Any, ...]:
    """The modes in force that change what operations do or keep for backward."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in DEVICES),
        # Private: torch has no public way to ask for the hooks that checkpoints and offloading set.
        find_saved_tensor_hooks(True) is None,
    )


@contextlib.contextmanager
def changed_modes(changed: bool) -> Iterator[None]:
    """Without gradients and under autocast where `changed`: a forward that sets either on its own is noticed then."""
    before = [torch.is_autocast_enabled(device) for device in DEVICES]
    try:
        for device in DEVICES:
            torch.set_autocast_enabled(device, changed)
        with torch.set_grad_enabled(not changed):
            yield
    finally:
        for device, enabled in zip(DEVICES, before, strict=True):
            torch.set_autocast_enabled(device, enabled)
