"""How far the outputs of two models are apart, and each of them from the same model in float64."""

import dataclasses

from torch import nn

from anynorm.doctor.call import Call
from anynorm.doctor.outputs import find_outputs, largest_difference, without_dropout
from anynorm.surgery.differences import Difference


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
