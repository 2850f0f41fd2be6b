"""How far the outputs of two models are apart, and each of them from the same model in float64."""

import copy
import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from anynorm.apps.models.call import Call, find_tensors
from anynorm.randomness import keep_randomness
from anynorm.surgery.differences import Difference, measure


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The models' difference in one mode, and their errors: distances from the first in float64, where it runs."""

    training: bool
    difference: Difference
    errors: tuple[Difference, Difference] | None


def compare_outputs(before: nn.Module, after: nn.Module, call: Call, training: bool) -> Accuracy:
    """Compare two models' outputs on the same call, without dropout, and both with float64.

    Args:
        before, after: models with the same parameters; copies of them are called.
        call: the arguments.
        training: in training mode, else in evaluation.
    """
    first, second = (find_outputs(without_dropout(model), call, training) for model in (before, after))
    difference = largest_difference(first, second)
    wide = call.change(lambda t: t.double() if t.is_floating_point() else t)
    try:
        exact = find_outputs(without_dropout(before).double(), wide, training)
        errors = largest_difference(first, exact), largest_difference(second, exact)
    except Exception:  # a model may make its own float32 tensors and refuse float64
        return Accuracy(training, difference, None)
    # A model that draws other random numbers in float64 (a functional dropout) cannot be judged by it.
    return Accuracy(training, difference, errors if errors[0].relative < 1e-2 else None)


def without_dropout(model: nn.Module) -> nn.Module:
    """Return a copy whose dropout layers drop nothing."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
    return copied


def find_outputs(model: nn.Module, call: Call, training: bool, seed: int = 0) -> list[Tensor]:
    """Call the model from a fixed seed and return its floating-point outputs."""
    with keep_randomness(seed), torch.no_grad():
        tensors = find_tensors(call.of(model.train(training)))
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def largest_difference(first: list[Tensor], second: list[Tensor]) -> Difference:
    """Return the largest absolute difference of two lists of tensors; unequal shapes or a NaN in one are infinite."""
    each = [measure(one, other) for one, other in zip(first, second, strict=True)]
    return Difference(max((d.largest for d in each), default=0.0), max((d.scale for d in each), default=0.0))
