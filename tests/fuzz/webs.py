"""Small networks whose tensors branch and meet again, for what looks at a model's graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import anynorm

MODES = ("zeros", "zeros", "reflect", "replicate", "circular")
SIZE = {0: (), 1: (12,), 2: (8, 7), 3: (5, 4, 4)}  # positions along each axis


@dataclass(frozen=True)
class Web:
    """Words are (kind, a, b), small numbers that choose among what there is: see `Builder`."""

    words: tuple = ()
    head: int = 0
    dims: int = 2
    seed: int = 0


class Network(nn.Module):
    """Steps are (what, module, other tensor); each appends a tensor, the last is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        self.steps: list = []

    def forward(self, x: Tensor) -> Tensor:
        tensors = [x]
        for step in self.steps:
            tensors.append(self.run(step, tensors))
        return tensors[-1]

    def run(self, step: tuple, tensors: list) -> Tensor:
        what, number, other = step
        x = tensors[-1]
        if what == "module":
            return self.parts[number](x)
        if what == "go back":
            return tensors[other]
        if what == "sum":
            return x + tensors[other]
        if what == "in-place sum":
            x += tensors[other]
            return x
        if what == "cat":
            return torch.cat((x, tensors[other]), 1)
        if what == "max pool":
            return F.max_pool2d(x, (2, 1), stride=1)
        if what == "pad":
            return F.pad(x, (1, 0) * (x.dim() - 2))
        if what == "upsample":
            return F.interpolate(x, scale_factor=2.0)
        if what == "mean":
            return x.mean(tuple(range(2, x.dim())))
        if what == "last":
            return x.transpose(1, -1).contiguous()
        return {"relu": F.relu, "relu_": F.relu_, "flatten": lambda t: t.flatten(1), "view": view}[what](x)


def view(x: Tensor) -> Tensor:
    return x.view(x.size(0), -1)


