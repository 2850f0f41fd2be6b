"""What every operation on a model does beside its own: it checks, copies, proves on an example, and finds the way back.

An operation is a plan: a function that looks at the model, fills the report and returns what changes the model. So
whatever a plan raises, nothing was changed.
"""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..errors import UserError
from .differences import Run, run
from .report import SurgeryReport

Plan = Callable[[nn.Module, SurgeryReport], Callable[[], object]]
Where = str | type[nn.Module] | tuple[str | type[nn.Module], ...] | Callable[[str, nn.Module], bool] | None
# What torch keeps in a module beside plain attributes; handles of hooks refer to the very dictionaries.
CONTAINERS = (dict, set)
TORCHS = frozenset(vars(nn.Module()))  # torch's own attributes of every module: its hooks may be methods


class NotProved(UserError):
    """With ``strict=True``: the model's outputs differ by more than the tolerance, and it was rolled back.

    Attributes:
        report: what had been done, with the differences.
    """

    report: SurgeryReport

    def __init__(self, message: str, report: SurgeryReport) -> None:
        super().__init__(message)
        self.report = report


class Options(NamedTuple):
    """What every operation is asked beside its own.

    Attributes:
        copy: work on a copy, which is then `report.model`.
        example: arguments of a call: a tensor, a tuple of them, or a dict of them by name. The model is called with
            them in evaluation before and after, and the report says how far the outputs moved.
        strict: where they moved by more than `tolerance`, put everything back and raise.
        tolerance: of the largest output; None for what rounding explains, 1e-5 in float32.
        per_layer: report the outputs of the layers too.
    """

    copy: bool = False
    example: Any = None
    strict: bool = False
    tolerance: float | None = None
    per_layer: bool = False


def operate(function: str, model: nn.Module, plan: Plan, options: Options, wrapped: str = "") -> SurgeryReport:
    """Perform an operation on a model.

    Args:
        function: its name, for messages.
        model: changed in place, or with ``options.copy`` left alone.
        plan: see above; `report.model` may be another model than the one it got.
        options: see there.
        wrapped: why it refuses a model in DistributedDataParallel and its like; "" where it works on these.

    Raises:
        TypeError: `model` is no module.
        UserError: the model is wrapped or compiled by torch.jit.script, or cannot be copied; `strict` without example.
        NotProved: see `Options.strict`.
    """
    copy, example, strict, tolerance, per_layer = options
    check_model(function, model, wrapped)
    if example is None and (strict or per_layer):
        what = "strict" if strict else "per_layer"
        raise UserError(f"{function}: {what}=True compares outputs; got no example; pass example=inputs of a call")
    if copy:
        model = copy_model(function, model)
    before = None if example is None else run(model, example, per_layer)
    if before is not None:
        check_compared(function, before, strict)
    report, snapshot = SurgeryReport(model=model), Snapshot(model, values=example is not None)
    try:
        plan(model, report)()
        if before is not None:
            report.differences, report.layers = before.compare(run(report.model, example, per_layer))
        worst = max(report.differences, key=lambda difference: difference.relative, default=None)
        if strict and worst is not None and not worst.is_within(tolerance):
            asked = "what rounding explains" if tolerance is None else f"the tolerance of {tolerance:g}"
            raise NotProved(
                f"{function}: the outputs on the example may move by {asked} and no more; {worst}, which is "
                f"{worst.relative:.2g} of it; the model is as it was; pass a larger tolerance, or strict=False",
                report,
            )
    except BaseException:
        snapshot.restore()
        raise
    return report


def check_compared(function: str, before: Run, strict: bool) -> None:
    """Raise where the outputs on an example prove nothing."""
    if any(tensor.is_meta for tensor in before.outputs.values()):
        raise UserError(f"{function}: example compares values; got outputs on the meta device; leave example out")
    if strict and not before.outputs:
        raise UserError(
            f"{function}: strict=True compares outputs; the model returned no tensor, also not in a tuple, list, dict "
            "or dataclass; wrap the model so that it returns them, or leave strict out"
        )


