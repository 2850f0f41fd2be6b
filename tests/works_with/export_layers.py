"""The layers of docs/export.md: how each is made, and what its inputs are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import anynorm

AXES = {"n": "batch", "l": "length"}
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """A row: how its model is made, and the axes of its inputs.

    Attributes:
        make: the model, with gamma, beta and averages that are not those of the start.
        inputs: axes of each: n is the batch, l the length, numbers are sizes; `lengths` and `mask` name what is not
            drawn from a normal distribution.
        aot: whether AOTInductor is tried too, which takes half a minute.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[str, ...] = ("n 6 l",)
    aot: bool = False

    def draw(self, samples: int, length: int) -> Inputs:
        """Inputs of these sizes, the same at each call."""
        generator = torch.Generator().manual_seed(7)
        counted = torch.arange(samples) % length + 1  # ragged, and never nothing
        found = []
        for axes in self.inputs:
            sizes = [{"n": samples, "l": length}.get(axis) or int(axis) for axis in find_axes(axes)]
            if axes.startswith("mask"):
                found.append(anynorm.mask_of(counted, length))
            elif axes.startswith("lengths"):
                found.append(counted)
            else:
                found.append(torch.randn(sizes, generator=generator) * 2 + 1)
        return tuple(found)

    def find_free(self, free: str) -> list[dict[int, str]]:
        """For each input its axes that are free, and their names."""
        return [{i: AXES[a] for i, a in enumerate(find_axes(axes)) if a in free} for axes in self.inputs]


def find_axes(axes: str) -> list[str]:
    """The axes of an input, without what names it."""
    return [axis for axis in axes.split() if axis not in ("mask", "lengths")]


class Call(nn.Module):
    """A layer with a keyword argument as its second input, or a domain that is chosen."""

    def __init__(self, layer: nn.Module, keyword: str = "", domain: str = "") -> None:
        super().__init__()
        self.layer, self.keyword, self.domain = layer, keyword, domain

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        """What a graph of one layer computes."""
        with anynorm.domain(self.domain) if self.domain else contextlib.nullcontext():
            y = self.layer(x, **{self.keyword: other}) if self.keyword else self.layer(x)
        if not isinstance(y, tuple):
            return y
        return (y[0], *y[1]) if isinstance(y[1], tuple) else y  # of an LSTM


class Masked(nn.Module):
    """A model of several layers under `anynorm.masked`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), anynorm.BatchNorm1d(6), anynorm.GroupNorm(2, 6))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The mask reaches both norms."""
        with anynorm.masked(anynorm.mask_of(lengths, x.shape[-1])):
            y: Tensor = self.layers(x)
        return y


