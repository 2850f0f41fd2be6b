"""What a micro-batch must find again when it is run once more, beside random numbers: buffers and gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor


class SavedBuffers:
    """The buffers of a model: every micro-batch is to find them as they are now.

    The batch norms' own do not move until all parts are known. Those of others (instance norm's running averages,
    spectral norm's vectors) move at every forward. At the end they are the weighted mean of what each micro-batch made
    of them, which for averages over samples is what the whole batch makes of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[nn.Module] = list(model.modules())
        self.before: dict[tuple[int, str], tuple[Tensor | None, Tensor | None]] = {
            place: (buffer, clone(buffer)) for place, buffer in self.list_all()
        }
        self.after: dict[tuple[int, str], Tensor | None] = {}

    def list_all(self) -> list[tuple[tuple[int, str], Tensor | None]]:
        """All buffers by their module's place and their name; a buffer that two modules share is there twice."""
        return [
            ((place, name), buffer)
            for place, module in enumerate(self.modules)
            for name, buffer in module._buffers.items()
        ]

    def restore(self) -> None:
        """Write the values of the start into the tensors of the start, put back where others took their place."""
        for new in [place for place, _ in self.list_all() if place not in self.before]:
            del self.modules[new[0]]._buffers[new[1]]
        with torch.no_grad():
            for place, (buffer, before) in self.before.items():
                self.put(place, buffer)
                if buffer is not None and before is not None and not are_equal(buffer, before):
                    buffer.copy_(before)

    def put(self, place: tuple[int, str], buffer: Tensor | None) -> None:
        """Make a tensor the buffer of its module, where another one is."""
        buffers = self.modules[place[0]]._buffers
        if place[1] not in buffers or buffers[place[1]] is not buffer:
            buffers[place[1]] = buffer

    def add_result(self, weight: float) -> None:
        """Add what a micro-batch made of the buffers to their mean; the last one's stays where none can be taken."""
        for place, buffer in self.list_all():
            _, before = self.before.get(place, (None, None))
            if are_equal(buffer, before):
                continue
            if buffer is None or before is None or not buffer.is_floating_point() or not are_compatible(buffer, before):
                self.after[place] = clone(buffer)
                continue
            mean = self.after.get(place)
            self.after[place] = (before if mean is None else mean) + weight * (buffer.detach() - before)

    def write_mean(self) -> None:
        """Write the mean over the micro-batches into the buffers."""
        with torch.no_grad():
            for place, after in self.after.items():
                buffer, _ = self.before.get(place, (None, None))
                # Into the tensor of the start where it fits: optimizers, compiled graphs or the user may hold it.
                if buffer is not None and after is not None and are_compatible(buffer, after):
                    self.put(place, buffer.copy_(after))
                else:
                    self.put(place, after)


def clone(buffer: Tensor | None) -> Tensor | None:
    """A copy of a buffer's values."""
    return None if buffer is None else buffer.detach().clone()


def are_compatible(a: Tensor, b: Tensor) -> bool:
    """Whether one tensor can take the other's values."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def are_equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two buffers hold the same; NaN equals NaN."""
    if a is None or b is None:
        return a is b
    return are_compatible(a, b) and (torch.equal(a, b) or bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)))


class SavedGradients:
    """The `.grad` of a model's parameters: untouched until all of this batch is there."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.before: list[tuple[nn.Parameter, Tensor | None]] = [
            (parameter, parameter.grad) for parameter in parameters
        ]
        for parameter, _ in self.before:
            # None, not 0: what comes is this batch's alone, and an error leaves the tensors of the start untouched.
            parameter.grad = None

    def restore(self) -> None:
        """Give the parameters the gradients of the start."""
        for parameter, before in self.before:
            parameter.grad = before

    def add(self) -> None:
        """Add the new gradients to those of the start, in the tensors of the start: optimizers may hold them."""
        with torch.no_grad():
            for parameter, before in self.before:
                if before is not None:
                    if parameter.grad is not None:
                        before += parameter.grad
                    parameter.grad = before
