"""torch.ao.quantization's fusers look classes up by exact type: here they are shown torch's in place of ours.

`fuse_modules` and `fuse_modules_qat` ask for a method by the types of the modules; `fuse_fx`, `prepare_fx` and
`prepare_qat_fx` look through a graph module, which has containers of its own: the user's model keeps its norms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch.nn as nn


@cache
def find_theirs() -> dict[type[nn.Module], type[nn.Module]]:
    """torch's norm for each of ours. Loaded when a fuser is used: torch loads these at every import."""
    from .report import PAIRS

    return {ours: theirs for theirs, ours in PAIRS.items()}


def make_torchs(norm: Any) -> Any:
    """torch's norm with the parameters and buffers of ours, which stays as it is; anything else itself."""
    theirs = find_theirs().get(type(norm))
    if theirs is None:
        return norm
    twin = copy.copy(norm)
    twin.__class__ = theirs
    return twin


def check_kind(kind: type[nn.Module]) -> None:
    """Refuse what a fuser would leave in silence, or not know.

    Raises:
        NotImplementedError: a norm with an activation, or a batch norm that torch has not.
    """
    from .exact_types import VARIANTS
    from .report import FUSED, describe

    if kind in FUSED.values():
        does, remedy = "is norm, sum and activation in one", "anynorm.accelerate(model, undo=True) first, or a model "
        remedy += "that was not fused"
    elif kind in VARIANTS:
        does = "is no norm of torch.nn"
        remedy = 'anynorm.convert(model, to="batch") and anynorm.accelerate(model, undo=True) first'
    else:
        return
    raise NotImplementedError(f"torch.ao.quantization: {describe(kind)} {does}, which no fuser knows; {remedy}")


def show_torchs_to_modules(module: ModuleType) -> None:
    """Have `fuse_modules` find the method for torch's types, and give it torch's norms."""
    find: Callable[..., Any] = module.get_fuser_method
    if getattr(find, "shows_torchs", False):
        return

    def get_fuser_method(op_list: tuple[Any, ...], additional_fuser_method_mapping: Any = None) -> Any:
        if op_list in (additional_fuser_method_mapping or {}):
            return find(op_list, additional_fuser_method_mapping)
        for kind in op_list:
            check_kind(kind)
        method = find(tuple(find_theirs().get(kind, kind) for kind in op_list), additional_fuser_method_mapping)
        return lambda is_qat, *modules: method(is_qat, *map(make_torchs, modules))

    get_fuser_method.shows_torchs = True  # type: ignore[attr-defined] # so that it is replaced once
    module.get_fuser_method = get_fuser_method  # type: ignore[attr-defined]


def show_torchs_to_graphs(module: ModuleType) -> None:
    """Have `prepare_fx` and its like fuse and quantize torch's norms."""
    fuse: Callable[..., Any] = module._fuse_fx
    if getattr(fuse, "shows_torchs", False):
        return

    def fuse_fx(model: Any, *arguments: Any, **options: Any) -> Any:
        twins: dict[nn.Module, nn.Module] = {}
        for name in dict.fromkeys(node.target for node in model.graph.nodes if node.op == "call_module"):
            norm = model.get_submodule(name)
            check_kind(type(norm))
            if type(norm) in find_theirs():
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, twins.setdefault(norm, make_torchs(norm)))
        return fuse(model, *arguments, **options)

    fuse_fx.shows_torchs = True  # type: ignore[attr-defined] # as above
    module._fuse_fx = fuse_fx  # type: ignore[attr-defined]
