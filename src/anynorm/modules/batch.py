"""What is remembered: `BatchNorm1d/2d/3d`, and what other norms with running averages share with them.

Constructors, attributes, buffers and state_dict are those of torch.nn, whose classes these are; the numbers are ours.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from ..activations import finish
from ..engine.protocol import look_at
from ..engine.request import Request
from ..errors import check_axes
from ..functional.batch import BATCH_NORM, BATCH_OF_ONE, BatchFront
from ..padding.masks import find_mask, has_real
from ..padding.ragged import close_rows, is_ragged, open_residual, open_rows
from ..sources import BATCH, OVERRIDE, Batch, Exchange, Given, Joined, Merged, Source, find_momentum
from ..statistics import blank
from .counting import NonFiniteGuard, is_counted, mark_counted
from .norm import Norm, read_entry
from .recomputation import read_or_replay

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import TorchBatchNormKeywords


class _Running(Norm):
    """What the mix-ins here ask of a class, so that torch's subclasses and the fused classes share them."""

    _axes: tuple[int, ...]
    num_features: int
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    weight: Any  # Tensor | None; every class of torch's declares it in its own way
    bias: Any
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def reset_running_stats(self) -> None:
        """Set mean 0, variance 1 and the counter 0; those of a frozen norm stay: `swa_utils.update_bn` resets all."""
        if self.frozen is None or not self.frozen.updates:
            super().reset_running_stats()  # type: ignore[misc] # of the class beside it

    def _check_input_dim(self, input: Tensor) -> None:
        if type(input) is not Tensor or input.dim() not in self._axes:
            check_axes(input, self._axes)


# The first of each is what torch does.
CHOICES = {"on_single": ("error", "running", "skip"), "on_nonfinite": ("propagate", "skip", "error")}


