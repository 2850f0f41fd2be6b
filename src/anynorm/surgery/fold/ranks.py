"""How many axes has a tensor in a graph? As far as the calls before it tell."""

from __future__ import annotations

import torch.nn as nn
from torch import fx

from ...activations import ACTIVATIONS
from ...modules.norm import Norm
from ...torch_private import NormBase
from .layers import CONVOLUTIONS
from .passing import DROPOUTS, find_module, is_torchs, name_function

SAME = (nn.Linear, nn.Identity, NormBase, Norm, *DROPOUTS)
SAME_CALLS = {*ACTIVATIONS, "relu_", "dropout", "contiguous"}


def find_rank(node: fx.Node, modules: dict[str, nn.Module]) -> int | None:
    """The number of axes that a node returns for any input that the model takes, or None."""
    module = find_module(node, modules)
    if module is not None:
        return find_module_rank(node, module, modules)
    if node.op not in ("call_function", "call_method") or not is_torchs(node):
        return None
    name = name_function(node)
    if name == "flatten":
        given = {**dict(zip(("input", "start_dim", "end_dim"), node.args, strict=False)), **node.kwargs}
        plain = given.get("start_dim", 0) == 1 and given.get("end_dim", -1) == -1
        return 2 if plain else None
    if name in ("view", "reshape"):
        sizes = node.args[1:]
        if len(sizes) == 1:
            return len(sizes[0]) if isinstance(sizes[0], tuple | list) else None
        return len(sizes) or None
    return find_input_rank(node, modules) if name in SAME_CALLS else None


def find_module_rank(node: fx.Node, module: nn.Module, modules: dict[str, nn.Module]) -> int | None:
    """The same for a call of a module."""
    if isinstance(module, CONVOLUTIONS):
        return len(module.kernel_size) + 2
    if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
        return 4 if isinstance(module, nn.BatchNorm2d) else 5
    if type(module) is nn.Flatten:
        return 2 if module.start_dim == 1 and module.end_dim == -1 else None
    is_activation = type(module).__module__ == nn.ReLU.__module__ and not isinstance(module, nn.MultiheadAttention)
    if is_activation or isinstance(module, SAME):
        return find_input_rank(node, modules)
    return None


def find_input_rank(node: fx.Node, modules: dict[str, nn.Module]) -> int | None:
    source = node.args[0] if node.args else None
    return find_rank(source, modules) if isinstance(source, fx.Node) else None