def settle(model: nn.Module) -> nn.Module:
    """In evaluation, with parameters and averages drawn at random, some gammas negative."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.rpartition(".")[2].startswith("num_"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            if "running_var" in name or "running_std" in name:
                tensor.abs_().add_(0.5)
    return model.eval()


def norm(name: str, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    """One of our classes."""
    return lambda: settle(getattr(anynorm, name)(*arguments, **options))


def call(name: str, *arguments: Any, keyword: str = "", domain: str = "", **options: Any) -> Callable[[], nn.Module]:
    """One of our classes, called with more than x."""
    return lambda: settle(Call(getattr(anynorm, name)(*arguments, **options), keyword, domain))


def make_folded() -> nn.Module:
    """With a norm before a layer and one behind it."""
    layers = [nn.Conv1d(6, 6, 3, padding=1), anynorm.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6)]
    model = settle(nn.Sequential(*layers)).eval()
    assert len(anynorm.fold(model).changed) == 2
    return model


def make_frozen() -> nn.Module:
    """In training mode."""
    model = settle(nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), anynorm.BatchNorm1d(6), nn.ReLU()))
    anynorm.freeze(model)
    return model.train()


def make_accelerated() -> nn.Module:
    """Norms fused with their ReLU."""
    layers = (nn.Conv1d(6, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(), nn.GroupNorm(2, 6), nn.SiLU())
    model = nn.Sequential(*layers)
    settle(model)
    anynorm.accelerate(model, fuse=True)
    return model


SEQUENCE = "n l 6"
LAYERS: dict[str, Layer] = {
    "BatchNorm1d": Layer(norm("BatchNorm1d", 6), aot=True),
    "BatchNorm1d of (N, C)": Layer(norm("BatchNorm1d", 6), ("n 6",)),
    "BatchNorm2d": Layer(norm("BatchNorm2d", 6), ("n 6 l 4",)),
    "BatchNorm3d": Layer(norm("BatchNorm3d", 6), ("n 6 l 4 2",)),
    "BatchNorm1d without running averages": Layer(norm("BatchNorm1d", 6, track_running_stats=False)),
    "InstanceNorm1d": Layer(norm("InstanceNorm1d", 6, affine=True)),
    "InstanceNorm2d": Layer(norm("InstanceNorm2d", 6, affine=True), ("n 6 l 4",)),
    "InstanceNorm3d": Layer(norm("InstanceNorm3d", 6), ("n 6 l 4 2",)),
    "InstanceNorm1d with running averages": Layer(norm("InstanceNorm1d", 6, affine=True, track_running_stats=True)),
    "GroupNorm": Layer(norm("GroupNorm", 2, 6), aot=True),
    "LayerNorm": Layer(norm("LayerNorm", 6), (SEQUENCE,), aot=True),
    "LayerNorm of two axes": Layer(norm("LayerNorm", (5, 6)), ("n l 5 6",)),
    "RMSNorm": Layer(norm("RMSNorm", 6), (SEQUENCE,)),
    "GhostBatchNorm1d": Layer(norm("GhostBatchNorm1d", 6, ghost_size=2)),
    "BatchRenorm1d": Layer(norm("BatchRenorm1d", 6)),
    "SyncBatchNorm": Layer(norm("SyncBatchNorm", 6)),
    'AnyNorm("n c s -> c")': Layer(norm("AnyNorm", "n c s -> c", affine="c", c=6, track_running_stats=True)),
    'AnyNorm("n c s -> n")': Layer(norm("AnyNorm", "n c s -> n", affine="c", c=6)),
    'AnyNorm("n (g k) s -> n g")': Layer(norm("AnyNorm", "n (g k) s -> n g", affine="g k", g=2, k=3)),
    'AnyNorm("n s d -> n s")': Layer(norm("AnyNorm", "n s d -> n s", affine="d", d=6, centred=False), (SEQUENCE,)),
    "BatchNormAct1d": Layer(norm("BatchNormAct1d", 6), aot=True),
    "BatchNormAct1d with a residual": Layer(norm("BatchNormAct1d", 6), ("n 6 l", "n 6 l")),
    "InstanceNormAct1d, leaky ReLU": Layer(norm("InstanceNormAct1d", 6, affine=True, activation="leaky_relu")),
    "GroupNormAct, SiLU": Layer(norm("GroupNormAct", 2, 6, activation="silu")),
    "LayerNormAct, GELU": Layer(norm("LayerNormAct", 6, activation="gelu"), (SEQUENCE,)),
    "RMSNormAct, mish": Layer(norm("RMSNormAct", 6, activation="mish"), (SEQUENCE,)),
    "GhostBatchNormAct1d": Layer(norm("GhostBatchNormAct1d", 6, ghost_size=2)),
    "BatchRenormAct1d": Layer(norm("BatchRenormAct1d", 6)),
    "SyncBatchNormAct": Layer(norm("SyncBatchNormAct", 6)),
    "a model, `accelerate(fuse=True)`": Layer(make_accelerated),
    "a folded model": Layer(make_folded),
    "a frozen model in `train()`": Layer(make_frozen, aot=True),
    "DomainBatchNorm1d": Layer(call("DomainBatchNorm1d", 6, domains=("day", "night"), domain="night")),
    "BatchNorm1d, `mask=`": Layer(call("BatchNorm1d", 6, keyword="mask"), ("n 6 l", "mask n l")),
    "BatchNorm1d, `lengths=`": Layer(call("BatchNorm1d", 6, keyword="lengths"), ("n 6 l", "lengths n")),
    "InstanceNorm1d, `mask=`": Layer(call("InstanceNorm1d", 6, keyword="mask"), ("n 6 l", "mask n l")),
    "GroupNorm, `lengths=`": Layer(call("GroupNorm", 2, 6, keyword="lengths"), ("n 6 l", "lengths n"), aot=True),
    "LayerNorm, `mask=`": Layer(call("LayerNorm", 6, keyword="mask"), (SEQUENCE, "mask n l")),
    "RMSNorm, `lengths=`": Layer(call("RMSNorm", 6, keyword="lengths"), (SEQUENCE, "lengths n")),
    "BatchNormAct1d, `mask=`": Layer(call("BatchNormAct1d", 6, keyword="mask"), ("n 6 l", "mask n l")),
    "a model within `anynorm.masked`": Layer(lambda: settle(Masked()), ("n 6 l", "lengths n")),
    "LSTM, layer norm": Layer(call("LSTM", 6, 4, norm="layer", batch_first=True), (SEQUENCE,)),
    "LSTM, batch norm of the sequence": Layer(
        call("LSTM", 6, 4, norm="batch-sequence", bidirectional=True, batch_first=True), (SEQUENCE,)
    ),
    "LSTM, batch norm per step": Layer(
        call("LSTM", 6, 4, norm="batch-per-step", max_steps=8, batch_first=True), (SEQUENCE,)
    ),
    "GRU, layer norm": Layer(call("GRU", 6, 4, norm="layer", batch_first=True), (SEQUENCE,)),
    "GRU, batch norm of the sequence": Layer(
        call("GRU", 6, 4, norm="batch-sequence", num_layers=2, batch_first=True), (SEQUENCE,)
    ),
}
