"""What a micro-batch must find again when it is run once more: random numbers, buffers, gradients."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor


def save_randomness() -> list[Any]:
    """The states of Python's, NumPy's and torch's generators, of every device that is in use."""
    states: list[Any] = [random.getstate(), np.random.get_state(), torch.get_rng_state()]  # noqa: NPY002 # what models draw from
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state_all())
    return states


def restore_randomness(states: list[Any]) -> None:
    """Draw again what was drawn after `save_randomness`."""
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002 # as above
    torch.set_rng_state(states[2])
    if len(states) > 3:
        torch.cuda.set_rng_state_all(states[3])


class Buffers:
    """The buffers of a model: every micro-batch is to find them as they are now.

    The batch norms' own do not move until all parts are known. Those of others (instance norm's running averages,
    spectral norm's vectors) move at every forward. At the end they are the weighted mean of what each micro-batch made
    of them, which for averages over samples is what the whole batch makes of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self.means: list[Tensor | None] = [None] * len(self.before)

    def rewind(self) -> None:
        """As at the start."""
        with torch.no_grad():
            for buffer, before in self.before:
                if not same(buffer, before):
                    buffer.copy_(before)

    def keep(self, weight: float) -> None:
        """Remember what a micro-batch made of them, with its share of the mean."""
        for place, (buffer, before) in enumerate(self.before):
            if same(buffer, before):
                continue
            if not buffer.is_floating_point():
                self.means[place] = buffer.detach().clone()
                continue
            mean = self.means[place]
            self.means[place] = (before if mean is None else mean) + weight * (buffer.detach() - before)

    def finish(self) -> None:
        """The mean over the micro-batches."""
        with torch.no_grad():
            for (buffer, _), mean in zip(self.before, self.means, strict=True):
                if mean is not None:
                    buffer.copy_(mean)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two buffers hold the same; NaN equals NaN."""
    return torch.equal(a, b) or bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


class Gradients:
    """The `.grad` of a model's parameters: untouched until all of this batch is there."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.before = [(parameter, parameter.grad) for parameter in parameters]
        for parameter, _ in self.before:
            parameter.grad = None

    def restore(self) -> None:
        """As at the start."""
        for parameter, before in self.before:
            parameter.grad = before

    def add(self) -> None:
        """What was there and what came, in the tensors that were there."""
        with torch.no_grad():
            for parameter, before in self.before:
                if before is not None:
                    if parameter.grad is not None:
                        before += parameter.grad
                    parameter.grad = before
