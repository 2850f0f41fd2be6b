"""Micro-batches one after the other, so that the memory is that of one.

mode "sweep", exact, of L calls of batch norms and any number of micro-batches:

    forward:   for k = 0..L-1 every micro-batch runs without a graph up to call k, earlier calls normalized by the whole
               batch's moments, and leaves its moments of call k
    backward:  for k = L-1..0 every micro-batch runs with a graph, and backward from its loss to call k, later calls
               knowing the whole batch's sums, and leaves its sums of call k
    last:      every micro-batch runs forward and backward with all moments and all sums

mode "estimate": one forward of every micro-batch in which each is normalized by its own moments; they are merged, and
stand for those of the whole batch in the last pass. There gradients flow through a micro-batch's own moments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..sources import overriding
from .calls import Call, Estimated, Known, Last, Pass, Sought, Stop, Survey
from .refuse import find_inner_gradient
from .replay import Buffers, restore_randomness, save_randomness

Loss = Callable[[nn.Module, Any], Any]


class Parts:
    """The micro-batches of one batch, and what is known of the calls in their forwards.

    Args:
        weights: of each micro-batch's loss in the whole batch's.
        names: of the model's batch norms.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        loss: Loss,
        weights: Sequence[float],
        names: dict[Any, str],
        buffers: Buffers,
    ) -> None:
        self.model, self.batches, self.loss, self.weights, self.names = model, batches, loss, weights, names
        self.buffers = buffers
        self.calls: list[Call] = []
        self.states: list[Any] = []
        self.total: Any = 0.0
        self.outputs: list[Any] = []

    def run(self, index: int, kind: type[Known], special: tuple[int, Known] | None = None) -> tuple[Pass, Tensor, Any]:
        """One forward of one micro-batch, as every forward of it: its loss, and what came with it."""
        restore_randomness(self.states[index])
        self.buffers.rewind()
        running = Pass(self.calls, self.names, kind, special, is_first=kind is Survey and index == 0)
        with overriding(running):
            loss, outputs = split_loss(self.call_loss(self.batches[index]))
        running.leave_loss()
        return running, loss, outputs

    def call_loss(self, given: Any) -> Any:
        """What the loss returns; one that differentiates finds no graph in a survey."""
        try:
            return self.loss(self.model, given)
        except RuntimeError as error:
            if not torch.is_grad_enabled() and "does not require grad" in str(error):
                raise find_inner_gradient() from error
            raise

    def survey(self) -> None:
        """Which calls there are, and each micro-batch's random numbers; the moments of the first call are exact."""
        for index in range(len(self.batches)):
            self.states.append(save_randomness())
            with torch.no_grad():
                self.run(index, Survey)

    def collect(self, place: int) -> None:
        """The moments of a call, all before it being known."""
        self.calls[place].found = None
        for index in range(len(self.batches)):
            try:
                with torch.no_grad():
                    self.run(index, Known, (place, Last(self.calls[place])))
            except Stop:
                pass

    def find_sums(self, place: int) -> None:
        """The sums of a call, all behind it being known."""
        total: Tensor | None = None
        for index, weight in enumerate(self.weights):
            sought = Sought(self.calls[place])
            running, loss, _ = self.run(index, Known, (place, sought))
            if sought.input is not None and sought.input.requires_grad and loss.requires_grad:
                with overriding(running):
                    torch.autograd.grad(loss * weight, sought.input, allow_unused=True)
            if sought.found is not None:
                total = sought.found if total is None else total + sought.found
        self.calls[place].finish_sums(total)

    def finish(self, kind: type[Known]) -> None:
        """Forward and backward of every micro-batch, which leave gradients, losses and outputs."""
        share = sum(self.weights) or 1.0
        for index, weight in enumerate(self.weights):
            running, loss, outputs = self.run(index, kind)
            with overriding(running):
                (loss * weight).backward()
            self.keep(loss.detach() * weight, outputs)
            self.buffers.keep(weight / share)

    def keep(self, loss: Tensor, outputs: Any) -> None:
        """What the caller gets."""
        self.total = self.total + loss
        self.outputs.append(outputs)


def sweep(parts: Parts) -> None:
    """Exact; L/2 forwards and L forwards with half a backward more than plain accumulation."""
    parts.survey()
    for place, call in enumerate(parts.calls):
        if place:
            parts.collect(place)
        call.finish()
    for place in reversed(range(len(parts.calls))):
        # Every pass with a graph tells which inputs want a gradient; the first of them must be run for that.
        if parts.calls[place].needs_gradient or place == len(parts.calls) - 1:
            parts.find_sums(place)
    parts.finish(Known)


def estimate(parts: Parts) -> None:
    """One forward more than plain accumulation."""
    parts.survey()
    for call in parts.calls:
        call.finish()
    parts.finish(Estimated)
    for call in parts.calls:
        call.finish()


def split_loss(found: Any) -> tuple[Tensor, Any]:
    """The loss, and what came with it."""
    loss, outputs = (found[0], detach(found[1])) if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise RuntimeError(
            f"accumulate: loss must return a scalar tensor, or a pair of it and outputs; got {got}; take the mean over "
            "the micro-batch"
        )
    return loss, outputs


def detach(outputs: Any) -> Any:
    """Outputs without their graph."""
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, outputs)