class _BatchNorm(_Running):
    """What batch norm does at a call; ghost, renorm and sync batch norm override parts of it."""

    front: ClassVar[BatchFront] = BATCH_NORM
    on_single = "error"
    on_nonfinite = "propagate"
    nonfinite_batches = 0

    def normalize(
        self, input: Any, residual: Any = None, activation: Any = None, mask: Any = None, lengths: Any = None
    ) -> Any:
        """Find the source, normalize, count the batch."""
        # In few frames: a call of a function costs as much as the arithmetic of a small batch.
        is_jagged = type(input) is not Tensor and is_ragged(input)
        if not is_jagged:
            self._check_input_dim(input)  # torch's hook: subclasses override it
        override = None if torch.compiler.is_compiling() else OVERRIDE.get()
        source: Source | None = None
        if override is not None and (
            self.training or override.in_evaluation or (self.running_mean is None and self.running_var is None)
        ):
            source = override.find_source(self, input, mask, lengths)
        if type(source) is Joined:
            return source.normalize(input, residual, Request(source, self.eps, activation, mask, lengths))
        is_dense = type(input) is Tensor and mask is None and lengths is None
        if self.training and not (is_dense and input.numel() != self.num_features):
            is_part = self.is_part() if source is None else type(source) is Merged
            if not is_part and self._is_single(input, is_jagged, mask, lengths):
                return self._normalize_single(input, residual, activation, mask, lengths)
        is_own = source is None
        moves = is_own and self.training and self.track_running_stats and is_counted(self)
        if source is None:
            source = self.find_source(input, moves)
        request = Request(source, self.eps, activation, mask, lengths, self.find_sizes())
        guard = None
        if (
            moves
            and self.on_nonfinite != "propagate"
            and self.running_mean is not None
            and self.running_var is not None
        ):
            guard = NonFiniteGuard(self, self.running_mean, self.running_var)
        weight, bias = self.read_affine()
        y = self.front.normalize(input, weight, bias, residual, request)
        if guard is not None and guard.restore_if_nonfinite():
            return y
        if moves:  # Last, so that an input that is refused changes nothing.
            counter = read_entry(self, self._buffers, "num_batches_tracked")
            if counter is not None:
                counter.add_(self._count(input, mask, lengths))
            mark_counted(self)
        elif is_own and not self.training and self.frozen is not None and self.frozen.follows():
            self.follow(input, mask, lengths)
        return y

    def follow(self, input: Any, mask: Any, lengths: Any) -> None:
        """Move the running averages by a batch that was normalized by them: `freeze` with ``updates=False``."""
        mean, var, counter = self.running_mean, self.running_var, self.num_batches_tracked
        is_single = self._is_single(input, type(input) is not Tensor and is_ragged(input), mask, lengths)
        if mean is None or is_single or not is_counted(self):
            return
        momentum = find_momentum(None, counter) if self.momentum is None else self.momentum
        guard = NonFiniteGuard(self, mean, var) if self.on_nonfinite != "propagate" and var is not None else None
        with torch.no_grad():
            request = Request(Batch(mean, var, momentum), self.eps, None, mask, lengths, self.find_sizes())
            self.front.normalize(input, None, None, None, request)
            if guard is not None and guard.restore_if_nonfinite():
                return
            if counter is not None:
                counter.add_(self._count(input, mask, lengths))
        mark_counted(self)

    def find_source(self, input: Any, moves: bool) -> Source:
        """Where the statistics of this call come from; `moves`: they move the running averages."""
        buffers = self._buffers
        mean, var = read_entry(self, buffers, "running_mean"), read_entry(self, buffers, "running_var")
        if not self.training and not (mean is None and var is None):
            return Given(mean, var)
        if not moves:
            return BATCH
        momentum = find_momentum(None, self.num_batches_tracked) if self.momentum is None else self.momentum
        return Batch(mean, var, momentum)

    def open_exchange(self, input: Any, moves: bool) -> Exchange | None:
        """What brings this batch together with those of other ranks, where there are any; `moves` as above."""
        return None

    def is_part(self) -> bool:
        """Whether other ranks have parts of the batch in training."""
        return False

    def find_sizes(self) -> Any:
        """What the pattern needs beside x."""
        return None

    def _count(self, input: Any, mask: Any, lengths: Any) -> Any:
        """How many batches this one counts for: 1, or 0 where nothing is real."""
        if mask is None and lengths is None:
            return 1
        real = has_real(mask, lengths)
        return real if isinstance(real, Tensor) else int(real)  # A bool is added more slowly.

    def _is_single(self, input: Any, is_jagged: bool, mask: Tensor | None, lengths: Any) -> bool:
        """Whether a channel has a single value."""
        if is_jagged:
            return len(open_rows("batch_norm", input)) == 1
        x = input if type(input) is Tensor else look_at(input)
        is_one = x.numel() == self.num_features == x.shape[1]
        if mask is None and lengths is None:
            return is_one
        if self.on_single == "error" and not is_one:  # The function counts.
            return False
        found = find_mask("batch_norm", input, (1,), mask, lengths)
        return found is not None and int(found.sum()) == 1

    def _normalize_single(self, input: Any, residual: Any, activation: Any, mask: Any, lengths: Any) -> Any:
        """The output for a batch of one value per channel, by `on_single`; running averages and the counter stay."""
        if self.on_single == "error":
            shape = getattr(input, "shape", (1, self.num_features))
            name = f"{self.label} = " if self.label else ""
            raise ValueError(
                f"{name}{type(self).__name__}({self.num_features}): statistics need more than 1 value per channel, or "
                f"every output is beta; got input {tuple(shape)}; {BATCH_OF_ONE}"
            )
        if self.on_single == "skip":
            return finish_alone(input, activation, residual, mask, lengths)
        if self.running_mean is None:
            raise ValueError(
                f"{type(self).__name__}({self.num_features}): on_single='running' needs running averages; got "
                "track_running_stats=False; choose 'skip' or 'error'"
            )
        given = Given(*read_or_replay(self, (self.running_mean, self.running_var)))
        request = Request(given, self.eps, activation, mask, lengths)
        return BATCH_NORM.normalize(input, self.weight, self.bias, residual, request)


