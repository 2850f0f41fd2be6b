"""What a norm by constants may change places with: operations that keep channels apart and commute with a * x + b."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor, fx

from ...torch_private import functions_of_nn
from ..activation import name_call
from ..trace import is_hooked

DIMS = (1, 2, 3)


def list_kinds(*names: str) -> tuple[type[nn.Module], ...]:
    """torch.nn's classes of these names, with 1d, 2d and 3d in the place of #."""
    found = [getattr(nn, name.replace("#", f"{n}d"), None) for name in names for n in DIMS]
    return tuple(dict.fromkeys(kind for kind in found if kind is not None))


DROPOUTS = list_kinds("Dropout", "Dropout#", "AlphaDropout", "FeatureAlphaDropout")
MAX_POOLS = list_kinds("MaxPool#", "AdaptiveMaxPool#")
AVERAGE_POOLS = list_kinds("AvgPool#")
# Each value is one of the input's, or a mean with weights that add up to 1.
EXACT = list_kinds(
    "Identity",
    "AdaptiveAvgPool#",
    "ReflectionPad#",
    "ReplicationPad#",
    "CircularPad#",
    "Upsample",
    "UpsamplingNearest2d",
)
EXACT += (nn.UpsamplingBilinear2d,)
CONSTANT_PADS = list_kinds("ConstantPad#", "ZeroPad#")
# What moves elements and changes none; where the channels are then, `channels.py` finds out.
MOVING = list_kinds("Flatten", "Unflatten", "PixelShuffle", "PixelUnshuffle", "ChannelShuffle")
MOVING_CALLS = {"flatten", "unflatten", "view", "reshape", "permute", "transpose", "movedim", "moveaxis", "swapaxes"}
MOVING_CALLS |= {"squeeze", "unsqueeze", "mean"}
SAME_CALLS = {"contiguous", "clone", "interpolate"}
SAME_CALLS |= {f"adaptive_avg_pool{n}d" for n in DIMS}
LIKE_CALLS = {"reshape_as", "view_as", "expand_as"}  # of their second tensor they read the shape
SHAPE_CALLS = {"size", "dim", "numel", "nelement", "ndimension"}

# The functions whose own name is another one, or none: those that torch chooses by a flag.
NAMES: dict[Any, str] = {
    getattr(place, name): name
    for place in (F, torch, functions_of_nn)
    for name in (
        f"{kind}{n}d" for kind in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool") for n in DIMS
    )
    if hasattr(place, name)
}
POOL_WORDS = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
WORDS = {
    "avg_pool": POOL_WORDS,
    "max_pool": ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "adaptive_max_pool": ("input", "output_size", "return_indices"),
    "pad": ("input", "pad", "mode", "value"),
    "dropout": ("input", "p", "training", "inplace"),
}
ORDER = "of scales below 0 the order of values turns round in a max-pool"
BORDERS = "the constant that it adds at borders is not what the norm makes of it (its shift is not 0)"
DIVISOR = "its divisor is not the number of values"


def name_function(node: fx.Node) -> str:
    """The name of what a node calls, by which torch's documentation knows it."""
    return NAMES.get(node.target) or name_call(node)


def find_module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The module that a node calls."""
    return modules.get(str(node.target)) if node.op == "call_module" else None


def describe_node(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """What a node is, in messages."""
    module = find_module(node, modules)
    if module is not None:
        return f"{type(module).__name__} {node.target}"
    if node.op in ("placeholder", "output"):
        return f"an {'input' if node.op == 'placeholder' else 'output'} of the model"
    return f"{node.target}" if node.op == "get_attr" else name_function(node)


def reads_shape(node: fx.Node, source: fx.Node | None = None) -> bool:
    """Whether a node looks at sizes alone, or at no more of one of its sources."""
    if node.op == "call_method":
        return node.target in SHAPE_CALLS or (node.target in LIKE_CALLS and node.args[0] is not source is not None)
    return (
        node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
    )


def is_moving(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node moves elements to other places, channels perhaps with them."""
    module = find_module(node, modules)
    if module is not None:
        return type(module) in MOVING
    return is_torchs(node) and name_function(node) in MOVING_CALLS


