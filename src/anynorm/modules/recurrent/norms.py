"""The norms inside recurrent layers. They see rows, the sequences that are there, and never padding.

    y = (x - mean) / sqrt(var + eps) * weight + bias

The recurrent layer's own ``bias_ih`` and ``bias_hh`` are the beta of its two products, so that a second one would be
redundant; only the norm of the cell has a bias of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import Parameter

from ...functional import batch_norm, layer_norm
from ...sources import find_momentum
from ..norm import Norm
from ..recomputation import read_or_replay
from .packing import split_steps


class RowNorm(Norm):
    """What the norms here share: a gamma, maybe a beta, and rows of several steps or of one.

    Args:
        features: size of a row.
        bias: whether the norm has a beta of its own; else the caller passes one, or none.
        eps: in units of x squared.
    """

    gamma: float = 1.0  # where gamma begins
    weight: Parameter
    bias: Parameter | None
    features: int
    eps: float

    def __init__(
        self,
        features: int,
        bias: bool,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features, self.eps = features, eps
        self.weight = Parameter(torch.empty(features, device=device, dtype=dtype))
        self.bias = Parameter(torch.empty(features, device=device, dtype=dtype)) if bias else None

    def reset_parameters(self) -> None:
        """Gamma where it begins, beta 0."""
        nn.init.constant_(self.weight, self.gamma)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(  # type: ignore[override] # rows are all there, and have no mask
        self, input: Tensor, bias: Tensor | None = None, step: int = 0, moves: bool = True
    ) -> Tensor:
        """Normalize the rows of one step, or of all where steps do not matter.

        Args:
            input: (rows, features).
            bias: (features,), beta, where the norm has none of its own.
            step: which step of their sequences the rows are.
            moves: whether the batch moves running averages in training.
        """
        raise NotImplementedError

    def over_steps(self, input: Tensor, bias: Tensor | None, sizes: list[int], moves: bool) -> Tensor:
        """Normalize the rows of all steps, ``sizes[t]`` of each, at once where the norm allows it."""
        found: Tensor = self(input, bias, moves=moves)
        return found

    def check_sizes(self, name: str, sizes: list[int]) -> None:
        """Whether statistics can be taken from batches of these sizes; called before anything is changed."""

    def extra_repr(self) -> str:
        """Size and eps."""
        return f"{self.features}, eps={self.eps}"


class LayerRows(RowNorm):
    """Layer norm of each row, or of each of several parts of a row.

    Args:
        parts: the sizes of the parts that have a mean and a variance of their own.
    """

    def __init__(self, parts: tuple[int, ...], bias: bool, eps: float, **options: Any) -> None:
        super().__init__(sum(parts), bias, eps, **options)
        self.parts = parts
        self.reset_parameters()

    def forward(  # type: ignore[override] # rows, as above
        self, input: Tensor, bias: Tensor | None = None, step: int = 0, moves: bool = True
    ) -> Tensor:
        """Normalize each part of each row."""
        beta = self.bias if bias is None else bias
        if len(self.parts) == 1:
            return layer_norm(input, self.parts, self.weight, beta, self.eps)
        betas = [None] * len(self.parts) if beta is None else beta.split(self.parts)
        pieces = zip(self.parts, input.split(self.parts, -1), self.weight.split(self.parts), betas)
        return torch.cat([layer_norm(x, (size,), w, b, self.eps) for size, x, w, b in pieces], -1)


class _BatchRows(RowNorm):
    """Batch norm of rows: what the two kinds share.

    Args:
        momentum: weight of the new value in the running averages; None for a cumulative average.
        shape: the running averages' shape, () or (max_steps,), before the features.
    """

    counter_name = "num_batches_tracked"
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        features: int,
        bias: bool,
        eps: float,
        momentum: float | None,
        shape: tuple[int, ...] = (),
        **options: Any,
    ) -> None:
        super().__init__(features, bias, eps, **options)
        self.momentum = momentum
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(*shape, features, **options))
        counter = torch.zeros(shape, dtype=torch.long, device=self.weight.device)
        self.register_buffer(self.counter_name, counter)
        self.reset_parameters()

    @property
    def counter(self) -> Tensor:
        """How many batches the running averages have seen."""
        found: Tensor = getattr(self, self.counter_name)
        return found

    def reset_parameters(self) -> None:
        """Gamma where it begins, beta 0, running averages of a standard normal."""
        super().reset_parameters()
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.counter.zero_()

    def from_batch(
        self, input: Tensor, beta: Tensor | None, running: tuple[Tensor, Tensor], counter: Tensor, moves: bool
    ) -> Tensor:
        """Normalize by the rows' own statistics, which move `running`."""
        if not moves:
            return batch_norm(input, None, None, self.weight, beta, True, 0.0, self.eps)
        momentum = find_momentum(self.momentum, counter)
        y = batch_norm(input, *running, self.weight, beta, True, momentum, self.eps)
        counter.add_(1)
        return y

    def from_running(self, input: Tensor, beta: Tensor | None, running: tuple[Tensor, Tensor]) -> Tensor:
        """Normalize by running averages."""
        return batch_norm(input, *running, self.weight, beta, False, 0.0, self.eps)


