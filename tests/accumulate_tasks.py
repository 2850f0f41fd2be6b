"""Models, batches and comparisons for the tests of accumulation, and what their ranks run."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import anynorm

EXACT = ("sweep", "lockstep")
MODES = (*EXACT, "estimate")
SIZES = [4, 1, 5, 3]


class Block(nn.Module):
    """Two norms, the first of them called twice, and a branch with a third, added to the input."""

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.shortcut = nn.Conv2d(channels, channels, 1)
        self.norm1, self.norm2, self.norm3 = (getattr(anynorm, kind)(channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.norm1(self.first(x))))
        return F.relu(self.norm2(self.second(y)) + self.norm3(self.shortcut(x)))


def make_chain(norms: int, kind: str = "BatchNorm2d", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Convolutions, norms and activations in place, and a classifier of images 3x5x5."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for place in range(norms):
        layers += [nn.Conv2d(6 if place else 3, 6, 3, padding=1, bias=False), getattr(anynorm, kind)(6)]
        layers += [] if "Act" in kind else [nn.ReLU(inplace=True)]
    return randomize(nn.Sequential(*layers, nn.Flatten(), nn.Linear(150, 4)), dtype)


def make_blocks(kind: str = "BatchNorm2d", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Eight calls of six norms."""
    torch.manual_seed(1)
    blocks = [nn.Conv2d(3, 6, 3, padding=1), Block(kind, 6), Block(kind, 6)]
    return randomize(nn.Sequential(*blocks, nn.Flatten(), nn.Linear(150, 4)), dtype)


def randomize(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Norms that are no longer as at the start."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.to(dtype)


def draw(samples: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images whose means differ, and classes."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(samples, 3, 5, 5, generator=generator, dtype=torch.float64)
    x = x + torch.randn(samples, 3, 1, 1, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(4, (samples,), generator=generator)


def cut(batch: tuple[Tensor, ...], sizes: list[int]) -> list[tuple[Tensor, ...]]:
    """Micro-batches."""
    return list(zip(*(t.split(sizes) for t in batch)))


def find_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, and logits."""
    y = model(batch[0])
    return F.cross_entropy(y, batch[1], reduction="sum") / max(len(y), 1), y


def find_state(model: nn.Module) -> dict[str, Tensor]:
    """Gradients and buffers."""
    gradients = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {name: buffer.clone() for name, buffer in model.named_buffers()}


def on_ranks(rank: int, world: int, mode: str, sizes: list[list[int]]) -> dict[str, Any]:
    """This rank's micro-batches of one batch over all ranks."""
    total = sum(map(sum, sizes))
    mine = cut(draw(total), [sum(part) for part in sizes])[rank]
    model = make_blocks()
    anynorm.sync(model)
    weights = [size / total for size in sizes[rank]]
    found = anynorm.accumulate(model, cut(mine, sizes[rank]), find_loss, mode=mode, weights=weights)
    return {"loss": found.loss, "outputs": torch.cat(found.outputs), "state": find_state(model)}


def accumulate_and_compare(model, sizes, batch, loss=find_loss, mode="sweep", tolerance=1e-9):
    """Equals the large batch: loss, outputs, every gradient and every buffer."""
    large = copy.deepcopy(model)
    found, outputs = loss(large, batch)
    found.backward()
    result = anynorm.accumulate(model, cut(batch, sizes), loss, mode=mode)
    assert_near(result.loss, found, tolerance)
    assert_near(torch.cat(result.outputs), outputs, tolerance)
    assert_same_state(find_state(model), find_state(large), tolerance)
    return result


def assert_near(got: Tensor, wanted: Tensor, tolerance: float, scale: float | None = None) -> None:
    scale = float(wanted.detach().abs().max()) if scale is None else scale
    error = float((got.detach() - wanted.detach()).abs().max())
    assert error <= tolerance * scale, f"{error:.3g}, allowed {tolerance * scale:.3g}"


def assert_same_state(got: dict, wanted: dict, tolerance: float) -> None:
    assert list(got) == list(wanted)
    largest = max(float(t.abs().max()) for name, t in wanted.items() if name.startswith("grad"))
    for name, t in wanted.items():
        if "num_batches" in name:
            assert got[name] == t
        else:
            assert_near(got[name], t, tolerance, largest if name.startswith("grad") else None)
