"""What `diagnose` was given: the model, some batches, how the model is called and how its outputs are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..surgery.recalibration.data import call_model, find_device, move, unwrap
from .call import find_tensors


@dataclass(frozen=True)
class Score:
    """One batch: its mean loss, the share of right answers, and its outputs' first tensor; None where not known."""

    loss: float | None
    accuracy: float | None
    output: Tensor | None


@dataclass
class Inputs:
    """What `diagnose` was given.

    Attributes:
        model: as given.
        inside: without DistributedDataParallel and torch.compile.
        batches: of the loader, in its order.
        loader: where they are from; None where there was none.
        optimizer: of the training, or None.
        loss_fn: of (outputs, targets); None for cross entropy where outputs and targets are of classes, and for the
            outputs' own ``loss`` where they have one.
        forward_fn: calls the model with a batch and returns its outputs.
    """

    model: nn.Module
    batches: list[Any] = field(default_factory=list)
    loader: Any = None
    optimizer: torch.optim.Optimizer | None = None
    loss_fn: Callable[[Any, Any], Any] | None = None
    forward_fn: Callable[[nn.Module, Any], Any] | None = None

    @property
    def inside(self) -> nn.Module:
        """The model that is examined."""
        return unwrap(self.model)

    def run(self, batch: Any) -> Score:
        """Call the model with a batch, as it stands, and judge its outputs."""
        outputs, targets = self.call(batch)
        first, loss, accuracy = find_first(outputs), self.judge(outputs, targets), None
        if are_classes(first, targets):
            assert first is not None
            is_padded = targets == -100
            right = (first.argmax(1) == targets) & ~is_padded
            accuracy = float(right.sum()) / max(int((~is_padded).sum()), 1)
        return Score(None if loss is None else float(loss), accuracy, None if first is None else first.detach())

    def call(self, batch: Any) -> tuple[Any, Any]:
        """The model's outputs for a batch, and the batch's targets."""
        given = move(batch, find_device(self.inside))
        return (self.forward_fn or call_model)(self.inside, given), find_targets(given)

    def judge(self, outputs: Any, targets: Any) -> Tensor | float | None:
        """The loss; None where nobody knows it."""
        if self.loss_fn is not None:
            loss: Tensor | float = self.loss_fn(outputs, targets)
            return loss
        if isinstance(own := getattr(outputs, "loss", None), Tensor):
            return own
        first = find_first(outputs)
        return F.cross_entropy(first.float(), targets) if first is not None and are_classes(first, targets) else None

    def find_loss(self, batch: Any) -> Tensor:
        """The loss of a batch, with its graph."""
        loss = self.judge(*self.call(batch))
        assert isinstance(loss, Tensor)
        return loss


def find_first(outputs: Any) -> Tensor | None:
    """The first tensor of floating-point numbers among outputs."""
    return next((t for t in find_tensors(outputs) if t.is_floating_point() and t.dim()), None)


def find_targets(batch: Any) -> Any:
    """The second of a tuple's elements; a dict's ``labels``, ``label``, ``targets`` or ``target``; else None."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in ("labels", "label", "targets", "target") if key in batch), None)
    return batch[1] if type(batch) in (tuple, list) and len(batch) > 1 else None


def are_classes(outputs: Tensor | None, targets: Any) -> bool:
    """Whether outputs are scores of classes, (N, C, ...), and targets their numbers, (N, ...)."""
    if outputs is None or not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        return False
    fits = outputs.dim() == targets.dim() + 1 and outputs.shape[:1] + outputs.shape[2:] == targets.shape
    return fits and bool(targets.numel()) and int(targets.max()) < outputs.shape[1] and int(targets.min()) >= -100