def finish_alone(
    input: Any, activation: Any = None, residual: Any = None, mask: Any = None, lengths: Any = None
) -> Any:
    """activation(input + residual), 0 at padding."""
    if is_ragged(input):
        rows = finish(open_rows("batch_norm", input), activation, open_residual("batch_norm", input, residual))
        return close_rows(rows, input)
    found = find_mask("batch_norm", input, (1,), mask, lengths)
    y = finish(input, activation, residual)
    return y if found is None else blank(y, found > 0)


class _Batch(_BatchNorm):
    """The constructor of torch's batch norms, and two choices that torch does not offer.

    Args:
        on_single: what a batch in training does that has one value per channel, of which every output would be beta:
            ``"error"`` as torch does, ``"running"`` normalizes by the running averages, ``"skip"`` returns the input.
            The running averages do not move.
        on_nonfinite: what becomes of a batch in training that would make the running averages NaN or Inf:
            ``"propagate"`` lets it, as torch does; ``"skip"`` leaves averages and counter as they were, counts it in
            `nonfinite_batches` and warns once, naming the layer, while the output stays what the formula gives, so
            that a gradient scaler sees it; ``"error"`` raises FloatingPointError, with nothing changed.
    """

    def __init__(
        self,
        num_features: int,
        *arguments: Any,  # torch's others, by place
        on_single: str = "error",
        on_nonfinite: str = "propagate",
        **options: Unpack[TorchBatchNormKeywords],
    ) -> None:
        super().__init__(num_features, *arguments, **options)
        for name, choice in (("on_single", on_single), ("on_nonfinite", on_nonfinite)):
            if choice not in CHOICES[name]:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be one of {', '.join(CHOICES[name])}; got {choice!r}; "
                    f"the default is {CHOICES[name][0]}"
                )
            if choice != CHOICES[name][0]:
                setattr(self, name, choice)

    def extra_repr(self) -> str:
        """The arguments of torch's batch norm, and what was chosen otherwise than torch does."""
        chosen = [f", {name}={getattr(self, name)!r}" for name in CHOICES if name in vars(self)]
        return super().extra_repr() + "".join(chosen)


def show_choices(kind: type, theirs: type) -> None:
    """Give a class the signature of torch's, and the choices, for people and for `inspect`."""
    known = inspect.signature(theirs)
    last = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=CHOICES[name][0]) for name in CHOICES]
    kind.__signature__ = known.replace(parameters=[*known.parameters.values(), *last])  # type: ignore[attr-defined] # for inspect


class BatchNorm1d(_Batch, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, exact in float32 at any mean, for (N, C) or (N, C, L).

    Example:
        >>> anynorm.BatchNorm1d(2)(torch.tensor([[1.0, 1e6], [3.0, 1e6 + 2]])).detach()
        tensor([[-1.0000, -1.0000],
                [ 1.0000,  1.0000]])
    """

    _axes: tuple[int, ...] = (2, 3)


class BatchNorm2d(_Batch, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, exact in float32 at any mean, for (N, C, H, W).

    Example:
        >>> anynorm.BatchNorm2d(3).load_state_dict(torch.nn.BatchNorm2d(3).state_dict())
        <All keys matched successfully>
    """

    _axes: tuple[int, ...] = (4,)


class BatchNorm3d(_Batch, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, exact in float32 at any mean, for (N, C, D, H, W).

    Example:
        >>> anynorm.BatchNorm3d(3)(torch.randn(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])
    """

    _axes: tuple[int, ...] = (5,)


for _kind, _theirs in ((BatchNorm1d, nn.BatchNorm1d), (BatchNorm2d, nn.BatchNorm2d), (BatchNorm3d, nn.BatchNorm3d)):
    show_choices(_kind, _theirs)
