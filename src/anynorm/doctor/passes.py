"""The batches through the model in one mode: losses, and what reached each norm. Nothing of the model changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, nan
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..modules.frozen import Frozen
from ..randomness import keep_randomness
from ..statistics import Moments
from ..surgery.differences import find_tensors
from ..surgery.recalibration.norms import find_input, find_input_moments, keeping
from ..surgery.recalibration.statistics import Population, merge_groups
from .call import in_one_line
from .inputs import Inputs, Score
from .norms import find_norms


@dataclass
class Seen:
    """What reached one norm, batch by batch.

    Attributes:
        moments: of its channels, for norms with running averages; a batch is one entry.
        noise: the standard error of a batch's mean, as its samples differ, in std; (C,) for each batch.
        shapes: of the inputs.
        calls: in the batch that called it most.
        by_call: moments of all batches, for the first, second ... call in a batch.
        largest: the largest absolute value.
        dtypes: of the inputs.
        values: of each channel of its output, over all batches.
        nonfinite: how many values were NaN or Inf.
        highest: of each channel of its output, where axis 1 has channels.
        example: the first input.
        masked: whether a mask came with one.
    """

    moments: list[Moments] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    calls: int = 0
    by_call: list[Moments] = field(default_factory=list)
    largest: float = 0.0
    dtypes: set[torch.dtype] = field(default_factory=set)
    values: int = 0
    nonfinite: int = 0
    highest: Tensor | None = None
    example: Tensor | None = None
    masked: bool = False
    _now: Moments | None = None
    _calls: int = 0

    def end_batch(self) -> None:
        """All calls of a batch are one entry."""
        if self._now is not None:
            self.moments.append(self._now)
        self.calls = max(self.calls, self._calls)
        self._now, self._calls = None, 0

    def merge(self) -> Population | None:
        """All batches together, with standard errors."""
        return merge_groups(self.moments, len(self.moments))


@dataclass
class Pass:
    """The batches in one mode.

    Attributes:
        seen: by the names of norms that were called.
        scores: of each batch.
        problem: what a batch raised, in a line; "" for nothing. The pass ended there.
        size: samples in the first batch; 0 where that is not known.
    """

    seen: dict[str, Seen] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    problem: str = ""
    size: int = 0

    @property
    def losses(self) -> list[float]:
        """Of the batches."""
        return [score.loss for score in self.scores if score.loss is not None]

    @property
    def loss(self) -> float | None:
        """The mean of the batches'."""
        return fmean(self.losses) if self.losses else None

    @property
    def accuracy(self) -> float | None:
        """The mean of the batches'."""
        found = [score.accuracy for score in self.scores if score.accuracy is not None]
        return fmean(found) if found else None


def find_excess(one: Pass, other: Pass) -> tuple[float, float]:
    """How much larger the loss of one pass is, on average over batches, and the standard error of that."""
    pairs = zip(one.scores, other.scores, strict=False)
    return find_mean([a.loss - b.loss for a, b in pairs if a.loss is not None and b.loss is not None])


