"""A model's outputs in one mode, from a fixed seed and without dropout, and how far two lists of them are apart."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..randomness import keep_randomness
from ..surgery.differences import Difference, measure
from .call import Call, find_tensors


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
