"""TENT: gamma and beta learn to make a model's predictions sure, batch by batch, without labels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ...errors import UserError
from .adaptation import Adaptation, put_back
from .judge import find_logits

Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Tent(Adaptation):
    """A model that adapts while it predicts, made by ``anynorm.adapt(model, "tent")``.

    Each call normalizes by the statistics of its batch, takes one step on gamma and beta of the batch norms that
    lowers the mean entropy of the predictions, -sum of p log p over classes, and returns the predictions from before
    the step, without gradient. Predictions are softmax of the output, or of what it calls logits, over axis 1.

    Gamma and beta stay as they have become until `reset`, or the end of a ``with`` block, give them back as they were.
    Nothing else of the model changes: no other parameter, no running average, no mode, no gradient that was there.

    Source:
        Wang et al. 2021, arXiv:2006.10726.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)).eval()
        >>> tent = anynorm.adapt(model, "tent", optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        >>> logits = tent(torch.randn(64, 4))
        >>> bool((model[0].weight == 1).all())
        False
        >>> tent.reset()
        >>> bool((model[0].weight == 1).all())
        True
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, model: nn.Module, optimizer: Factory | None, trust: tuple[type[nn.Module], ...]) -> None:
        super().__init__(model, 0, trust)
        self._make = make_adam if optimizer is None else optimizer
        own = (norm._parameters.get(name) for norm in self._kinds for name in ("weight", "bias"))
        self._parameters = list(dict.fromkeys(p for p in own if p is not None))
        if not self._parameters:
            raise UserError(
                "adapt: tent moves gamma and beta of batch norms; got norms without parameters of their own "
                "(affine=False, or parametrized); use method='batch'"
            )
        self._source = [(p, p.detach().clone()) for p in self._parameters]
        self.optimizer = self._make(self._parameters)

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Predict, and take a step; arguments and result are the model's."""
        with ExitStack() as stack:
            if self._stack is None:
                self._open_statistics(stack)
            # As a user may predict in no_grad or inference_mode, whose tensors no graph can keep.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(wanting_gradients(self._parameters))
            output = self._inside(*map(leave_inference, args), **{key: leave_inference(t) for key, t in named.items()})
            logits = find_logits(output)
            if logits is None:
                raise UserError(
                    f"adapt: tent needs logits (N, classes, ...); got {type(output).__name__}; wrap the model so that "
                    "it returns them"
                )
            entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
            gradients = torch.autograd.grad(entropy, self._parameters, allow_unused=True)
        self._step(entropy, gradients)
        return output.detach() if isinstance(output, Tensor) else output

    def _step(self, entropy: Tensor, gradients: tuple[Tensor | None, ...]) -> None:
        """Move gamma and beta; the gradients that they had are the caller's."""
        if not entropy.isfinite():
            warnings.warn("adapt: tent takes no step on a batch whose predictions are NaN or Inf", stacklevel=3)
            return
        before = [p.grad for p in self._parameters]
        try:
            for p, gradient in zip(self._parameters, gradients, strict=True):
                p.grad = gradient
            self.optimizer.step()
        finally:
            for p, gradient in zip(self._parameters, before, strict=True):
                p.grad = gradient

    def reset(self) -> None:
        """Give gamma and beta back as they were when this was made, and begin with a new optimizer."""
        put_back(self._source)
        self.optimizer = self._make(self._parameters)

    def _open(self, stack: ExitStack) -> None:
        stack.callback(self.reset)
        self._open_statistics(stack)


def make_adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The paper's optimizer for small images."""
    return torch.optim.Adam(parameters, lr=1e-3)


def leave_inference(value: Any) -> Any:
    """A tensor that a graph can keep."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


@contextmanager
def wanting_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let parameters ask for gradients, also frozen ones."""
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag in zip(parameters, before, strict=True):
            p.requires_grad_(flag)
