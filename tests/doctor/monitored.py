"""What tests of the monitor share: small models, and training steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

X = 2 * torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 1


def make_net(norm: nn.Module | None = None) -> nn.Module:
    """Batch norm, dropout, group norm."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), norm or nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 3)]
    return nn.Sequential(*layers, nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3))


def train(model: nn.Module, steps: int = 5, x: Tensor = X, call: nn.Module | None = None, rate: float = 0.1):
    """Outputs of each step; the same random numbers each time."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    outputs = []
    for _ in range(steps):
        y = (call or model)(x)
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


class Kept:
    """An output that keeps what is written, in the place of a file."""

    def __init__(self) -> None:
        self.records = []

    def write(self, records) -> None:
        self.records += records

    def close(self) -> None:
        pass


def keep(monitor) -> list:
    """The records that a monitor writes from now on."""
    kept = Kept()
    monitor._outputs.insert(0, kept)
    return kept.records
