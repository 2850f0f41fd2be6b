"""`param_groups`: which parameters of a model an optimizer should decay, and which it should not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from math import inf
from typing import Any

import torch.nn as nn
from torch.nn import Parameter

from ..errors import UserError
from ..modules.norm import Norm
from .accelerate import BASES, is_unknown_norm
from .adapters import find_adapters
from .operation import check_model
from .report import describe

NoDecay = str | type[nn.Module] | Iterable[str | type[nn.Module]] | Callable[[str, Parameter], bool]


def param_groups(model: nn.Module, weight_decay: float, *, no_decay: NoDecay = ()) -> list[dict[str, Any]]:
    """Sort a model's parameters into two groups for torch.optim: with weight decay, and without.

    Without decay go the parameters of norms, of whatever shape and class (torch's, ours, those of other packages that
    `accelerate` knows, and modules that call themselves norms and hold none), whatever is named ``bias``, and whatever
    has one axis or none, as a scale does. Everything else is decayed.

    Args:
        model: any module, also one in DistributedDataParallel or torch.compile.
        weight_decay: of the first group, 0 or more; what it means is the optimizer's matter.
        no_decay: what else is not decayed: names of parameters, with ``*`` for anything (``"*.pos_embed"``), classes,
            whose own parameters are meant (``torch.nn.Embedding``), several of both, or a function of
            (name, parameter).

    Returns:
        ``[{"params": ..., "weight_decay": weight_decay}, {"params": ..., "weight_decay": 0.0}]``, always both, each in
        the order of ``model.parameters()``. Every parameter is in one of them, once. One that is tied to several places
        is not decayed where any of these says so.

        Parameters with ``requires_grad=False`` are left out, as in timm: an optimizer would go on moving those
        that still hold a gradient. Those that are unfrozen later need ``optimizer.add_param_group``.

    Raises:
        TypeError: `model` is not a module, or `no_decay` is something else.
        UserError: a lazy parameter that has no size yet; a model in FullyShardedDataParallel, which makes all
            parameters flat; a negative weight decay; a name that no parameter has.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> optimizer = torch.optim.AdamW(anynorm.param_groups(model, weight_decay=0.05), lr=1e-3)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(1, 0.05), (3, 0.0)]
    """
    check_model("param_groups", model)
    if isinstance(weight_decay, bool) or not 0 <= weight_decay < inf:
        raise UserError(
            f"param_groups: weight_decay must be a number of 0 or more; got {weight_decay!r}; 0.05 is usual"
        )
    names: dict[Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    check_shapes(model, names)
    is_excluded = select_parameters(model, names, no_decay)
    kept = {parameter for norm in find_norms(model) for parameter in list_own(norm)}
    decayed, others = list[Parameter](), list[Parameter]()
    for parameter, known in names.items():
        if parameter.requires_grad:
            is_bias = parameter.dim() <= 1 or any(name.rpartition(".")[2] == "bias" for name in known)
            without = is_bias or parameter in kept or any(is_excluded(name, parameter) for name in known)
            (others if without else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def find_norms(model: nn.Module) -> list[nn.Module]:
    """Every module that is a norm, or calls itself one."""
    return [
        module
        for module in model.modules()
        if isinstance(module, (*BASES, Norm)) or find_adapters(module) is not None or is_unknown_norm(module)
    ]


def list_own(module: nn.Module) -> list[Parameter]:
    """A module's own parameters, and what its parametrizations made of them; not those of its children."""
    inside = module._modules.get("parametrizations")
    return [*module.parameters(recurse=False), *(() if inside is None else inside.parameters())]


def check_shapes(model: nn.Module, names: dict[Parameter, list[str]]) -> None:
    """Refuse parameters whose number of axes says nothing of what they are."""
    for parameter, known in names.items():
        if nn.parameter.is_lazy(parameter):
            raise UserError(
                f"param_groups: lazy modules must have seen an input; got {known[0]}, which has no size yet; run one "
                "batch first"
            )
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise UserError(
                "param_groups: the axes of a parameter say what it is; got FullyShardedDataParallel, which makes all "
                "of them flat; use fully_shard, which keeps them"
            )


def select_parameters(
    model: nn.Module, names: dict[Parameter, list[str]], no_decay: NoDecay
) -> Callable[[str, Parameter], bool]:
    """What says of a parameter, by any of its names, whether `no_decay` means it."""
    if not isinstance(no_decay, (str, type, Iterable)):
        if not callable(no_decay):
            raise TypeError(
                "param_groups: no_decay must be names, classes or a function of (name, parameter); got "
                f"{type(no_decay).__name__}; pass ('pos_embed',)"
            )
        return no_decay
    wanted = [no_decay] if isinstance(no_decay, (str, type)) else list(no_decay)
    known = [name for several in names.values() for name in several]
    for pattern in wanted:
        if not isinstance(pattern, (str, type)):
            raise TypeError(f"param_groups: no_decay may hold names and classes; got {pattern!r}; pass its name")
        if isinstance(pattern, str) and not any(fnmatchcase(name, pattern) for name in known):
            raise UserError(
                f"param_groups: no_decay={pattern!r} names no parameter; the model has {', '.join(known[:5])}, ...; "
                "'*' stands for anything"
            )
        if isinstance(pattern, type) and not any(isinstance(module, pattern) for module in model.modules()):
            raise UserError(
                f"param_groups: no_decay names a class that no module has; got {describe(pattern)}; leave it out"
            )
    patterns = [pattern for pattern in wanted if isinstance(pattern, str)]
    kinds = tuple(kind for kind in wanted if isinstance(kind, type))
    of_kinds = {p for module in model.modules() if isinstance(module, kinds) for p in list_own(module)}
    return lambda name, p: p in of_kinds or any(fnmatchcase(name, pattern) for pattern in patterns)