def check_model(function: str, model: Any, wrapped: str = "") -> None:
    """Raise where an operation cannot work on a model; `wrapped` as for `operate`."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}: model must be a torch.nn.Module; got {type(model).__name__}; pass the model itself"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(
            f"{function}: torch.jit.script has compiled the model's code; got {type(model).__name__}; "
            "change the model before it is scripted"
        )
    name = find_wrapper(model) if wrapped else ""
    if name:
        raise UserError(
            f"{function}: {wrapped}; got {name}; call it on the model inside (model.module) and wrap that anew"
        )


def find_wrapper(model: nn.Module) -> str:
    """The class that wraps a model for data parallelism and keeps books of its parameters; "" for none."""
    for module in model.modules():
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            return type(module).__name__
        if type(module).__name__ in ("FullyShardedDataParallel", "OptimizedModule"):
            return type(module).__name__
        if any(hasattr(parameter, "placements") for parameter in module.parameters(recurse=False)):
            return "a model with sharded parameters"
    return ""


def copy_model(function: str, model: nn.Module) -> nn.Module:
    """A deep copy, or a sentence about why there is none."""
    try:
        return copying.deepcopy(model)
    except Exception as problem:
        said = " ".join(str(problem).split())
        raise UserError(
            f"{function}: copy=True needs a model that can be copied; got {said}; use copy=False"
        ) from problem


class Snapshot:
    """A model as it is now: classes, attributes, hooks, parts; with `values` also the values of its tensors."""

    modules: list[tuple[nn.Module, type[nn.Module], dict[str, Any], list[tuple[Any, Any]]]]
    flags: list[tuple[Tensor, bool, Tensor | None]]
    values: list[tuple[Tensor, Tensor]]

    def __init__(self, model: nn.Module, values: bool = False) -> None:
        self.modules = [
            (module, type(module), dict(vars(module)), list(copy_containers(module)))
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule)
        ]
        tensors = [t for t in (*model.parameters(), *model.buffers()) if type(t) in (Tensor, nn.Parameter)]
        self.flags = [(t, t.requires_grad, t.grad if t.is_leaf else None) for t in tensors]
        self.values = [(t, t.detach().clone()) for t in tensors if not t.is_meta] if values else []

    def restore(self) -> None:
        """Put the model back."""
        for module, kind, attributes, containers in self.modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in containers:
                container.clear()
                container.update(content)
        for tensor, flag, gradient in self.flags:
            tensor.requires_grad_(flag)
            if tensor.is_leaf:
                tensor.grad = gradient  # None, too: what is rolled back may have made one
        with torch.no_grad():
            for tensor, value in self.values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def copy_containers(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Each dictionary and set of a module, and a copy of what is in it."""
    for value in vars(module).values():
        if isinstance(value, CONTAINERS):
            yield value, value.copy()


def select(function: str, model: nn.Module, where: Where) -> Callable[[str, nn.Module], bool]:
    """What says of a module, by its first name, whether `where` means it.

    Args:
        where: None for all; names, with ``*`` for anything, each with all that is inside (``"layer4"``, ``"*.bn1"``);
            classes; a tuple of both; or a function of (name, module).

    Raises:
        UserError: a name that no module has.
        TypeError: `where` is nothing of these.
    """
    if where is None:
        return lambda name, module: True
    if not isinstance(where, (str, type, tuple)):
        if not callable(where) or isinstance(where, nn.Module):
            raise TypeError(
                f"{function}: where must be names, classes or a function of (name, module); got {type(where).__name__}"
            )
        return where
    wanted = where if isinstance(where, tuple) else (where,)
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in wanted:
        if not isinstance(pattern, (str, type)):
            raise TypeError(f"{function}: where may name strings and classes; got {pattern!r}")
        if isinstance(pattern, str) and not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"{function}: where={pattern!r} names no module; the model has {', '.join(names[1:6])}, ..."
            )
    patterns = tuple(pattern for pattern in wanted if isinstance(pattern, str))
    kinds = tuple(kind for kind in wanted if isinstance(kind, type))
    everywhere: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        everywhere.setdefault(id(module), []).append(name)

    def is_wanted(name: str, module: nn.Module) -> bool:
        known = everywhere.get(id(module), [name])
        return isinstance(module, kinds) or any(
            fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*") for n in known for pattern in patterns
        )

    return is_wanted


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put another module at each place where one stands; whatever was fitted to the place sees no other change."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new


def find_held(model: nn.Module) -> dict[int, str]:
    """Modules, by identity, that stand in plain attributes too, also in lists and the like, and in which.

    Code may call them there, and nothing that is put in their place in the model.
    """
    held: dict[int, str] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in TORCHS:
                held |= {id(each): f"{name}.{key}" if name else key for each in list_modules(value)}
    return held


def list_modules(value: Any, depth: int = 3) -> Iterator[nn.Module]:
    """The modules in a list, tuple, dict or set, and whose methods are there."""
    value = getattr(value, "__self__", value)
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, (list, tuple, set, dict)) and depth:
        for part in value.values() if isinstance(value, dict) else value:
            yield from list_modules(part, depth - 1)
