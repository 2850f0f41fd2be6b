"""Micro-batches side by side: each runs in a thread of its own, one at a time, and stops at each call of a batch norm.
When all have come there, the norm runs once, on all of them as one batch, and all go on.

The graph is that of the large batch; so are the memory, the numbers, and the single backward.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from ..activations import IDENTITY
from ..engine.request import Request
from ..sources import OVERRIDE, Joined, Override, overriding
from .checks import check_layer, make_order_error
from .joint_call import LossPhase, normalize_jointly
from .passes import MicroBatches, split_loss


class ThreadAbandoned(BaseException):
    """Another micro-batch failed. Not an Exception, so that no model catches it."""


class MicroBatchThread(Override):
    """One micro-batch in its thread: a norm waits here for its output.

    Attributes:
        event: "call" with what the norm was given, "end" with what the function returned, or "error".
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        # One at a time runs: this one and the caller hand over to each other by these two queues.
        self.outputs: SimpleQueue[Any] = SimpleQueue()
        self.events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self.event: tuple[str, Any] = ("start", None)
        context, modes = contextvars.copy_context(), find_modes()
        # A daemon, so that a model that hangs does not keep the process from ending.
        self.thread: threading.Thread = threading.Thread(
            target=context.run, args=(self.run, function, modes), daemon=True
        )

    def run(self, function: Callable[[], Any], modes: list[torch.autocast]) -> None:
        """Call the function, in the thread."""
        OVERRIDE.set(self)
        try:
            with ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode)
                result = "end", function()
        except BaseException as error:  # Whatever it is belongs to the caller's thread.
            result = "error", error
        self.events.put(result)

    def start(self) -> None:
        """Start the thread, and wait until it comes to its first call of a norm."""
        self.thread.start()
        self.event = self.events.get()

    def resume(self, output: Any) -> None:
        """Give the norm its output, and wait until the thread comes to its next call."""
        self.outputs.put(output)
        self.event = self.events.get()

    def abandon(self) -> None:
        """Unwind the thread, however often its code calls a norm meanwhile."""
        while self.event[0] == "call":
            self.resume(ThreadAbandoned())
        if self.thread.ident is not None:
            self.thread.join()

    def find_source(self, layer: Any, input: Any, mask: Any, lengths: Any) -> Joined:
        return Joined(partial(self.wait_for_output, layer))

    def wait_for_output(self, layer: Any, input: Any, residual: Any, request: Request) -> Any:
        """Hand a norm's input over to the caller's thread, and wait for what all micro-batches together make of it."""
        self.events.put(("call", (layer, input, residual, request)))
        output = self.outputs.get()
        if isinstance(output, ThreadAbandoned):
            raise output
        return output


class RecomputationRefusal(Override):
    """Refuses calls of norms within backward, when every call has been made."""

    def find_source(self, layer: Any, input: Any, mask: Any, lengths: Any) -> Joined:
        raise RuntimeError(
            "accumulate: mode 'lockstep' cannot compute a batch norm again in backward; got activation checkpointing; "
            "leave batch norms out of checkpoints, or take mode='sweep'"
        )


def find_modes() -> list[torch.autocast]:
    """This thread's autocast modes, to be entered in another: each thread has its own."""
    kinds = ["cpu"]
    if torch.accelerator.is_available():
        kinds.append(torch.accelerator.current_accelerator().type)  # type: ignore[union-attr] # there is one
    return [
        torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        for kind in kinds
        if torch.is_autocast_enabled(kind)
    ]


def lockstep(micro_batches: MicroBatches) -> None:
    """Run mode "lockstep": exact; one forward and one backward, with the memory of the large batch."""
    functions: list[Callable[[], Any]] = [
        partial(micro_batches.loss, micro_batches.model, batch) for batch in micro_batches.batches
    ]
    results = run_in_lockstep(functions, micro_batches.names)
    losses = []
    for result, weight in zip(results, micro_batches.weights, strict=True):
        loss, outputs = split_loss(result)
        losses.append(loss * weight)
        micro_batches.add_result(losses[-1].detach(), outputs)
    with overriding(RecomputationRefusal()):
        torch.stack([loss.reshape(()) for loss in losses]).sum().backward()


def run_in_lockstep(functions: list[Callable[[], Any]], names: dict[Any, str]) -> list[Any]:
    """What each function returns, run in threads side by side; their norms see all of them as one batch."""
    threads, phase = [MicroBatchThread(function) for function in functions], LossPhase()
    try:
        for thread in threads:
            thread.start()
            check_event(thread)
        place = 0
        while (layer := get_next_layer(threads, names, place)) is not None:
            given = [thread.event[1][1:] for thread in threads]
            check_alike(names[layer], given)
            outputs = normalize_jointly(layer, given, phase)
            del given  # Inputs that a graph does not need are freed before the threads go on.
            place += 1
            for thread in threads:
                thread.resume(outputs.pop(0))
                check_event(thread)
        phase.is_in_loss = False
        return [thread.event[1] for thread in threads]
    finally:
        for thread in threads:
            thread.abandon()


def check_event(thread: MicroBatchThread) -> None:
    """Raise in this thread what was raised in a micro-batch's."""
    if thread.event[0] == "error":
        raise thread.event[1]


def get_next_layer(threads: list[MicroBatchThread], names: dict[Any, str], place: int) -> Any:
    """The norm at which all threads have stopped, None where all have come to the end; refuses any other case."""
    layers = [event[1][0] if event[0] == "call" else None for event in (thread.event for thread in threads)]
    met = ["the end" if layer is None else names.get(layer, "a norm outside the model") for layer in layers]
    for layer, name in zip(layers, met, strict=True):
        if layer is not None:
            check_layer(layer, names)
        if layer is not layers[0]:
            raise make_order_error(place, name, met[0])
    return layers[0]


def check_alike(name: str, given: list[Any]) -> None:
    """Refuse what one call of a norm cannot do for all micro-batches."""
    options = [
        {"residual": residual is not None, "activation": request.activation or IDENTITY}
        for _, residual, request in given
    ]
    for what in ("residual", "activation"):
        for index, one in enumerate(options):
            if one[what] != options[0][what]:
                raise RuntimeError(
                    f"accumulate: mode 'lockstep' calls a batch norm once for all micro-batches, so that all must "
                    f"have a residual or none, and one activation; got another {what} for {name} in micro-batch "
                    f"{index} than in the first; take mode='sweep'"
                )
