"""Repairs that several checks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...randomness import keep_randomness
from ...surgery.recalibration.recalibrate import recalibrate
from ..check import Repair
from ..facts import Facts, NormFacts
from ..passes import keeping_modes, set_mode

PASSES = 2  # of training on
MOST_PASSES = 24  # over the batches: as many as there are norms, where each is to see what it sees in evaluation


def set_attribute(norm: NormFacts, name: str, value: Any) -> Repair:
    """Set a norm's attribute, which evaluation does not read."""
    return Repair(f"{norm.path}.{name} = {value!r}", lambda: setattr(norm.module, name, value), is_exact=True)


def make_recalibration(facts: Facts, first: Repair | None = None) -> Repair | None:
    """Find all averages anew from the batches, after another repair where there is one; None, or that, without data."""
    if not facts.has_data:
        return first
    inputs = facts.inputs
    earlier = "population" if len(facts.averaging) <= MOST_PASSES else "batch"

    def perform() -> None:
        if first is not None:
            first.perform()
        model = inputs.inside
        forward = None if inputs.forward_fn is None else inputs.forward_fn
        with keeping_modes(model):
            set_mode(model, training=False, dropout=False)
            recalibrate(model, inputs.batches, forward_fn=forward, earlier=earlier, progress=False)

    code = f"model.eval()\nanynorm.recalibrate(model, loader, earlier={earlier!r})"
    return Repair(code if first is None else f"{first.code}\n{code}", perform)


def make_retraining(facts: Facts) -> Repair | None:
    """Train on for some passes over the batches, mixed; None without an optimizer, or where batches cannot be mixed.

    The learning rate and everything else is the optimizer's.
    """
    inputs, optimizer = facts.inputs, facts.inputs.optimizer
    mixed, size = mix(inputs.batches), facts.evaluation.size
    if optimizer is None or mixed is None or facts.evaluation.loss is None:
        return None

    def perform() -> None:
        model = inputs.inside
        with keeping_modes(model), keep_randomness(), torch.enable_grad():
            set_mode(model, training=True, dropout=True)
            for _ in range(PASSES):
                for batch in mixed(len(inputs.batches)):
                    optimizer.zero_grad()
                    inputs.find_loss(batch).backward()
                    optimizer.step()
            optimizer.zero_grad()

    code = (
        f"loader = torch.utils.data.DataLoader(loader.dataset, batch_size={size}, shuffle=True)\n"
        f"for _ in range({PASSES}):\n    for x, y in loader:\n        optimizer.zero_grad()\n"
        "        loss_fn(model(x), y).backward()\n        optimizer.step()"
    )
    return Repair(code, perform)


def mix(batches: list[Any]) -> Callable[[int], Iterator[Any]] | None:
    """What gives the samples of batches in as many others, in a random order; None where they are not pairs of tensors
    of equal shapes."""
    pairs = [batch for batch in batches if type(batch) in (tuple, list) and len(batch) == 2]
    if len(pairs) != len(batches) or not all(isinstance(t, Tensor) for pair in pairs for t in pair):
        return None
    if len({(x.shape[1:], y.shape[1:]) for x, y in pairs}) != 1:
        return None
    x, y = (torch.cat([pair[place] for pair in pairs]) for place in (0, 1))

    def draw(count: int) -> Iterator[Any]:
        for part in torch.randperm(len(x), device="cpu").chunk(count):
            yield x[part], y[part]

    return draw