class SequenceRows(_BatchRows):
    """Batch norm over all rows, whatever their step."""

    def forward(  # type: ignore[override] # rows, as above
        self, input: Tensor, bias: Tensor | None = None, step: int = 0, moves: bool = True
    ) -> Tensor:
        """Normalize rows by their statistics in training, by the running averages in evaluation."""
        beta = self.bias if bias is None else bias
        running = self.running_mean, self.running_var
        if self.training:
            return self.from_batch(input, beta, running, self.counter, moves)
        return self.from_running(input, beta, running)

    def check_sizes(self, name: str, sizes: list[int]) -> None:
        """Refuse a single row in training."""
        if self.training and sum(sizes) == 1:
            raise ValueError(
                f"{name}: statistics need more than 1 valid step in training; got 1 sequence of 1 step; "
                "use a larger batch or call eval()"
            )


class StepRows(_BatchRows):
    """Batch norm with statistics of its own for each step; gamma and beta are shared by the steps.

    Args:
        max_steps: how many steps have running averages of their own; later steps share the last.
        on_single: what a step does in training at which a single sequence still runs: "running" takes the running
            averages of that step, or of the last step that has any, and leaves them; "error" refuses the batch.
    """

    gamma: float = 0.1
    # Not torch's name: a norm's num_batches_tracked is one number, and checkpoints are checked for that.
    counter_name = "num_batches_per_step"
    num_batches_per_step: Tensor
    max_steps: int
    on_single: str

    def __init__(
        self,
        features: int,
        bias: bool,
        eps: float,
        momentum: float | None,
        max_steps: int,
        on_single: str,
        **options: Any,
    ) -> None:
        super().__init__(features, bias, eps, momentum, (max_steps,), **options)
        self.max_steps, self.on_single = max_steps, on_single

    def forward(  # type: ignore[override] # rows, as above
        self, input: Tensor, bias: Tensor | None = None, step: int = 0, moves: bool = True
    ) -> Tensor:
        """Normalize the rows of a step by their statistics in training, by that step's averages in evaluation."""
        beta = self.bias if bias is None else bias
        if self.training and input.shape[0] != 1:
            slot = min(step, self.max_steps - 1)
            running = self.running_mean[slot], self.running_var[slot]
            return self.from_batch(input, beta, running, self.num_batches_per_step[slot], moves)
        found = self.find_running(step)
        return self.from_running(input, beta, read_or_replay(self, found) if self.training else found)

    def find_running(self, step: int) -> tuple[Tensor, Tensor]:
        """The averages of a step, or of the last step that has any. Steps are seen in order, without gaps."""
        seen = (self.num_batches_per_step > 0).sum()  # stays a tensor, so that no compiler or device waits for it
        slot = (seen - 1).clamp(0, step).view(1)
        return self.running_mean.index_select(0, slot)[0], self.running_var.index_select(0, slot)[0]

    def over_steps(self, input: Tensor, bias: Tensor | None, sizes: list[int], moves: bool) -> Tensor:
        """Normalize step by step."""
        return torch.cat([self(rows, bias, step, moves) for step, rows in enumerate(split_steps(input, sizes))])

    def check_sizes(self, name: str, sizes: list[int]) -> None:
        """Refuse a batch of one sequence in training, and with ``on_single="error"`` a step of one."""
        if not self.training or 1 not in sizes:
            return
        if sizes[0] == 1:
            raise ValueError(
                f"{name}: statistics need more than 1 sequence in training, or every output is beta; got a batch of 1; "
                "use a larger batch, drop a last batch of one with DataLoader(drop_last=True), or call eval()"
            )
        if self.on_single == "error":
            raise ValueError(
                f"{name}: on_single='error' needs more than 1 sequence at each step in training; got 1 of {sizes[0]} "
                f"sequences at step {sizes.index(1)}; cut sequences to similar lengths, or take on_single='running'"
            )

    def extra_repr(self) -> str:
        """Size, eps, momentum and steps."""
        return f"{super().extra_repr()}, max_steps={self.max_steps}"
