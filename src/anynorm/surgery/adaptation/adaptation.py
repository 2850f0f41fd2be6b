"""The context in which a model is adapted, by the statistics of its batches or of a loader's data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn as nn

from ...errors import UserError
from ...sources import OVERRIDE, overriding
from ..recalibration.data import unwrap
from ..recalibration.norms import BASES
from ..recalibration.recalibrate import recalibrate
from ..report import SurgeryReport
from .eager import running_eagerly
from .judge import Judge
from .norms import borrowing, plan_norms
from .statistics import AdaptedStatistics


class Adaptation:
    """What `adapt` returns: a context in which a model is adapted; after it the model is as before.

    Attributes:
        model: the one that was given.
        report: which norms are adapted, and which are left and why.
    """

    model: nn.Module
    report: SurgeryReport

    def __init__(self, model: nn.Module, prior: float, trust: tuple[type[nn.Module], ...]) -> None:
        self.model, self.report = model, SurgeryReport(model=model)
        self._inside = unwrap(model)
        self._kinds = plan_norms(self._inside, trust, self.report)
        if not self.report.changed:
            reasons = "; ".join(
                f"{entry.name or 'the model'} was left: {entry.reason}" for entry in self.report.left[:1]
            )
            raise UserError(
                "adapt: the model must have a batch norm with running averages; got none"
                f"{f' ({reasons})' if reasons else ''}; other norms take their statistics from each sample anyway"
            )
        self._warn_of_left()
        names = {norm: entry.name or "the model" for norm, entry in zip(self._kinds, self.report.changed, strict=True)}
        self._judge = Judge()
        self._statistics = AdaptedStatistics(names, prior, self._judge)
        self._stack: ExitStack | None = None

    def _warn_of_left(self) -> None:
        """Say which batch norms go on with their running averages, for nobody reads the report of a context."""
        modules = dict(self._inside.named_modules())
        left = [entry for entry in self.report.left if is_tracking(modules[entry.name])]
        if left:
            warnings.warn(
                f"adapt: {len(left)} batch norms keep their running averages; the first is {left[0].name} "
                f"({left[0].kind}): {left[0].reason}; anynorm.register tells what a class computes",
                stacklevel=4,
            )

    def __enter__(self) -> Any:
        if self._stack is not None:
            raise RuntimeError("adapt: a context can be entered once at a time; call anynorm.adapt again for another")
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        stack, self._stack = self._stack, None
        assert stack is not None
        stack.close()

    def _open(self, stack: ExitStack) -> None:
        """Enter all that the method needs."""
        self._open_statistics(stack)

    def _open_statistics(self, stack: ExitStack) -> None:
        """Enter what the statistics of batches need."""
        if torch.compiler.is_compiling():
            raise RuntimeError("adapt: a compiled graph cannot change its statistics; enter it outside torch.compile")
        stack.enter_context(running_eagerly())
        stack.enter_context(borrowing(self._kinds))
        stack.callback(self._inside.register_forward_hook(self._see, with_kwargs=True).remove)
        stack.enter_context(overriding(self._statistics))

    def _see(self, model: nn.Module, args: Any, named: Any, output: Any) -> None:
        if OVERRIDE.get() is self._statistics:  # another thread's call is its own matter
            self._judge.see_call(model, args, named, output)


class Recalibrated(Adaptation):
    """`adapt` by AdaBN: in the context the running averages are those of the loader's data."""

    def __init__(self, model: nn.Module, loader: Iterable[Any], trust: tuple[type[nn.Module], ...]) -> None:
        super().__init__(model, 0, trust)
        self._loader, self._trust = loader, trust

    def _open(self, stack: ExitStack) -> None:
        buffers = [t for norm in self._kinds for t in norm.buffers()]
        stack.callback(put_back, [(t, t.detach().clone()) for t in buffers])
        recalibrate(self.model, self._loader, trust=self._trust, progress=False)


def is_tracking(module: Any) -> bool:
    """Whether it is a batch norm with running averages."""
    return isinstance(module, BASES) and module.running_mean is not None


def put_back(values: list[tuple[Any, Any]]) -> None:
    """Give tensors the values that they had."""
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(value)
