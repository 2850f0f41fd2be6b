"""Training and measuring, as every study does it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

MOMENTUM = 0.9
EVALUATION_BATCH = 500

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
    return network(x[chosen]) if lengths is None else network(x[chosen], lengths[chosen])


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


def evaluate(
    network: nn.Module, x: Tensor, y: Tensor, *, batch: int = EVALUATION_BATCH, training: bool = False
) -> tuple[float, float | None]:
    """Share of right answers and mean cross-entropy (None where it is not finite); in evaluation mode unless asked."""
    logits = predict(network, x, batch=batch, training=training)
    # NaN outputs answer nothing, so they are never right.
    right = int(((logits.argmax(1) == y) & logits.isfinite().all(1)).sum())
    return right / len(x), finite(functional.cross_entropy(logits, y).item())


def predict(
    network: nn.Module,
    x: Tensor,
    *,
    batch: int = EVALUATION_BATCH,
    training: bool = False,
    lengths: Tensor | None = None,
) -> Tensor:
    """Outputs for all samples, batch by batch; in evaluation mode unless asked. The network stays as it was."""
    with untouched(network):
        network.train(training)
        parts = [slice(start, start + batch) for start in range(0, len(x), batch)]
        return torch.cat([call(network, x, part, lengths) for part in parts])


def finite(value: float) -> float | None:
    """The value, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None
