"""Two small networks with a norm to choose: convolutions over time, and a GRU with the norm inside."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn as nn
from torch import Tensor

import anynorm
from vowels_data import CHANNELS, CLASSES, LONGEST

WIDTH = 32


class Norm(nn.Module):
    """A norm between convolutions, (N, C, L): its output is 0 at padding unless padding is counted."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = anynorm.LayerNorm(WIDTH) if kind == "layer" else anynorm.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if self.kind == "layer":
            return self.norm(x.mT, lengths=lengths).mT
        return self.norm(x) if self.kind == "counted" else self.norm(x, lengths=lengths)


class Gru(nn.Module):
    """A GRU with a norm inside, (N, C, L); "counted" is batch norm over all steps, those of the padding too."""

    def __init__(self, kind: str | None) -> None:
        super().__init__()
        self.counted = kind == "counted"
        steps = LONGEST if kind == "batch-per-step" else None
        norm = "batch-sequence" if self.counted else kind
        self.gru = anynorm.GRU(CHANNELS, WIDTH, batch_first=True, norm=norm, max_steps=steps)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        output, _ = self.gru(x.mT, lengths=None if self.counted else lengths)
        return output.mT


class Network(nn.Module):
    """Mean of the real steps, then a linear layer; `parts` are the norms, or the layer that has them inside."""

    def __init__(self, arm: str) -> None:
        super().__init__()
        body, kind = ARMS[arm]
        sizes = (CHANNELS, WIDTH, WIDTH) if body == "conv" else ()
        self.convolutions = nn.ModuleList(nn.Conv1d(a, b, 5, padding=2) for a, b in pairwise(sizes))
        self.parts = nn.ModuleList(Norm(str(kind)) for _ in self.convolutions) if sizes else nn.ModuleList([Gru(kind)])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(N, C, L) and (N,) to logits (N, 9)."""
        if not self.convolutions:
            x = self.parts[0](x, lengths)
        for convolution, norm in zip(self.convolutions, self.parts):
            x = norm(convolution(x), lengths).relu()
        # Cut at the longest: a sum over more zeros is rounded in another order.
        x = x[..., : int(lengths.max())]
        real = torch.arange(x.shape[-1]) < lengths[:, None]
        return self.head(x.where(real[:, None], 0).sum(-1) / lengths[:, None])


ARMS: dict[str, tuple[str, str | None]] = {
    "conv: batch, padding counted": ("conv", "counted"),
    "conv: batch, masked": ("conv", "masked"),
    "conv: layer": ("conv", "layer"),
    "gru: batch, sequence, counted": ("gru", "counted"),
    "gru: batch, sequence": ("gru", "batch-sequence"),
    "gru: batch, per step": ("gru", "batch-per-step"),
    "gru: layer": ("gru", "layer"),
    "gru: no norm": ("gru", None),
}
