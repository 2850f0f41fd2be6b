"""Training and measuring, as every study does it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import Data
from .workers import Record

MOMENTUM = 0.9
EVALUATION_BATCH = 500
LEVEL_EVERY = 10

Loss = Callable[[Tensor, Tensor], Tensor]


def draw_order(samples: int, images: int, seed: int) -> np.ndarray:
    """Which sample comes when: one permutation after the other; the same for every norm, rate and batch size."""
    generator = np.random.default_rng([seed, 1])
    passes = [generator.permutation(samples) for _ in range(math.ceil(images / samples))]
    return np.concatenate(passes)[:images]


def draw_batches(samples: int, batch: int, steps: int, seed: int) -> list[Tensor]:
    """Indices of every step's samples: `steps` batches of one size, cut from `draw_order`."""
    return list(torch.from_numpy(draw_order(samples, batch * steps, seed)).split(batch))


def fit_steps(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    batches: Iterable[Tensor],
    optimizer: torch.optim.Optimizer | float,
    loss: Loss = functional.cross_entropy,
    *,
    lengths: Tensor | None = None,
) -> Iterator[float]:
    """Train step by step: gives the loss of each, and ends after one that is no number.

    Args:
        network: as it is, in training mode or not.
        x, y: all training samples.
        batches: indices of the samples of each step.
        optimizer: or the learning rate of SGD with momentum 0.9.
        loss: of outputs and targets.
        lengths: of padded sequences: the network is then called with (x, lengths).
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = torch.optim.SGD(network.parameters(), lr=optimizer, momentum=MOMENTUM)
    for chosen in batches:
        optimizer.zero_grad()
        found = loss(call(network, x, chosen, lengths), y[chosen])
        found.backward()
        optimizer.step()
        value = found.item()
        yield value
        if not math.isfinite(value):
            return


def call(network: nn.Module, x: Tensor, chosen: Tensor | slice, lengths: Tensor | None) -> Tensor:
    """Outputs for some of the samples."""
    y: Tensor = network(x[chosen]) if lengths is None else network(x[chosen], lengths[chosen])
    return y


def fit(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    batches: Iterable[Tensor],
    optimizer: torch.optim.Optimizer | float,
    loss: Loss = functional.cross_entropy,
) -> str:
    """Train by `fit_steps` to the end: `finished`, or `diverged` where a loss was no number."""
    losses = list(fit_steps(network, x, y, batches, optimizer, loss))
    return find_status(losses[-1])


def fit_to_level(
    network: nn.Module, data: Data, batches: Sequence[Tensor], rate: float, level: float, *, search: bool
) -> Record:
    """Train by plain gradient descent until a share of the held-out samples is classified rightly.

    Args:
        network: in training mode.
        data: what it learns from; the level is asked of validation data in a search, else of test data.
        batches: indices of the samples of each step, all that it may take.
        rate: learning rate.
        level: the share, asked after each `LEVEL_EVERY` steps.
        search: whether it serves to choose a rate.

    Returns:
        status: finished or diverged; reached: whether the level was; steps: until then, or the whole budget;
        log_steps: their log10; log_seconds: log10 of the seconds of training until then, None where it was not
        reached; cost: the steps, and more with each wrong answer where it was not reached, to choose a rate by.
    """
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    held = (data.validation_x, data.validation_y) if search else (data.test_x, data.test_y)
    held_x, held_y = map(torch.from_numpy, held)
    accuracy, seconds, loss, step, began = 0.0, 0.0, 0.0, 0, time.perf_counter()
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    for step, loss in enumerate(fit_steps(network, x, y, batches, optimizer), 1):
        if step % LEVEL_EVERY == 0 and math.isfinite(loss):
            seconds += time.perf_counter() - began
            accuracy = evaluate(network, held_x, held_y)[0]
            if accuracy >= level:
                break
            began = time.perf_counter()
    reached = accuracy >= level
    steps = step if reached else len(batches)
    return {
        "status": find_status(loss),
        "reached": reached,
        "steps": steps,
        "log_steps": math.log10(steps),
        "log_seconds": math.log10(seconds) if reached else None,
        "cost": steps if reached else steps * (2 - accuracy),
    }


def find_status(loss: float) -> str:
    """How a training ended, by its last loss."""
    return "finished" if math.isfinite(loss) else "diverged"


@contextlib.contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Look at a network without gradients and without leaving a trace: mode, buffers and random state come back."""
    modes = [(module, module.training) for module in network.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield
        for buffer, before in buffers:
            buffer.copy_(before)
    for module, training in modes:
        module.training = training


def observe(network: nn.Module, module: nn.Module, x: Tensor, *, training: bool = False) -> Tensor:
    """What a module of the network gives for samples x; in evaluation mode unless asked."""
    seen: list[Tensor] = []
    with untouched(network):
        network.train(training)
        hook = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            network(x)
        finally:
            hook.remove()
    return seen[-1]


def evaluate(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    batch: int = EVALUATION_BATCH,
    training: bool = False,
    by_batch: bool = False,
) -> tuple[float, float | None]:
    """Share of right answers and mean cross-entropy (None where it is not finite); in evaluation mode unless asked.

    Args:
        network: comes back as it was.
        x, y: samples and labels.
        batch, training, by_batch: as `predict` has them.
    """
    logits = predict(network, x, batch=batch, training=training, by_batch=by_batch)
    # NaN outputs answer nothing, so they are never right.
    right = int(((logits.argmax(1) == y) & logits.isfinite().all(1)).sum())
    return right / len(x), finite(functional.cross_entropy(logits, y).item())


def predict(
    network: nn.Module,
    x: Tensor,
    *,
    batch: int = EVALUATION_BATCH,
    training: bool = False,
    by_batch: bool = False,
    lengths: Tensor | None = None,
) -> Tensor:
    """Outputs for all samples, batch by batch; in evaluation mode unless asked. The network stays as it was.

    Args:
        network: comes back as it was.
        x: samples.
        batch: samples of a forward; with statistics of the batch, one that is left over joins those before it.
        training: whether everything is in training mode.
        by_batch: whether batch norms normalize by the batch, while all else is as `training` says.
        lengths: of padded samples, where the network takes them.
    """
    with untouched(network):
        network.train(training)
        if by_batch:
            for norm in find_batch_norms(network):
                norm.train()
        parts = [slice(*ends) for ends in cut(len(x), batch, 2 if training or by_batch else 1)]
        return torch.cat([call(network, x, part, lengths) for part in parts])


def cut(count: int, size: int, least: int) -> list[tuple[int, int]]:
    """Begin and end of each `size` of `count` samples; fewer than `least` at the end join those before."""
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] < least:
        starts.pop()
    return list(zip(starts, [*starts[1:], count]))


def find_batch_norms(network: nn.Module) -> list[nn.Module]:
    """Its batch norms, whose kinds are all subclasses of torch's."""
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def finite(value: float) -> float | None:
    """The value, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None
