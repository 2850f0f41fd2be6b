"""What the callbacks share: a check before training, the modes meanwhile, and how batches reach the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn as nn
from torch import Tensor


def check_batch_norms(model: nn.Module) -> None:
    if not any(isinstance(module._buffers.get("running_mean"), Tensor) for module in model.modules()):
        raise ValueError(
            f"Recalibrate: the model must have a batch norm with running averages; got none in {type(model).__name__}; "
            "other norms need no recalibration: leave the callback out"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All of a model in evaluation; afterwards each module is in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


class Moved:
    """A loader's batches, each given to a function first; as often as the loader can be iterated."""

    loader: Iterable[Any]
    move: Callable[[Any], Any]

    def __init__(self, loader: Iterable[Any], move: Callable[[Any], Any]) -> None:
        self.loader, self.move = loader, move

    def __iter__(self) -> Iterator[Any]:
        return map(self.move, self.loader)