class Builder:
    """Appends a step for each word, if what there is so far allows it."""

    def __init__(self, web: Web) -> None:
        self.web, self.network = web, Network()
        self.x = make_input(web)
        self.tensors = [self.x.clone()]
        self.generator = torch.Generator().manual_seed(web.seed)

    @property
    def channels(self) -> int:
        return self.tensors[-1].shape[1]

    def build(self) -> Network:
        torch.manual_seed(self.web.seed)
        for word in self.web.words:
            self.add_word(*word)
        self.add_head()
        return self.network.double().eval()

    def add_word(self, kind: str, a: int, b: int) -> None:
        if kind in ("sum", "in-place sum", "cat", "go back"):
            others = [n for n, t in enumerate(self.tensors[:-1]) if self.meets(kind, t)]
            if others:
                self.add(kind, 0, others[-1 - a % min(3, len(others))])
        elif kind == "again":
            if len(self.network.parts):
                self.add("module", a % len(self.network.parts))
        elif kind in ("relu", "relu_"):
            self.add(kind)
        elif kind in ("max pool", "pad", "upsample"):
            if self.web.dims and (kind != "max pool" or self.web.dims == 2):
                self.add(kind)
        else:
            module = self.make(kind, a, b)
            if module is not None:
                self.network.parts.append(module.double().eval())
                if not self.add("module", len(self.network.parts) - 1):
                    del self.network.parts[-1]

    def meets(self, kind: str, other: Tensor) -> bool:
        x = self.tensors[-1]
        return kind == "go back" or (x.shape == other.shape and (kind != "cat" or x.shape[1] <= 8))

    def add(self, what: str, number: int = 0, other: int = 0) -> bool:
        """Append a step; not where it cannot run."""
        step = (what, number, other)
        try:
            with torch.no_grad():
                y = self.network.run(step, self.tensors)
        except (RuntimeError, ValueError, AssertionError):
            return False
        if y.numel() == 0 or y.numel() > 10000:
            return False
        self.network.steps.append(step)
        self.tensors.append(y)
        return True

    def make(self, kind: str, a: int, b: int) -> nn.Module | None:
        dims, channels = self.web.dims, self.channels
        if kind == "norm":
            return self.make_norm(a, b)
        if kind == "act":
            return (nn.SiLU(), nn.ReLU(inplace=True), nn.Tanh(), nn.LeakyReLU(0.2))[a % 4]
        if kind == "still":
            return (nn.Identity(), nn.Dropout(0.5), nn.Dropout(0.5, inplace=True))[a % 3]
        if dims == 0:
            return nn.Linear(channels, (4, 6)[a % 2], bias=b % 2 == 0) if kind == "mix" else None
        if kind == "mix":
            groups = (1, 2, channels)[b % 3]
            groups = groups if channels % groups == 0 else 1
            mode = MODES[(a + b) % 5]
            out = groups * max(1, (4, 6, 4)[a % 3] // groups)
            options = {"padding": (0, 1)[a // 3 % 2], "stride": (1, 1, 2)[b // 3 % 3], "dilation": (1, 2)[b // 5 % 2]}
            kernel = (1, 2, 3)[(a + b) % 3]
            return getattr(nn, f"Conv{dims}d")(
                channels, out, kernel, groups=groups, bias=a % 2 == 0, padding_mode=mode, **options
            )
        if kind == "transposed":
            groups = (1, 2)[b % 2] if channels % 2 == 0 else 1
            return getattr(nn, f"ConvTranspose{dims}d")(
                channels, 4, (1, 2, 3)[a % 3], stride=(1, 2)[b // 2 % 2], groups=groups, bias=a % 2 == 0
            )
        if kind == "pool":
            pools = (
                ("MaxPool", {"padding": b % 2, "stride": 1}),
                ("AvgPool", {"padding": b % 2, "count_include_pad": b % 4 < 2, "ceil_mode": b % 3 == 0}),
                ("MaxPool", {"ceil_mode": True}),
            )
            name, options = pools[a % 3]
            return getattr(nn, f"{name}{dims}d")(2, **options)
        pads = (f"ReflectionPad{dims}d", f"ReplicationPad{dims}d", f"ConstantPad{dims}d")
        return getattr(nn, pads[a % 3])(1, **({"value": float(b % 2)} if a % 3 == 2 else {}))

    def make_norm(self, a: int, b: int) -> nn.Module:
        """Batch norms of torch or ours, fused ones, instance norms; with negative scales, or none, or no shift."""
        dims, channels = max(self.web.dims, 1), self.channels
        names = ("BatchNorm", "BatchNorm", "BatchNorm", "InstanceNorm", "fused", "ours")
        name = names[a % 6]
        options = {"affine": a % 5 != 0} if name != "InstanceNorm" else {"affine": True, "track_running_stats": True}
        if name == "InstanceNorm" and self.web.dims == 0:
            name, options = "BatchNorm", {}
        library = anynorm if name in ("fused", "ours") else nn
        if name == "fused":
            options["activation"] = ("relu", "identity", "silu")[b % 3]
        kind = {"fused": f"BatchNormAct{dims}d", "ours": f"BatchNorm{dims}d"}.get(name, f"{name}{dims}d")
        norm = getattr(library, kind)(channels, **options).double()
        with torch.no_grad():
            norm.running_var.uniform_(0.3, 2)
            if b % 4 != 3:  # else a shift of exactly 0
                norm.running_mean.normal_()
            if norm.affine:
                norm.weight.normal_(1, 0.8)
                if b % 2:
                    norm.weight.abs_()
                if b % 4 != 3:
                    norm.bias.normal_()
        return norm

    def add_head(self) -> None:
        """Nothing, or features and a linear layer."""
        dims, head = self.web.dims, self.web.head
        if dims and head in (1, 2, 3):
            self.add(("mean", "flatten", "view")[head - 1])
        if dims and head == 4:
            self.add("last")
        if head:
            norm = nn.BatchNorm1d(self.channels).double().eval()
            if self.tensors[-1].dim() <= 3 and self.web.seed % 2:
                norm.running_mean.normal_()
                self.network.parts.append(norm)
                self.add("module", len(self.network.parts) - 1)
            self.network.parts.append(nn.Linear(self.tensors[-1].shape[-1], 3).double())
            self.add("module", len(self.network.parts) - 1)


def build(web: Web) -> Network:
    """The network in float64 and in evaluation."""
    return Builder(web).build()


def make_input(web: Web, extra: int = 0) -> Tensor:
    """An input of the network; `extra` samples and positions more than it was built for."""
    generator = torch.Generator().manual_seed(web.seed + extra)
    sizes = (size + extra for size in SIZE[web.dims])
    return torch.randn(2 + extra, 4, *sizes, generator=generator, dtype=torch.float64)


KINDS = ("norm", "mix", "mix", "transposed", "act", "relu", "relu_", "sum", "in-place sum", "cat", "go back", "again")
BETWEEN = (
    "still",
    "pool",
    "border",
    "max pool",
    "pad",
    "upsample",
    "relu",
    "sum",
    "in-place sum",
    "cat",
    "again",
    "norm",
)


@st.composite
def webs(draw, dims: int):
    """Any of them: norms stand beside layers, with what there may be between, more often than chance would have it."""
    number = st.integers(0, 59)

    def words(*kinds: str):
        return st.tuples(st.sampled_from(kinds), number, number)

    layer, norm = words("mix", "mix", "transposed"), words("norm")
    between = st.lists(words(*BETWEEN), max_size=2)
    behind = st.tuples(layer, between, norm, words("relu", "act", "go back"))
    meanwhile = (("go back", 0, 0), ("relu_", 0, 0), ("go back", 1, 0))  # the norm's input is changed behind it
    changed = st.sampled_from([[], [], list(meanwhile)])
    before = st.tuples(words("relu", "relu_", "go back", "mix"), norm, changed, between, layer)
    others = st.lists(words(*KINDS), min_size=1, max_size=3)
    phrases = draw(st.lists(st.one_of(behind, before, others), min_size=1, max_size=4))
    parts = [part for phrase in phrases for part in phrase]
    flat = [word for part in parts for word in (part if isinstance(part, list) else [part])]
    return Web(tuple(flat), draw(st.integers(0, 4)), dims, draw(st.integers(0, 999)))
