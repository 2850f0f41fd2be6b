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
from torch import Tensor

from ..activations import IDENTITY
from ..engine.plain import find_memory_format, lay_out
from ..engine.request import Request
from ..padding.masks import find_mask
from ..padding.ragged import close_rows, is_ragged, open_residual, open_rows
from ..sources import OVERRIDE, Joined, overriding
from .passes import Parts, split_loss
from .refuse import check_layer, differ, find_inner_gradient


class Abandoned(BaseException):
    """Another micro-batch failed."""


class Runner:
    """One micro-batch in its thread. A `sources.Override`: a norm waits here for its output.

    Attributes:
        event: "call" with what the norm was given, "end" with what the function returned, or "error".
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.answers: SimpleQueue[Any] = SimpleQueue()
        self.events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self.event: tuple[str, Any] = ("start", None)
        context, modes = contextvars.copy_context(), find_modes()
        self.thread = threading.Thread(target=context.run, args=(self.work, function, modes), daemon=True)

    def work(self, function: Callable[[], Any], modes: list[torch.autocast]) -> None:
        """The thread."""
        OVERRIDE.set(self)
        try:
            with ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode)
                result = "end", function()
        except BaseException as error:
            result = "error", error
        self.events.put(result)

    def start(self) -> None:
        """Up to the first call."""
        self.thread.start()
        self.event = self.events.get()

    def go_on(self, answer: Any) -> None:
        """Give the norm its output; up to the next call."""
        self.answers.put(answer)
        self.event = self.events.get()

    def abandon(self) -> None:
        """Unwind the thread, however often its code calls a norm meanwhile."""
        while self.event[0] == "call":
            self.go_on(Abandoned())
        if self.thread.ident is not None:
            self.thread.join()

    def find_source(self, layer: Any, input: Any) -> Joined:
        """All micro-batches."""
        return Joined(partial(self.normalize, layer))

    def normalize(self, layer: Any, input: Any, residual: Any, request: Request) -> Any:
        """Wait for the others."""
        self.events.put(("call", (layer, input, residual, request)))
        answer = self.answers.get()
        if isinstance(answer, Abandoned):
            raise answer
        return answer


class Whole:
    """In backward every call has been made. A `sources.Override`."""

    def find_source(self, layer: Any, input: Any) -> Joined:
        """Never returns."""
        raise RuntimeError(
            "accumulate: mode 'lockstep' cannot compute a batch norm again in backward; got activation checkpointing; "
            "leave batch norms out of checkpoints, or take mode='sweep'"
        )


def find_modes() -> list[torch.autocast]:
    """Autocast belongs to a thread; the same for another one."""
    kinds = ["cpu"]
    if torch.accelerator.is_available():
        kinds.append(torch.accelerator.current_accelerator().type)  # type: ignore[union-attr] # there is one
    return [
        torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        for kind in kinds
        if torch.is_autocast_enabled(kind)
    ]


def lockstep(parts: Parts) -> None:
    """Exact; one forward and one backward, with the memory of the large batch."""
    found = run_together([partial(parts.loss, parts.model, batch) for batch in parts.batches], parts.names)
    losses = []
    for result, weight in zip(found, parts.weights, strict=True):
        loss, outputs = split_loss(result)
        losses.append(loss * weight)
        parts.keep(losses[-1].detach(), outputs)
    with overriding(Whole()):
        torch.stack([loss.reshape(()) for loss in losses]).sum().backward()


def run_together(functions: list[Callable[[], Any]], names: dict[Any, str]) -> list[Any]:
    """What each function returns; their norms see all of them as one batch."""
    runners, stage = [Runner(function) for function in functions], Stage()
    try:
        for runner in runners:
            runner.start()
            check_event(runner)
        place = 0
        while (layer := find_layer(runners, names, place)) is not None:
            given = [runner.event[1][1:] for runner in runners]
            check_alike(names[layer], given)
            answers = join(layer, given, stage)
            del given
            place += 1
            for runner in runners:
                runner.go_on(answers.pop(0))
                check_event(runner)
        stage.is_in_loss = False
        return [runner.event[1] for runner in runners]
    finally:
        for runner in runners:
            runner.abandon()


def check_event(runner: Runner) -> None:
    """Raise here what was raised there."""
    if runner.event[0] == "error":
        raise runner.event[1]


def find_layer(runners: list[Runner], names: dict[Any, str], place: int) -> Any:
    """The norm at which all have stopped; None where all have come to the end."""
    layers = [event[1][0] if event[0] == "call" else None for event in (runner.event for runner in runners)]
    told = ["the end" if layer is None else names.get(layer, "a norm outside the model") for layer in layers]
    for layer, name in zip(layers, told, strict=True):
        if layer is not None:
            check_layer(layer, names)
        if layer is not layers[0]:
            raise differ(place, name, told[0])
    return layers[0]


def check_alike(name: str, given: list[Any]) -> None:
    """Refuse what one call of a norm cannot do for all micro-batches."""
    told = [
        {"residual": residual is not None, "activation": request.activation or IDENTITY}
        for _, residual, request in given
    ]
    for what in ("residual", "activation"):
        for index, one in enumerate(told):
            if one[what] != told[0][what]:
                raise RuntimeError(
                    f"accumulate: mode 'lockstep' calls a batch norm once for all micro-batches, so that all must "
                    f"have a residual or none, and one activation; got another {what} for {name} in micro-batch "
                    f"{index} than in the first; take mode='sweep'"
                )


def join(layer: Any, given: list[Any], stage: Stage) -> list[Any]:
    """The layer's outputs for all micro-batches as one batch.

    Args:
        given: input, residual and request of each.
    """
    inputs, residuals, requests = (list(part) for part in zip(*given, strict=True))
    ragged = [is_ragged(x) for x in inputs]
    tensors = [open_rows("batch_norm", x) if rows else x for x, rows in zip(inputs, ragged, strict=True)]
    residuals = [
        open_residual("batch_norm", x, residual) if rows else residual
        for x, rows, residual in zip(inputs, ragged, residuals, strict=True)
    ]
    masks = [
        find_mask("batch_norm", x, (1,), request.mask, request.lengths)
        for x, request in zip(inputs, requests, strict=True)
    ]
    if any(mask is not None for mask in masks):
        masks = [mask_all(x) if mask is None else mask for x, mask in zip(tensors, masks, strict=True)]
    as_rows = any(ragged) or len({x.shape[1:] for x in tensors}) > 1

    def lay(parts: list[Any]) -> Tensor | None:
        if parts[0] is None:
            return None
        return torch.cat([to_rows(t, layer) for t in parts] if as_rows else parts)

    mask = lay(masks)
    y = layer.normalize(lay(tensors), lay(residuals), requests[0].activation, mask if mask is None else mask.squeeze(1))
    sizes = [x.numel() // x.shape[1] if as_rows else len(x) for x in tensors]
    outputs = Split.apply(y, sizes, stage)
    if as_rows:
        outputs = [from_rows(t, x) for t, x in zip(outputs, tensors, strict=True)]
    return [close_rows(y, x) if rows else y for y, x, rows in zip(outputs, inputs, ragged, strict=True)]


def mask_all(x: Tensor) -> Tensor:
    """A mask as `find_mask` makes it, of nothing but real positions."""
    sizes = [1 if axis == 1 else size for axis, size in enumerate(x.shape)]
    return torch.ones(sizes, dtype=torch.float32, device=x.device)


def to_rows(t: Tensor, layer: Any) -> Tensor:
    """(positions, C), with as many axes of size 1 as the layer wants."""
    rows = t.movedim(1, -1).reshape(-1, t.shape[1])
    axes = getattr(layer, "_axes", (2,))
    return rows.reshape(*rows.shape, *[1] * (axes[0] - 2))


def from_rows(rows: Tensor, x: Tensor) -> Tensor:
    """The inverse, laid out as x is."""
    y = rows.reshape(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    return lay_out(y, find_memory_format(x))


class Stage:
    """Whether losses are still being computed. Not a context variable: backward may run in torch's own threads."""

    is_in_loss = True


class Split(torch.autograd.Function):
    """Parts of a tensor that nobody else holds, which share its memory and may be changed in place.

    As views of it they could not: an activation in place behind a norm would be refused, or copied for each part.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, sizes: list[int], stage: Stage) -> tuple[Tensor, ...]:
        ctx.stage, ctx.sizes, ctx.like = stage, sizes, y.shape[1:]
        parts, start = [], y.storage_offset()
        for size in sizes:
            shape = (size, *y.shape[1:])
            parts.append(y.new_empty(0).set_(y.untyped_storage(), start, shape, y.stride()))
            start += size * y.stride(0)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        if ctx.stage.is_in_loss:
            raise find_inner_gradient()
        present = next(g for g in gradients if g is not None)
        filled = [
            present.new_zeros(size, *ctx.like) if g is None else g for g, size in zip(gradients, ctx.sizes, strict=True)
        ]
        return torch.cat(filled), None, None
