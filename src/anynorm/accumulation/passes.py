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
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..randomness import restore_randomness, save_randomness
from ..sources import overriding
from ..torch_private import map_tensors
from .calls import ForwardPass, NormCall
from .checks import make_inner_gradient_error
from .exchanges import (
    EstimateExchange,
    MomentsCollector,
    OwnMomentsExchange,
    StopForward,
    SumsCollector,
    WholeBatchExchange,
)
from .replay import SavedBuffers

Loss = Callable[[nn.Module, Any], Any]


@dataclass
class MicroBatches:
    """The micro-batches of one batch, and what is known of the calls in their forwards.

    Attributes:
        weights: of each micro-batch's loss in the whole batch's.
        names: of the model's batch norms.
        buffers: the model's, which every forward is to find as they were.
        calls: of batch norms in a forward, in order.
        states: each micro-batch's random numbers.
        total: the weighted sum of the losses so far.
        outputs: what came with the losses.
    """

    model: nn.Module
    batches: Sequence[Any]
    loss: Loss
    weights: Sequence[float]
    names: dict[Any, str]
    buffers: SavedBuffers
    calls: list[NormCall] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)
    total: Any = 0.0
    outputs: list[Any] = field(default_factory=list)

    def run(
        self, index: int, kind: type[WholeBatchExchange], special: tuple[int, WholeBatchExchange] | None = None
    ) -> tuple[ForwardPass, Tensor, Any]:
        """Run one forward of one micro-batch, from the same state each time: the pass, its loss, what came with it."""
        restore_randomness(self.states[index])
        self.buffers.restore()
        is_first = kind is OwnMomentsExchange and index == 0
        forward_pass = ForwardPass(self.calls, self.names, kind, special, is_first)
        with overriding(forward_pass):
            loss, outputs = split_loss(self.call_loss(self.batches[index]))
        forward_pass.end_loss()
        return forward_pass, loss, outputs

    def call_loss(self, batch: Any) -> Any:
        """What the loss returns for a micro-batch."""
        try:
            return self.loss(self.model, batch)
        except RuntimeError as error:
            # Passes without a graph come first: there autograd refuses a loss that differentiates, not the exchange.
            if not torch.is_grad_enabled() and "does not require grad" in str(error):
                raise make_inner_gradient_error() from error
            raise

    def run_first_pass(self) -> None:
        """Find which calls there are, and each micro-batch's random numbers; the first call's moments are exact."""
        for index in range(len(self.batches)):
            # Saved on the way, not drawn ahead: a micro-batch goes on with the random numbers of the one before.
            self.states.append(save_randomness())
            with torch.no_grad():
                self.run(index, OwnMomentsExchange)

    def collect_moments(self, place: int) -> None:
        """Collect the moments of a call over all micro-batches; those of all calls before it are known."""
        call = self.calls[place]
        call.partial = None  # The first pass had others: its inputs were normalized by each micro-batch's own moments.
        for index in range(len(self.batches)):
            with suppress(StopForward), torch.no_grad():
                self.run(index, WholeBatchExchange, (place, MomentsCollector(call)))

    def collect_sums(self, place: int) -> None:
        """Collect the sums of a call over all micro-batches; those of all calls behind it are known."""
        total: Tensor | None = None
        for index, weight in enumerate(self.weights):
            collector = SumsCollector(self.calls[place])
            forward_pass, loss, _ = self.run(index, WholeBatchExchange, (place, collector))
            if collector.input is not None and collector.input.requires_grad and loss.requires_grad:
                with overriding(forward_pass):  # Checkpoints call norms again within backward.
                    torch.autograd.grad(loss * weight, collector.input, allow_unused=True)
            if collector.own_sums is not None:
                total = collector.own_sums if total is None else total + collector.own_sums
        self.calls[place].finish_sums(total)

    def run_last_pass(self, kind: type[WholeBatchExchange]) -> None:
        """Run every micro-batch forward and backward, which leaves gradients, losses and outputs."""
        whole = sum(self.weights) or 1.0  # Buffers take a mean, also where the user's weights do not sum to 1.
        for index, weight in enumerate(self.weights):
            forward_pass, loss, outputs = self.run(index, kind)
            with overriding(forward_pass):  # As above.
                (loss * weight).backward()
            self.add_result(loss.detach() * weight, outputs)
            self.buffers.add_result(weight / whole)

    def add_result(self, loss: Tensor, outputs: Any) -> None:
        """Add a micro-batch's weighted loss and its outputs to what the caller gets."""
        self.total = self.total + loss
        self.outputs.append(outputs)


def sweep(micro_batches: MicroBatches) -> None:
    """Run mode "sweep": exact; L/2 forwards and L forwards with half a backward more than plain accumulation."""
    micro_batches.run_first_pass()
    for place, call in enumerate(micro_batches.calls):
        if place:
            micro_batches.collect_moments(place)
        call.finish_moments()
    for place in reversed(range(len(micro_batches.calls))):
        # Every pass with a graph tells which inputs want a gradient; the first of them must be run for that.
        if micro_batches.calls[place].needs_gradient or place == len(micro_batches.calls) - 1:
            micro_batches.collect_sums(place)
    micro_batches.run_last_pass(WholeBatchExchange)


def estimate(micro_batches: MicroBatches) -> None:
    """Run mode "estimate": one forward more than plain accumulation."""
    micro_batches.run_first_pass()
    for call in micro_batches.calls:
        call.finish_moments()
    micro_batches.run_last_pass(EstimateExchange)
    for call in micro_batches.calls:
        call.finish_moments()  # Those of the last pass are nearer to the truth, and move the running averages.


def split_loss(found: Any) -> tuple[Tensor, Any]:
    """The loss and what came with it, without its graph; refuses a loss that is no scalar."""
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
    return map_tensors(Tensor.detach, outputs)
