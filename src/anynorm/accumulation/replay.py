"""What a micro-batch must find again when it is run once more: random numbers, buffers, gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor

from ..randomness import restore_randomness as restore_randomness
from ..randomness import save_randomness as save_randomness


class Buffers:
    """The buffers of a model: every micro-batch is to find them as they are now.

    The batch norms' own do not move until all parts are known. Those of others (instance norm's running averages,
    spectral norm's vectors) move at every forward. At the end they are the weighted mean of what each micro-batch made
    of them, which for averages over samples is what the whole batch makes of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.before = {place: (buffer, clone(buffer)) for place, buffer in self.find()}
        self.after: dict[tuple[int, str], Tensor | None] = {}

    def find(self) -> list[tuple[tuple[int, str], Tensor | None]]:
        """Every module's, by the module's place and the buffer's name; a buffer that two share is there twice."""
        return [
            ((place, name), buffer)
            for place, module in enumerate(self.modules)
            for name, buffer in module._buffers.items()
        ]

    def rewind(self) -> None:
        """As at the start, and in the tensors of the start, also where a forward put others in their place."""
        for new in [place for place, _ in self.find() if place not in self.before]:
            del self.modules[new[0]]._buffers[new[1]]
        with torch.no_grad():
            for place, (buffer, before) in self.before.items():
                self.put(place, buffer)
                if buffer is not None and before is not None and not same(buffer, before):
                    buffer.copy_(before)

    def put(self, place: tuple[int, str], buffer: Tensor | None) -> None:
        """Into the module."""
        buffers = self.modules[place[0]]._buffers
        if place[1] not in buffers or buffers[place[1]] is not buffer:
            buffers[place[1]] = buffer

    def keep(self, weight: float) -> None:
        """Remember what a micro-batch made of them, with its share of the mean; the last one's where none is."""
        for place, buffer in self.find():
            _, before = self.before.get(place, (None, None))
            if same(buffer, before):
                continue
            if buffer is None or before is None or not buffer.is_floating_point() or not alike(buffer, before):
                self.after[place] = clone(buffer)
                continue
            mean = self.after.get(place)
            self.after[place] = (before if mean is None else mean) + weight * (buffer.detach() - before)

    def finish(self) -> None:
        """The mean over the micro-batches."""
        with torch.no_grad():
            for place, after in self.after.items():
                buffer, _ = self.before.get(place, (None, None))
                if buffer is not None and after is not None and alike(buffer, after):
                    self.put(place, buffer.copy_(after))
                else:
                    self.put(place, after)


def clone(buffer: Tensor | None) -> Tensor | None:
    """A copy of its values."""
    return None if buffer is None else buffer.detach().clone()


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether one can take the other's values."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two buffers hold the same; NaN equals NaN."""
    if a is None or b is None:
        return a is b
    return alike(a, b) and (torch.equal(a, b) or bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)))


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
