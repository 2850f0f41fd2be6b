"""What one direction of one recurrent layer computes with: its parameters and its norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .norms import RowNorm

State = tuple[Tensor, ...]  # (h,) of a GRU, (h, c) of an LSTM


@dataclass(frozen=True)
class Cell:
    """What one direction of one layer multiplies by, adds and normalizes with."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    norm_ih: RowNorm
    norm_hh: RowNorm | None
    norm_cell: RowNorm | None
    moves: bool  # whether this call moves running averages in training

    def from_input(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """norm(weight_ih x) with beta bias_ih, for the rows of all steps."""
        return self.norm_ih.over_steps(F.linear(rows, self.weight_ih), self.bias_ih, sizes, self.moves)

    def from_hidden(self, h: Tensor, step: int) -> Tensor:
        """norm(weight_hh h) with beta bias_hh, for the rows of one step."""
        if self.norm_hh is None:
            return F.linear(h, self.weight_hh, self.bias_hh)
        found: Tensor = self.norm_hh(F.linear(h, self.weight_hh), self.bias_hh, step, self.moves)
        return found

    def from_cell(self, c: Tensor, step: int) -> Tensor:
        """norm(c), for the rows of one step."""
        return c if self.norm_cell is None else self.norm_cell(c, step=step, moves=self.moves)
