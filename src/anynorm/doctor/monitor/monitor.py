"""`Monitor`: watches the norms of a model while it trains, a step in fifty, and warns of what goes wrong.

One hook on the model counts its training forwards. Hooks on the norms are there in measured steps alone, so that the
others cost a comparison.
"""

from __future__ import annotations

import math
import sqlite3
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from ...surgery.recalibration.norms import is_lazy
from ...surgery.report import describe
from ...torch_private import count_transforms, find_backward, is_recording
from .alarms import Alarms, write_messages
from .files import Output, Scalars, list_facts, open_output
from .hook import Hook
from .measure import Evidence, Tally
from .norms import find_compiled, find_gamma, find_norms, find_rank
from .record import Record

Found = TypeVar("Found")


class Monitor:
    """Measures every norm of a model in one training step of `every`, writes it down, and warns of what goes wrong.

    A step is a forward of the model in training mode with gradients. In a measured step are found, for each norm: mean
    and deviation of its input; of a batch norm the gap between batch and running statistics, how noisy the batch's are,
    and channels that hardly vary; the range of gamma; the norm of gamma's gradient; and what is NaN or infinite.
    Padding that the norm is told of counts nowhere. Outputs, gradients, random numbers and running averages are what
    they would be without it.

    A problem of a layer is warned of once. `anynorm monitor FILE` shows a file as a table and draws it.

    Args:
        model: any module; wrapped by DistributedDataParallel or torch.compile it is given as it will be called. What
            runs compiled is measured by its running averages, gamma and gradients alone. With several ranks the first
            one measures, its share of the batch.
        file: where to write, new: SQLite (.sqlite, .db) or .csv. The columns are the fields of a record.
        every: steps from one measured step to the next; the first one is measured.
        writer: has `add_scalar(tag, value, step)`, as TensorBoard's SummaryWriter.
        warn: whether to warn; records say in any case what would be warned of.
        manual: no hook on the model counts; the training loop calls `begin_step` and `end_forward`. For models that are
            not called as a whole.
        overwrite: whether `file` may be there already.

    Attributes:
        step: how many steps were counted.
        records: those of the last measured step, by layer, in the order in which the norms were called.

    Raises:
        ValueError: `every` below 1, a model without norms, one compiled in place, or another suffix.
        FileExistsError: the file is there.

    Warns:
        UserWarning: see docs/monitor.md for each problem and its remedy; and at `close` where no step was seen.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        >>> with anynorm.Monitor(model, every=10) as monitor:
        ...     for _ in range(20):
        ...         model(torch.randn(64, 3)).sum().backward()
        >>> monitor.step, monitor.records["1"].step
        (20, 10)
    """

    def __init__(
        self,
        model: nn.Module,
        file: str | Path | None = None,
        every: int = 50,
        *,
        writer: Any = None,
        warn: bool = True,
        overwrite: bool = False,
        manual: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"Monitor: every must be at least 1; got {every}")
        if getattr(model, "_compiled_call_impl", None) is not None and not manual:
            raise ValueError(
                "Monitor: the model must not be compiled in place, since model.compile() takes hooks into its graph; "
                "give what torch.compile(model) returns, and call that"
            )
        self.norms: dict[str, Any] = find_norms(model)
        if not self.norms:
            raise ValueError(f"Monitor: the model must have a norm; got none in {describe(type(model))}")
        self.every, self.warn, self.manual = every, warn, manual
        self.step: int = 0
        self.records: dict[str, Record] = {}
        self._next = 0  # the step that has more to do than to count
        self._measured = -1
        self._tallies: dict[str, Tally] = {}
        self._seen: list[str] = []  # the norms that were called, in order
        self._compiled: set[nn.Module] = set()
        self._alarms = Alarms()
        self._pending: dict[str, Any] = {}  # hooks of gammas whose gradient has not come
        self._is_written = True
        self._handles: list[Any] = []
        self._outputs: list[Output] = []
        self._root: Any = None
        self._model = model
        self.is_open: bool = find_rank() == 0
        if self.is_open:
            self._outputs += [] if file is None else [open_output(file, list_facts(model, every), overwrite)]
            self._outputs += [] if writer is None else [Scalars(writer)]
            self._root = None if manual else model.register_forward_pre_hook(Hook(self._count))

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._close(complains=kind is None)

    def close(self) -> None:
        """Write what is left, and let go of the model and the file; a second call does nothing."""
        self._close(complains=True)

    def _close(self, complains: bool) -> None:
        if not self.is_open:
            return
        self.is_open = False
        if self._root is not None:
            self._root.remove()
        self.end_forward()
        messages = self._finish_gradients()
        while self._outputs:
            self._outputs.pop().close()
        if not self.step and complains:
            messages.append(
                "anynorm.Monitor: no training step was seen: the model that it was given was not called in training "
                "mode with gradients; give it what you call, such as what torch.compile returned"
            )
        self._speak(messages)

    def _count(self, model: nn.Module, args: Any) -> None:
        """Before each call of the model."""
        if not model.training or not torch.is_grad_enabled() or find_backward() != -1:
            return
        if count_transforms() == 0 and not is_recording():
            self.begin_step()

    def begin_step(self) -> None:
        """Count a training step, and measure the norms that are called until `end_forward` if it is its turn."""
        step = self.step
        self.step = step + 1
        if step >= self._next and self.is_open:
            self._turn(step)

    def _turn(self, step: int) -> None:
        """The step after a measured one, or one to measure."""
        self._detach()  # what an interrupted step has left
        self._tallies = {}
        is_due = step % self.every == 0
        messages = self._finish_gradients() if is_due or not self._pending else []
        if is_due:
            self._attach(step)
            self._next = step + 1
        else:
            self._next = step - step % self.every + self.every
        self._speak(messages)

    def _attach(self, step: int) -> None:
        self._measured, self._seen, self._compiled = step, [], find_compiled(self._model)
        if not self.manual:
            self._handles.append(self._model.register_forward_hook(Hook(self._end), always_call=True))
        for name, norm in self.norms.items():
            if norm not in self._compiled:
                hook = Hook(partial(self._measure, name))
                self._handles.append(norm.register_forward_pre_hook(hook, with_kwargs=True))
            if not is_lazy(norm):
                self._begin(name)

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, name: str) -> None:
        tally = self._try(name, partial(Tally, self.norms[name]))
        if tally is not None:
            self._tallies[name] = tally

    def _try(self, name: str, call: Callable[[], Found]) -> Found | None:
        """What cannot be measured must not end a training."""
        try:
            with torch.no_grad():
                return call()
        except Exception as problem:
            self._speak(write_messages(self._alarms.note_unmeasured(name, self.norms[name], problem)))
            return None

    def _measure(self, name: str, norm: nn.Module, args: Any, kwargs: Any) -> None:
        """One call of a norm, in a measured step."""
        if name not in self._tallies:  # it was lazy
            self._begin(name)
        if name in self._tallies:
            self._seen += [name] if name not in self._seen else []
            self._try(name, partial(self._tallies[name].add, args, kwargs))

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        """After the forward of a measured step, also one that failed."""
        self.end_forward()

    def end_forward(self) -> None:
        """Finish what `begin_step` began to measure, if it did: before backward, which may call norms once more."""
        if not self._handles:
            return
        self._detach()
        tallies, self._tallies = self._tallies, {}
        evidence: dict[str, Evidence | None] = {}
        self.records, self._is_written = {}, False
        for name in (*self._seen, *(name for name in tallies if name not in self._seen)):
            # A norm that no hook saw is known by its averages, where those have moved.
            if name in self._seen or self.norms[name] in self._compiled or tallies[name].has_moved():
                found = self._try(name, partial(tallies[name].finish, self._measured, name))
                if found is not None:
                    self.records[name], evidence[name] = found
        for name in self.records:
            gamma, _ = find_gamma(self.norms[name])
            if gamma is not None and gamma.requires_grad and gamma.is_leaf:
                self._pending[name] = gamma.register_hook(Hook(partial(self._take_gradient, name)))
        self._speak(write_messages(self._alarms.look([*self.records.values()], self.norms, evidence)))

    def _take_gradient(self, name: str, gradient: Tensor) -> None:
        """The first gradient of gamma after the measured forward."""
        handle = self._pending.pop(name, None)
        if handle is not None:
            handle.remove()
            size = float(gradient.detach().double().norm())
            self.records[name].gradient = size
            if not math.isfinite(size):  # not warned of: a gradient scaler makes such on purpose
                self.records[name].note("nonfinite", "gradient")

    def _finish_gradients(self) -> list[str]:
        """Write the records of the last measured step, with those gradients that have come; what is to be said."""
        while self._pending:
            self._pending.popitem()[1].remove()
        if self._is_written:
            return []
        self._is_written = True
        records = [*self.records.values()]
        messages = write_messages(self._alarms.look_at_gradients(records))
        for output in [*self._outputs]:
            try:
                output.write(records)
            except (OSError, sqlite3.Error) as problem:  # A full disk must not end a training.
                self._outputs.remove(output)
                messages.append(f"anynorm.Monitor: the file could not be written, and is no more: {problem}")
        return messages

    def _speak(self, messages: list[str]) -> None:
        for message in messages if self.warn else []:
            warnings.warn(message, stacklevel=2)
