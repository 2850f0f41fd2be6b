"""Turn what a user typed (a built-in name or module:factory) into a model and a call that it accepts."""

import copy
import dataclasses
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from anynorm.apps.factory import import_from, split_spec
from anynorm.apps.models.example import as_call, find_example
from anynorm.apps.zoo import ZOO
from anynorm.doctor.call import Call, in_one_line
from anynorm.errors import UserError
from anynorm.randomness import keep_randomness


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A private copy of the user's model on the CPU and a call that works; the original stays untouched.

    Attributes:
        name: what the user typed.
        model: the copy, in training mode.
        call: arguments that it accepts in both modes.
        guessed: whether they are made up, and not the model's own example.
    """

    name: str
    model: nn.Module
    call: Call
    guessed: bool


def load_model(spec: str, batch: int | None = None) -> LoadedModel:
    """Return the model and example that a built-in name or module:factory stands for.

    Args:
        spec: a name in `anynorm.apps.zoo.ZOO`, or "module:factory" or "file.py:factory". The factory takes no
            argument and returns a model, (model, example_input), or a model with attribute `example_input`.
        batch: samples of an example that anynorm makes up itself; where None, 8.

    Raises:
        UserError: one sentence, when the name, the factory or the input does not work.
    """
    made, example = make_model(spec)
    model = _copy(spec, made)
    with keep_randomness():
        call = find_example(spec, model, batch or 8) if example is None else as_call(spec, model, example)
        _check_evaluation(spec, model, call)
    return LoadedModel(spec, model.train(), call, guessed=example is None)


def make_model(spec: str) -> tuple[nn.Module, Any]:
    """Return what a factory returns, as it is: the model, and its example or None.

    Raises:
        UserError: one sentence, when the name or the factory does not work.
    """
    made, example = _make(spec), None
    if isinstance(made, tuple) and len(made) == 2:
        made, example = made
    if not isinstance(made, nn.Module):
        raise UserError(
            f"{spec}: returned {_article(made)} where a torch.nn.Module was expected; "
            "return a model, or a tuple (model, example_input)."
        )
    if any(is_lazy(parameter) for parameter in made.parameters()):
        raise UserError(f"{spec}: holds lazy layers without sizes; call the model once before returning it.")
    return made, getattr(made, "example_input", None) if example is None else example


def _check_evaluation(spec: str, model: nn.Module, call: Call) -> None:
    """Call the model in evaluation too, which moves no running average."""
    try:
        with torch.no_grad():
            call.of(model.eval())
    except Exception as problem:
        raise UserError(f"{spec}: in evaluation mode the model raised {in_one_line(problem)}") from problem


def _make(spec: str) -> Any:
    """Return what the factory returns, seeded, with the caller's random state untouched."""
    factory = ZOO[spec] if spec in ZOO else _find_factory(spec)
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise UserError(f"{spec}: is {_article(factory)} and cannot be called; name a function or a class.")
    with keep_randomness():
        try:
            return factory()
        except (Exception, SystemExit) as problem:
            raise UserError(f"{spec}: calling it without arguments raised {in_one_line(problem)}") from problem


def _find_factory(spec: str) -> Any:
    """Return the object that module:name stands for."""
    parts = split_spec(spec)
    if parts is None:
        raise UserError(f"{spec!r} is neither a built-in model ({', '.join(ZOO)}) nor of the form module:factory.")
    return find_named(spec, *parts)


def find_named(spec: str, where: str, name: str) -> Any:
    """Return what has a name, with dots in it, in a module or a file.

    Args:
        spec: what the user typed, for messages.
        where: see `import_from`.
        name: in it.
    """
    try:
        found: Any = import_from(where)
    except (Exception, SystemExit) as problem:
        hint = "; run it in the folder that holds that file" if isinstance(problem, ImportError) else ""
        raise UserError(f"{spec}: importing {where} raised {in_one_line(problem)}{hint}") from problem
    for part in name.split("."):
        if not hasattr(found, part):
            own = [key for key in vars(found) if callable(vars(found)[key]) and not key.startswith("_")]
            choice = f"; it has {', '.join(own[:6])}" if own else ""
            raise UserError(f"{spec}: {where} has no attribute {part!r}{choice}.")
        found = getattr(found, part)
    return found


def _copy(spec: str, model: nn.Module) -> nn.Module:
    """Return a copy on the CPU without gradients, in training mode."""
    try:
        copied = copy.deepcopy(model).to("cpu")
    except Exception as problem:
        raise UserError(
            f"{spec}: the model cannot be copied ({in_one_line(problem)}); "
            "return a fresh one that copy.deepcopy accepts."
        ) from problem
    copied.zero_grad(set_to_none=True)
    return copied.train()


def _article(value: object) -> str:
    """Return a type's name with its article, as 'a dict' or 'an int'; None stays None."""
    name = type(value).__name__
    return "None" if value is None else ("an " if name[0] in "aeiouAEIOU" else "a ") + name
