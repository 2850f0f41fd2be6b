"""What `anynorm doctor` is given: a model as its factory returns it, batches, a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from anynorm.apps.factory import split_spec
from anynorm.apps.models.load import find_named, make_model
from anynorm.apps.weights import load_weights
from anynorm.doctor.call import in_one_line
from anynorm.errors import UserError
from anynorm.randomness import keep_randomness

DATA = "an iterable of batches, or a function without arguments that returns one"
LOSS = "a function of (outputs, targets) that returns the mean loss"


def open_model(spec: str, weights: str | None) -> nn.Module:
    """The model itself, in the mode in which its factory returns it; weights change its tensors and no mode.

    Raises:
        UserError: one sentence, when the factory or the file does not work.
    """
    model, _ = make_model(spec)
    if weights is not None:
        # Impossible values are loaded: they are what is looked for.
        load_weights("doctor --weights", model, weights, check_values=False)
    return model


def open_loader(spec: str) -> Any:
    """The batches that a name stands for, or what it returns when it is called.

    Raises:
        UserError: one sentence, when it cannot be imported or called, or gives no batches.
    """
    found = find_given("--data", spec, DATA)
    if isinstance(found, type) or not hasattr(found, "__iter__"):
        found = call("--data", spec, found, DATA)
    check_loader(spec, found)
    return found


def check_loader(spec: str, loader: Any) -> None:
    """Refuse what gives samples, or is a batch, where batches are asked for."""
    name, repair = type(loader).__name__, ""
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        repair = "which gives samples; wrap it in torch.utils.data.DataLoader(dataset, batch_size=...)"
    elif isinstance(loader, Tensor | Mapping | str | bytes):
        repair = "which may be a batch; return a list of batches"
    elif isinstance(loader, tuple) and loader and all(isinstance(each, Tensor) for each in loader):
        repair = "of tensors, which may be a batch; return a list of such tuples"
    elif not hasattr(loader, "__iter__"):
        repair = "which cannot be iterated; return a DataLoader or a list"
    if repair:
        raise UserError(f"doctor --data: {spec} must give batches one by one; got a {name}, {repair}.")


def open_loss(spec: str) -> Callable[[Any, Any], Any]:
    """The loss that a name stands for; a class is called first, as torch.nn.CrossEntropyLoss.

    Raises:
        UserError: one sentence, when it cannot be imported or called.
    """
    found: Callable[[Any, Any], Any] = find_given("--loss", spec, LOSS)
    if isinstance(found, type):
        found = call("--loss", spec, found, LOSS)
    if not callable(found):
        raise UserError(f"doctor --loss: {spec} must be {LOSS}; got a {type(found).__name__}.")
    return found


def find_given(option: str, spec: str, takes: str) -> Any:
    """What a name stands for."""
    parts = split_spec(spec)
    if parts is None:
        raise UserError(f"doctor {option}: takes {takes}, as module:name or file.py:name; got {spec!r}.")
    return find_named(spec, *parts)


def call(option: str, spec: str, function: Any, takes: str) -> Any:
    """What a function returns without arguments."""
    if not callable(function):
        raise UserError(f"doctor {option}: {spec} must be {takes}; got a {type(function).__name__}.")
    with keep_randomness():
        try:
            return function()
        except (Exception, SystemExit) as problem:
            raise UserError(
                f"doctor {option}: calling {spec} without arguments raised {in_one_line(problem)}"
            ) from problem
