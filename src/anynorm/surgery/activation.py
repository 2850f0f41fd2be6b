"""Which activation a module, or a call in a graph, applies."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import fx

from ..activations import ACTIVATIONS, Activation, list_activations, match_options
from ..torch_private import functions_of_nn
from .report import describe


def read_module(module: nn.Module) -> tuple[str, str]:
    """The activation's name; or why this activation cannot be fused; or neither, where it is none."""
    kind = type(module)
    known = [activation for activation in ACTIVATIONS.values() if isinstance(module, activation.module)]
    if known and kind is known[0].module:
        return match_options(known, vars(module))
    if known:
        return "", f"a subclass of {describe(known[0].module)} may have code of its own"
    if kind.__module__ == nn.ReLU.__module__ and kind is not nn.MultiheadAttention:
        return "", f"only {list_activations()} can be fused"
    return "", ""


def read_node(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """The activation that a node applies; or why it cannot be fused; or neither, where it is none."""
    if node.op == "call_module":
        return read_module(modules[str(node.target)])
    if node.op not in ("call_function", "call_method"):
        return "", ""
    known = [
        activation
        for activation in ACTIVATIONS.values()
        if node.target in find_spellings(activation.spelling or activation.name)
    ]
    if known:
        options = read_options(node, known[0])
        return match_options(known, options) if options is not None else ("", "it has further arguments")
    if name_call(node).rstrip("_") in {name.lower() for name in nn.modules.activation.__all__}:
        return "", f"only {list_activations()} can be fused"
    return "", ""


def read_options(node: fx.Node, activation: Activation) -> dict[str, Any] | None:
    """What a call gives an activation beside its input, by name; None where that is more than torch.nn's class has."""
    names = [name for name in (activation.option, *activation.settings, "inplace") if name]
    options = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    if len(node.args) - 1 > len(names) or not options.keys() <= {*names}:
        return None  # as `out`
    return options if isinstance(options.pop("inplace", False), bool) else None


def find_spellings(name: str) -> set[Any]:
    """The functions and methods that apply an activation, also in place."""
    names = (name, f"{name}_")
    # functions_of_nn: some names of F stand for its functions, whose own name a graph shows.
    modules = (F, torch, functions_of_nn)
    found = {getattr(module, spelling) for module in modules for spelling in names if hasattr(module, spelling)}
    return found | set(names)


def name_call(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
