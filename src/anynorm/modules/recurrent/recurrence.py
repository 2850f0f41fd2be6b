"""What recurrent layers with norms share: the norms of every layer and direction, and the walk over rows.

Rows are the positions that are there (`packing`), so padding is never read. Both directions count their steps from the
start of what they read: step 0 of the reverse direction is the last step of each sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from ...padding.context import find_current, may_be_masked
from ...padding.masks import Lengths, lengths_of
from ..counting import is_counted, mark_counted
from ..norm import record_call
from .cell import Cell, State
from .norms import LayerRows, RowNorm, SequenceRows, StepRows
from .options import check_options
from .packing import find_flip, find_flip_of_all, pack, split_steps, unpack

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..keywords import RecurrentKeywords


class Recurrent(nn.RNNBase):
    """What `LSTM` and `GRU` share beside torch's state: the norms, and the walk over rows."""

    gates: tuple[int, ...]  # how many gates share a mean and a variance in layer norm
    has_cell: bool
    norm: str | None = None  # on the class, because torch's constructor calls reset_parameters before it is known
    max_steps: int | None
    on_single: str
    eps: float
    momentum: float | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *arguments: Any,  # torch's others, by place
        norm: str | None = None,
        max_steps: int | None = None,
        on_single: str = "running",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        **options: Unpack[RecurrentKeywords],
    ) -> None:
        check_options(type(self).__name__, norm, max_steps, on_single, eps)
        # The mode comes first in RNNBase alone, which torch's LSTM and GRU put there
        super().__init__(input_size, hidden_size, *arguments, **options)  # type: ignore[arg-type]
        self.norm, self.max_steps, self.on_single, self.eps, self.momentum = norm, max_steps, on_single, eps, momentum
        self._suffixes = ("", "_reverse") if self.bidirectional else ("",)
        for layer in range(self.num_layers):
            for place in self._find_places():
                for suffix in self._suffixes:
                    setattr(self, f"norm_{place}_l{layer}{suffix}", self._make_norm(place))
        self._reset_norms()

    def _find_places(self) -> tuple[str, ...]:
        """Where norms stand: behind the input's product ("ih"), the hidden state's ("hh"), on the cell ("cell")."""
        if self.norm is None:
            return ()
        if self.norm == "batch-sequence":
            return ("ih",)
        return ("ih", "hh", "cell") if self.has_cell else ("ih", "hh")

    def _make_norm(self, place: str) -> RowNorm:
        """The norm of one of these places."""
        parts = (self.hidden_size,) if place == "cell" else tuple(gates * self.hidden_size for gates in self.gates)
        like: dict[str, Any] = {"device": self.weight_ih_l0.device, "dtype": self.weight_ih_l0.dtype}
        bias = place == "cell" and self.bias
        if self.norm == "layer":
            return LayerRows(parts, bias, self.eps, **like)
        if self.max_steps is None:
            return SequenceRows(sum(parts), bias, self.eps, self.momentum, **like)
        return StepRows(sum(parts), bias, self.eps, self.momentum, self.max_steps, self.on_single, **like)

    def reset_parameters(self) -> None:
        """Weights and biases as torch's; with a norm biases 0 and the norms as at the start."""
        super().reset_parameters()
        self._reset_norms()

    def _name_norms(self) -> list[tuple[str, RowNorm]]:
        """The norms by their names; there are no other modules here."""
        return [(name, norm) for name, norm in self.named_children() if isinstance(norm, RowNorm)]

    def _reset_norms(self) -> None:
        """The norms as at the start, and the biases, which are their beta, 0."""
        if self.norm is None:
            return
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
        for _, norm in self._name_norms():
            norm.reset_parameters()

    def forward(self, input: Any, hx: Any = None, lengths: Lengths | None = None) -> tuple[Any, Any]:
        """Run over the sequences.

        Args:
            input: (steps, batch, input_size); (batch, steps, input_size) with `batch_first`; (steps, input_size)
                unbatched; or a PackedSequence. With `lengths` padding may hold anything, NaN too.
            hx: the first states, as for torch's layer; None for 0.
            lengths: (batch,), whole numbers: how many steps of each sequence are there, in any order. None: all, or
                what `anynorm.masked` says.

        Returns:
            The last layer's h at every step, padded or packed as `input` and 0 in the padding; and the last states of
            every layer and direction, as torch's layer returns them, at each sequence's own end.

        Raises:
            ValueError: an input of other axes; a batch norm in training that has a single sequence to look at.
            RuntimeError: sizes or lengths that do not fit.
        """
        if isinstance(input, Proxy):
            recorded: tuple[Any, Any] = record_call(self, input, hx, lengths)
            return recorded
        if lengths is None and may_be_masked() and isinstance(input, Tensor) and input.dim() == 3:
            lengths = self._find_lengths(input)
        if lengths is not None:
            packed = pack(type(self).__name__, input, lengths, self.batch_first)
            output, state = self.forward(packed, hx)
            return unpack(output, self.batch_first, input.shape[1 if self.batch_first else 0]), state
        if isinstance(input, PackedSequence) and hx is not None:  # torch takes states of too many sequences in silence
            self.check_forward_args(input.data, hx, input.batch_sizes)
        if self.norm is None:
            found: tuple[Any, Any] = super().forward(input, hx)
            return found
        if isinstance(input, PackedSequence):
            return self._forward_rows(input, hx)
        self._check_axes(input)
        if input.dim() == 3:
            return self._forward_all(input, hx)
        axis = 0 if self.batch_first else 1
        output, state = self.forward(input.unsqueeze(axis), each(hx, lambda s: s.unsqueeze(1)))
        return output.squeeze(axis), each(state, lambda s: s.squeeze(1))

    def _find_lengths(self, input: Tensor) -> Tensor | None:
        """What `anynorm.masked` has for this input, as lengths."""
        steps, batch = (input.shape[1], input.shape[0]) if self.batch_first else tuple(input.shape[:2])
        mask = find_current(self, (batch, steps), input)
        return None if mask is None else lengths_of(type(self).__name__, mask.expand(batch, steps))

    def _check_axes(self, input: Tensor) -> None:
        name = type(self).__name__
        if input.dim() not in (2, 3):
            raise ValueError(
                f"{name}: input must be 2D (steps, features) or a 3D batch; got {input.dim()}D input of shape "
                f"{tuple(input.shape)}; add or join axes"
            )
        if 0 in input.shape[:-1]:
            raise RuntimeError(
                f"{name}: input must have at least 1 step and 1 sequence; got shape {tuple(input.shape)}; "
                "leave empty batches out"
            )

    def _forward_rows(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        """`forward` for rows, with norms."""
        rows, batch_sizes, order, back = packed
        self.check_input(rows, batch_sizes)
        flip = find_flip(batch_sizes).to(rows.device) if self.bidirectional else None
        rows, state = self._run(
            rows, batch_sizes.tolist(), self.permute_hidden(hx, order) if hx is not None else hx, flip
        )
        return PackedSequence(rows, batch_sizes, order, back), self.permute_hidden(state, back)

    def _forward_all(self, input: Tensor, hx: Any) -> tuple[Tensor, Any]:
        """`forward` where every position counts. No size is read from a tensor, so a graph takes any batch."""
        self.check_input(input, None)
        if hx is not None:
            self.check_forward_args(input, hx, None)
        by_step = input.transpose(0, 1) if self.batch_first else input
        sizes = [by_step.shape[1]] * len(by_step)
        rows = by_step.flatten(0, 1)
        flip = find_flip_of_all(rows, len(sizes)) if self.bidirectional else None
        rows, state = self._run(rows, sizes, hx, flip)
        by_step = rows.unflatten(0, (len(sizes), -1))
        return by_step.transpose(0, 1) if self.batch_first else by_step, state

    def _run(self, rows: Tensor, sizes: list[int], hx: Any, flip: Tensor | None) -> tuple[Tensor, Any]:
        """Rows and last states, from first states in the order of rows."""
        if hx is None:
            count = self.num_layers * len(self._suffixes)
            h = rows.new_zeros(count, sizes[0], self.proj_size or self.hidden_size)
            hx = (h, rows.new_zeros(count, sizes[0], self.hidden_size)) if self.has_cell else h
        for name, norm in self._name_norms():
            norm.check_sizes(f"{type(self).__name__}.{name}", sizes)
        rows, state = self._run_layers(rows, sizes, flip, tuple(hx) if self.has_cell else (hx,))
        if self.training and is_counted(self):
            mark_counted(self)
        return rows, state if self.has_cell else state[0]

    def _run_layers(self, rows: Tensor, sizes: list[int], flip: Tensor | None, start: State) -> tuple[Tensor, State]:
        """All layers and directions; `start` and what is returned have them on axis 0, as torch's states."""
        last: list[State] = []
        for layer in range(self.num_layers):
            if layer:
                rows = F.dropout(rows, self.dropout, self.training)
            outputs = []
            for suffix in self._suffixes:
                cell = self._find_cell(f"l{layer}{suffix}")
                state = tuple(s[len(last)] for s in start)
                read = rows if flip is None or not suffix else rows.index_select(0, flip)
                output, state = self._walk(cell, read, sizes, state)
                outputs.append(output if flip is None or not suffix else output.index_select(0, flip))
                last.append(state)
            rows = torch.cat(outputs, -1)
        return rows, tuple(torch.stack(states) for states in zip(*last))

    def _find_cell(self, tail: str) -> Cell:
        """The parameters and norms of one direction of one layer; what it does not have is None."""
        names = "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "norm_ih", "norm_hh", "norm_cell"
        found: dict[str, Any] = {name: getattr(self, f"{name}_{tail}", None) for name in names}
        return Cell(**found, moves=is_counted(self))

    def _walk(self, cell: Cell, rows: Tensor, sizes: list[int], state: State) -> tuple[Tensor, State]:
        """One direction of one layer: h at every step, and each sequence's state at its end."""
        outputs, ended = [], []
        for step, x in enumerate(split_steps(cell.from_input(rows, sizes), sizes)):
            size = sizes[step]
            if step and size is not sizes[step - 1] and size < sizes[step - 1]:
                ended.append(tuple(s[size:] for s in state))
                state = tuple(s[:size] for s in state)
            state = self._step(cell, x, state, step)
            outputs.append(state[0])
        ended.append(state)
        return torch.cat(outputs), tuple(torch.cat(pieces[::-1]) for pieces in zip(*ended))

    def _step(self, cell: Cell, x: Tensor, state: State, step: int) -> State:
        """One step of the sequences that still run; x is `Cell.from_input`'s."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The arguments of torch's layer, and the norm's options."""
        arguments = [super().extra_repr()]
        if self.norm is not None:
            arguments += [f"norm={self.norm!r}", f"eps={self.eps}"]
            arguments += [f"momentum={self.momentum}"] if self.norm != "layer" else []
        if self.max_steps is not None:
            arguments += [f"max_steps={self.max_steps}", f"on_single={self.on_single!r}"]
        return ", ".join(arguments)


def each(state: Any, change: Any) -> Any:
    """A GRU's h or an LSTM's (h, c), each of them changed; None stays None."""
    if state is None:
        return None
    return tuple(map(change, state)) if isinstance(state, (tuple, list)) else change(state)
