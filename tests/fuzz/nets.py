"""Small networks from a list of words: layers, norms, activations, residual blocks, for rows, series and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

CHANNELS, LENGTH = 4, 6  # into every layer; positions along each axis
NORMS = ("batch", "instance", "group", "layer", "rms")
ACTIVATIONS = ("ReLU", "LeakyReLU", "SiLU", "GELU", "Tanh")


@dataclass(frozen=True)
class Net:
    """Words are (kind, choice): ("mix", 3) a convolution of 3 positions, ("norm", "batch"), ("act", "ReLU"),
    ("residual", words), ("shortcut", words) whose sum takes a ReLU, ("functional", "relu")."""

    words: tuple = ()
    dims: int = 1  # axes of positions
    samples: int = 4
    seed: int = 0
    parts: tuple[int, ...] = ()  # how the batch is cut
    affine: bool = True


class Sum(nn.Module):
    """body(x) + x, and maybe a ReLU behind."""

    def __init__(self, body: nn.Module, ends: bool) -> None:
        super().__init__()
        self.body, self.ends = body, ends

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x) + x
        return F.relu(y) if self.ends else y


class Apply(nn.Module):
    """A function of torch.nn.functional behind a layer."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.layer, self.function = layer, getattr(F, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def build(net: Net) -> nn.Module:
    """The network in float64, with gamma, beta and averages that are not 1 and 0."""
    torch.manual_seed(net.seed)
    model = nn.Sequential(*[make_layer(word, net) for word in net.words]).double()
    for name, tensor in model.state_dict().items():
        if name.split(".")[-1] in ("weight", "bias", "running_mean") and tensor.dim() == 1:
            tensor.normal_()
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    return model


def make_layer(word: tuple, net: Net) -> nn.Module:
    kind, choice = word
    if kind == "mix":
        if net.dims == 0:
            return nn.Linear(CHANNELS, CHANNELS)
        return getattr(nn, f"Conv{net.dims}d")(CHANNELS, CHANNELS, choice, padding=choice // 2)
    if kind == "act":
        return getattr(nn, choice)()
    if kind == "norm":
        return make_norm(choice, net)
    if kind == "functional":
        return Apply(make_norm("batch", net), choice)
    return Sum(nn.Sequential(*[make_layer(inner, net) for inner in choice]), kind == "shortcut")


def make_norm(kind: str, net: Net) -> nn.Module:
    if kind in ("layer", "rms"):
        shape = (LENGTH,) * net.dims or (CHANNELS,)
        return nn.LayerNorm(shape) if kind == "layer" else nn.RMSNorm(shape, eps=1e-5)
    if kind == "group":
        return nn.GroupNorm(2, CHANNELS)
    if kind == "instance":
        return getattr(nn, f"InstanceNorm{net.dims}d")(CHANNELS, affine=net.affine, track_running_stats=net.affine)
    return getattr(nn, f"BatchNorm{max(net.dims, 1)}d")(CHANNELS)


def make_input(net: Net) -> Tensor:
    generator = torch.Generator().manual_seed(net.seed)
    shape = (net.samples, CHANNELS, *(LENGTH,) * net.dims)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@st.composite
def nets(draw, norms: tuple[str, ...] = NORMS, kernels: tuple[int, ...] = (1, 3), dims: tuple[int, ...] = (1, 2, 0)):
    """Any of them; rows have no instance norm."""
    axes = draw(st.sampled_from(dims))
    known = [norm for norm in norms if axes or norm != "instance"]
    plain = st.one_of(
        st.tuples(st.just("norm"), st.sampled_from(known)),
        st.tuples(st.just("act"), st.sampled_from(ACTIVATIONS)),
        st.tuples(st.just("mix"), st.sampled_from(kernels)),
    )
    inner = st.lists(plain, min_size=1, max_size=3).map(tuple)
    some = [plain, plain, st.tuples(st.sampled_from(("residual", "shortcut")), inner)]
    if "batch" in norms:
        some.append(st.tuples(st.just("functional"), st.sampled_from(("relu", "silu", "gelu", "leaky_relu"))))
    words = tuple(draw(st.lists(st.one_of(some), min_size=1, max_size=6)))
    parts = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    return Net(words, axes, sum(parts), draw(st.integers(0, 99)), parts, draw(st.booleans()))


Check = Callable[[Net], None]
