"""Find an input that a model accepts: the one its author gives, or else standard shapes tried in turn."""

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from anynorm.doctor.call import Call, find_tensors, in_one_line
from anynorm.errors import UserError

SIDES = (64, 32, 224, 28)  # image sides; 224 and 28 are what fixed-size classifiers were made for
LENGTH = 32  # positions of a made-up sequence
MOST_TRIES = 40


def as_call(spec: str, model: nn.Module, example: Any) -> Call:
    """Return the call that an example stands for: a tensor, a tuple of arguments or a dict of named ones."""
    if isinstance(example, Tensor):
        call = Call((example,))
    elif isinstance(example, list | tuple):
        call = Call(tuple(example))
    elif isinstance(example, dict):
        call = Call((), dict(example))
    else:
        raise UserError(
            f"{spec}: its example input is of type {type(example).__name__}; "
            "give a tensor, a tuple of arguments or a dict of named arguments."
        )
    call = call.change(lambda tensor: tensor.detach().to("cpu"))
    problem = _find_problem(model, call)
    if problem is not None:
        raise UserError(f"{spec}: the model refuses its example input ({call.describe()}): {in_one_line(problem)}")
    return call


def find_example(spec: str, model: nn.Module, batch: int) -> Call:
    """Return the first standard input that the model accepts in training mode.

    Raises:
        UserError: where none works; the sentence says what the factory should return.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    first_problem: Exception | None = None
    for candidate in islice(_distinct(_candidates(model, batch, dtype)), MOST_TRIES):
        problem = _find_problem(model, Call((candidate,)))
        if problem is None:
            return Call((candidate,))
        first_problem = first_problem or problem
    because = f" (the first try ended in {in_one_line(first_problem)})" if first_problem else ""
    raise UserError(
        f"{spec}: no standard input works{because}; let the factory return (model, example_input), "
        "where example_input is a tensor, a tuple of arguments or a dict of named arguments."
    )


def _find_problem(model: nn.Module, call: Call) -> Exception | None:
    """Return what goes wrong when a copy of the model is called, or None."""
    try:
        with torch.no_grad():
            output = call.of(copy.deepcopy(model))
    except Exception as problem:
        return problem
    if not any(tensor.is_floating_point() for tensor in find_tensors(output)):
        return TypeError(f"the output holds no floating-point tensor but is of type {type(output).__name__}")
    return None


def _distinct(candidates: Iterator[Tensor]) -> Iterator[Tensor]:
    """Leave out inputs whose shape and type came before."""
    seen: set[tuple[Any, ...]] = set()
    for candidate in candidates:
        key = (candidate.shape, candidate.dtype)
        if key not in seen:
            seen.add(key)
            yield candidate


def _candidates(model: nn.Module, batch: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Return inputs in the order of their promise: what the first layers read, then the usual images."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield torch.randint(0, module.num_embeddings, (batch, LENGTH))
        for shape in _shapes_read_by(module):
            yield torch.randn(batch, *shape, dtype=dtype)
    for channels in (3, 1):
        for side in SIDES:
            yield torch.randn(batch, channels, side, side, dtype=dtype)


def _shapes_read_by(module: nn.Module) -> list[tuple[int, ...]]:
    """Return the shapes of one sample that suit a layer."""
    match module:
        case nn.Conv1d(in_channels=channels):
            return [(channels, 64), (LENGTH, channels), (channels, 256)]
        case nn.Conv2d(in_channels=channels) | nn.BatchNorm2d(num_features=channels):
            return [(channels, side, side) for side in SIDES]
        case nn.Conv3d(in_channels=channels) | nn.BatchNorm3d(num_features=channels):
            return [(channels, 16, 32, 32)]
        case nn.Linear(in_features=features):
            return [(features,), (LENGTH, features)]
        case nn.LSTM(input_size=features) | nn.GRU(input_size=features) | nn.RNN(input_size=features):
            return [(LENGTH, features)]
        case nn.BatchNorm1d(num_features=channels) | nn.InstanceNorm1d(num_features=channels):
            return [(channels,), (channels, LENGTH)]
        case nn.InstanceNorm2d(num_features=channels) | nn.GroupNorm(num_channels=channels):
            return [(channels, 32, 32), (channels, LENGTH)]
        case nn.LayerNorm(normalized_shape=shape) | nn.RMSNorm(normalized_shape=shape):
            return [tuple(shape), (LENGTH, *shape)]
    return []
