"""How a batch of the loader reaches the model: unwrapped, moved to its device, called, and counted in a bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
import torch.nn as nn
from torch.nn.utils.rnn import PackedSequence

from .progress import ProgressBar, make_console


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel and torch.compile.

    DistributedDataParallel broadcasts buffers at every forward, so that ranks with unlike numbers of batches would
    wait for ever.
    """
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inside := vars(model).get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inside
        else:
            return model


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call the model with a tuple's or list's first element, a dict's entries by name, anything else as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        return model(batch[0])
    return model(batch)


def find_device(model: nn.Module) -> torch.device | None:
    """Return the device of the first parameter or buffer; None where the model has neither."""
    for tensors in (model.parameters(), model.buffers()):
        for t in tensors:
            return t.device
    return None


def move(batch: Any, device: torch.device | None) -> Any:
    """Return the batch with whatever has `to`, also in tuples, lists and dicts, on the model's device."""
    if device is None:
        return batch
    if type(batch) in (tuple, list):
        return type(batch)(move(part, device) for part in batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields") and not isinstance(batch, PackedSequence):
        return type(batch)(*(move(part, device) for part in batch))
    if isinstance(batch, dict):
        return {name: move(part, device) for name, part in batch.items()}
    return batch.to(device) if hasattr(batch, "to") else batch


class Feed:
    """Hands the loader's batches to the model, pass by pass.

    Args:
        model: unwrapped.
        loader: anything that can be iterated.
        forward_fn: calls the model with a batch.
        shows: draw a progress bar.
    """

    model: nn.Module
    loader: Any

    def __init__(self, model: nn.Module, loader: Any, forward_fn: Callable[..., Any] | None, shows: bool) -> None:
        self.model, self.loader = model, loader
        self.forward: Callable[..., Any] = call_model if forward_fn is None else forward_fn
        self.device: torch.device | None = find_device(model)
        self.progress: ProgressBar = ProgressBar(shows)

    def run(self, title: str, limit: int | None) -> Iterator[int]:
        """Feed up to `limit` batches; yields, after each, how many there have been."""
        total = limit
        if hasattr(self.loader, "__len__"):
            total = len(self.loader) if limit is None else min(limit, len(self.loader))
        with self.progress.count(title, total) as advance:
            for number, batch in enumerate(islice(self.loader, limit), 1):
                self.forward(self.model, move(batch, self.device))
                advance()
                yield number

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Run a block without gradients and compilers; torch's random numbers are afterwards as before.

        The next pass so draws the same ones. Python's and NumPy's go on: a loader's own draws are the caller's matter.
        """
        devices = {t.device.index for t in self.model.parameters() if t.device.type == "cuda"}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)))
            if "torch._dynamo" in sys.modules:  # A compiled forward need not see hooks that come later.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield


def wants_progress(progress: bool | None, rank: int) -> bool:
    """Return whether to draw a bar: as the caller says, and for None in a terminal, on the first rank."""
    return progress if progress is not None else rank == 0 and make_console().is_terminal