def find_mean(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error; 0 for no value, and NaN where one is NaN or infinite."""
    if not values:
        return 0.0, 0.0
    if not all(map(isfinite, values)):
        return nan, nan  # of which the standard library's `stdev` makes an error
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def find_gain(one: Pass, other: Pass) -> tuple[float, float]:
    """How much higher the accuracy of the other pass is, on average over batches, and the standard error of that."""
    pairs = zip(one.scores, other.scores, strict=False)
    return find_mean([b.accuracy - a.accuracy for a, b in pairs if a.accuracy is not None and b.accuracy is not None])


def run_pass(
    inputs: Inputs,
    training: bool,
    dropout: bool = True,
    prepare: Callable[[], object] | None = None,
    records: bool = True,
    limit: int | None = None,
) -> Pass:
    """Feed the batches to the model.

    Args:
        inputs: model and batches.
        training: in training mode, as ``model.train()`` sets it, but nothing is updated; else in evaluation.
        dropout: whether it drops what it drops in training.
        prepare: called when the modes are set; may change modes and buffers, which are put back.
        records: whether to look at the inputs of norms.
        limit: of batches.
    """
    found = Pass()
    model = inputs.inside
    with ExitStack() as stack:
        stack.enter_context(keep_randomness())
        stack.enter_context(keeping_modes(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        set_mode(model, training, dropout)
        stack.enter_context(keeping(model))
        if prepare is not None:
            prepare()
        if records:
            for name, norm in find_norms(model).items():
                seen = found.seen.setdefault(name, Seen())
                stack.callback(norm.register_forward_pre_hook(partial(look, seen), with_kwargs=True).remove)
                stack.callback(norm.register_forward_hook(partial(look_behind, seen)).remove)
        for batch in inputs.batches[:limit]:
            try:
                found.scores.append(inputs.run(batch))
            except Exception as problem:  # the user's model and data; what it says is a finding
                found.problem = in_one_line(problem)
                break
            finally:
                for seen in found.seen.values():
                    seen.end_batch()
    found.seen = {name: seen for name, seen in found.seen.items() if seen.calls}
    found.size = next((shape[0] for seen in found.seen.values() for shape in seen.shapes if shape), 0)
    return found


def set_mode(model: nn.Module, training: bool, dropout: bool) -> None:
    """As the user would; a dropout that is not wanted is in evaluation."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and not dropout:
            module.training = False


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Every module's mode is afterwards as before; `train` is called to set one and not to put it back."""
    before = [(module, module.training) for module in model.modules()]
    frozen = [
        (state, state.training) for module, _ in before if isinstance(state := vars(module).get("frozen"), Frozen)
    ]
    wanted = [(p, p.requires_grad) for p in model.parameters()]  # which a model's own `train` may change
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
        for state, training in frozen:
            state.training = training
        for p, flag in wanted:
            if p.requires_grad != flag:
                p.requires_grad_(flag)


def look(seen: Seen, norm: Any, args: Any, kwargs: Any) -> None:
    """What a norm is given."""
    seen._calls += 1
    x, mask = find_input(norm, args, kwargs)
    seen.masked |= mask is not None
    if not isinstance(x, Tensor) or x.is_nested or not x.is_floating_point() or not x.numel():
        return
    if len(seen.shapes) < 64:
        seen.shapes.append(tuple(x.shape))
    seen.dtypes.add(x.dtype)
    if mask is not None:
        x = x.masked_fill(mask == 0, 0)  # what stands at padding counts in nothing
    largest = float(x.abs().amax())
    if not largest < float("inf"):
        seen.nonfinite += int((~x.isfinite()).sum())
        return
    seen.largest = max(seen.largest, largest)
    average = norm._buffers.get("running_mean")
    if average is None or x.dim() < 2 or x.shape[1] != average.numel():
        return
    moments = find_input_moments(average.numel(), x, mask)
    if moments is None:
        return
    if seen._calls > len(seen.by_call):
        seen.by_call.append(moments)
    else:
        seen.by_call[seen._calls - 1] = seen.by_call[seen._calls - 1].merge(moments)
    seen._now = moments if seen._now is None else seen._now.merge(moments)
    if len(x) > 1:
        means = x.flatten(2).mean(2) if x.dim() > 2 else x
        var = moments.m2 / max(int(moments.count), 1)
        error = (means.double().var(0).cpu() / len(x)).sqrt()
        seen.noise.append(error / (var + norm.eps).sqrt())
    if seen.example is None:
        seen.example = x.detach().clone()


def look_behind(seen: Seen, norm: Any, args: Any, output: Any) -> None:
    """What a norm returns."""
    for _, y in find_tensors(output):
        if y.dim() >= 2 and y.is_floating_point() and y.numel():
            highest = y.detach().transpose(0, 1).flatten(1).amax(1)
            known = seen.highest
            seen.values += y.numel() // y.shape[1]
            seen.highest = highest if known is None or known.shape != highest.shape else torch.maximum(known, highest)
        break