def is_concatenation(node: fx.Node) -> bool:
    """Whether a node concatenates tensors."""
    return node.op == "call_function" and name_function(node) in ("cat", "concat", "concatenate")


def is_torchs(node: fx.Node) -> bool:
    """Whether a node calls a function or method of torch."""
    if node.op == "call_method":
        return True
    package = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    return node.op == "call_function" and (node.target in NAMES or package == "torch")


def find_passing_obstacle(node: fx.Node, modules: dict[str, nn.Module], scale: Tensor, shift: Tensor) -> str:
    """Why a norm with these numbers gives something else before a node than behind it, or ""."""
    module = find_module(node, modules)
    if module is not None:
        return find_module_obstacle(module, scale, shift) or find_call_obstacle(node)
    if not is_torchs(node):
        return "no norm passes it"
    return find_function_obstacle(node, scale, shift) or find_call_obstacle(node)


def find_call_obstacle(node: fx.Node) -> str:
    """Whether a node takes other tensors that are computed."""
    first = node.args[0] if node.args else None
    others = [each for each in node.all_input_nodes if each is not first and not is_size(each)]
    return "" if isinstance(first, fx.Node) and not others else "it takes further tensors"


def is_size(node: fx.Node) -> bool:
    """Whether a node is a size, or computed of sizes."""
    if reads_shape(node):
        return True
    return node.op == "call_function" and not is_torchs(node) and all(map(is_size, node.all_input_nodes))


def find_module_obstacle(module: nn.Module, scale: Tensor, shift: Tensor) -> str:
    kind = type(module)
    if is_hooked(module) or "forward" in vars(module):
        return "it has hooks, which would see another tensor, or a replaced forward"
    if kind in DROPOUTS:
        return "it is in training" if module.training else ""
    if kind in MAX_POOLS:
        return find_max_obstacle(bool(module.return_indices), scale)
    if kind in AVERAGE_POOLS:
        return find_average_obstacle(vars(module), shift)
    if kind in CONSTANT_PADS:
        return find_pad_obstacle(getattr(module, "value", 0.0), scale, shift)
    return "" if kind in EXACT or kind in MOVING else "no norm passes it"


def find_function_obstacle(node: fx.Node, scale: Tensor, shift: Tensor) -> str:
    name = name_function(node)
    if name in SAME_CALLS or name in MOVING_CALLS:
        return ""
    family = re.sub(r"([123]d|_)$", "", name)
    if family not in WORDS:
        return "no norm passes it"
    given = {**dict(zip(WORDS[family], node.args, strict=False)), **node.kwargs}
    if family in ("max_pool", "adaptive_max_pool"):
        return find_max_obstacle(given.get("return_indices", False) is not False, scale)
    if family == "avg_pool":
        return find_average_obstacle(given, shift)
    if family == "dropout":
        return "" if given.get("training", True) is False else "it is in training"
    if given.get("mode", "constant") != "constant":
        return ""
    return find_pad_obstacle(given.get("value"), scale, shift)


def find_max_obstacle(returns_indices: bool, scale: Tensor) -> str:
    if returns_indices:
        return "it returns indices too"
    return ORDER if bool((scale < 0).any()) else ""


def find_average_obstacle(given: dict[str, Any], shift: Tensor) -> str:
    if not bool(shift.any()):
        return ""
    padding = given.get("padding", 0)
    padded = any(each != 0 for each in (padding if isinstance(padding, Sequence) else [padding]))
    if padded and given.get("count_include_pad", True) is not False:
        return BORDERS
    return "" if given.get("divisor_override") is None else DIVISOR


def find_pad_obstacle(value: Any, scale: Tensor, shift: Tensor) -> str:
    if value is None:
        value = 0.0
    if not isinstance(value, int | float):
        return "what it adds at borders is not known"
    return "" if bool((scale * value + shift == value).all()) else BORDERS
