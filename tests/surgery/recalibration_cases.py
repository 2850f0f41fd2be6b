"""Data, models and looks that the tests of recalibrate share."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor


def draw(*shape: int, seed: int = 0, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean).to(dtype)


def find_truth(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and n/(n-1) variance of each channel, float64."""
    rows = x.double().movedim(1, -1).reshape(-1, x.shape[1])
    return rows.mean(0), rows.var(0)


def hold(norm: Any, mean: Tensor, var: Tensor, k: float = 1e-6) -> None:
    """Running averages are these, to k of the mean and of the variance."""
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=k, atol=k * float(var.max().sqrt()))
    torch.testing.assert_close(norm.running_var.double(), var, rtol=k, atol=0)


def make_net(room: Any = nn, **options: Any) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        room.BatchNorm2d(6, **options),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        room.BatchNorm2d(4, **options),
    )


def photograph(model: nn.Module) -> list[Any]:
    """All that a user can see of a model."""
    seen: list[Any] = []
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        plain = {k: list(v) if isinstance(v, dict) else v for k, v in plain.items()}
        tensors = [(k, id(t), None if t is None else t.tolist()) for k, t in module._buffers.items()]
        seen.append((name, type(module), plain, tensors))
    return seen


IMAGES = [draw(n, 3, 8, 8, seed=n, mean=n) for n in (4, 4, 3)]
