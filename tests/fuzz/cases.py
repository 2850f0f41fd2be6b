"""Which calls are tried: norms, sizes, layouts, dtypes, masks, what follows, data; the simplest are drawn first."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from hypothesis import strategies as st

from fuzz.families import DATA, GRADIENTS, Family, huge, large_mean, normal
from fuzz.layouts import LAYOUTS

NORMS = ("batch", "instance", "group", "layer", "rms", "ghost", "renorm")
RUNNING = ("batch", "instance", "ghost", "renorm")
PER_SAMPLE = ("instance", "group", "layer", "rms")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
MASKS = ("", "prefix", "holes", "empty sample", "full")
ACTIVATIONS = (None, "identity", "relu", "leaky_relu", "silu", "gelu", "relu6", "hardswish", "elu", "tanh", "sigmoid")
ACTIVATIONS += ("mish", "gelu_tanh", "leaky_relu(0.3)", "elu(0.5)")
SPATIAL = {
    2: [()],
    3: [(n,) for n in (2, 1, 3, 7, 8, 9, 16, 31, 32, 33, 49, 63, 64, 100, 128, 129, 257, 1000, 4096)],
    4: [(1, 1), (1, 2), (2, 2), (3, 5), (7, 7), (8, 8), (1, 50), (14, 14), (31, 33)],
    5: [(1, 1, 1), (2, 3, 4), (4, 4, 4), (3, 7, 7)],
}
LARGEST = 20_000  # elements; an example then takes some milliseconds


@dataclass(frozen=True)
class Case:
    """One call of a norm, forward and backward, in all that can change its numbers."""

    norm: str
    shape: tuple[int, ...]
    data: Family = normal
    gradient: Family = normal
    seed: int = 0
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    size: int = 1  # groups, samples in a ghost, or how many axes layer and RMS norm take
    given: bool = False  # normalize by running averages
    affine: str = "both"  # or "weight" or "none"
    spread: float = 1.0  # of gamma and beta between channels
    mask: str = ""
    activation: str | None = None
    residual: bool = False
    eps: float = 1e-5
    wide: bool = False  # float32 parameters beside half input
    momentum: float = 0.1
    threads: int = 1
    path: str = "kernels"

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes of x that share statistics; for group and ghost norm before the split."""
        ndim = len(self.shape)
        if self.norm in ("layer", "rms"):
            return tuple(range(ndim - self.size, ndim))
        return tuple(range(2, ndim)) if self.norm in ("instance", "group") else (0, *range(2, ndim))

    @property
    def values(self) -> int:
        """How many values share a mean, at least."""
        count = prod(self.shape[axis] for axis in self.axes)
        if self.norm == "group":
            return count * (self.shape[1] // self.size)
        if self.norm == "ghost":
            return prod(self.shape[2:]) * min(self.size, self.shape[0])
        return count

    @property
    def positions(self) -> tuple[int, ...]:
        """The shape of a mask."""
        if self.norm in ("layer", "rms"):
            return self.shape[: len(self.shape) - self.size]
        return (self.shape[0], *self.shape[2:])


def is_allowed(case: Case) -> bool:
    """Whether the norm takes it: one value per mean is refused, and so are limits that make 0 / 0."""
    if case.mask and case.norm in ("layer", "rms") and not case.positions:
        return False
    if case.norm == "renorm" and case.eps == float("inf"):
        return False  # r is Inf / Inf
    if case.norm == "ghost" and case.momentum == 1 and case.data is huge:
        return False  # an average that left its dtype's range, times 0, as in torch
    if case.eps == 0:
        varied = case.data in (normal, large_mean) and case.dtype not in HALF and case.values > 2 and not case.mask
        if not varied or case.layout == "expanded" or case.norm not in PER_SAMPLE:
            return False
    if case.given or case.norm in ("layer", "rms") or (case.norm == "group" and case.shape[0] > 1):
        return True
    return case.values > 1


@st.composite
def shapes(draw, ndims: tuple[int, ...] = (3, 2, 4, 5), largest: int = LARGEST) -> tuple[int, ...]:
    """(N, C, *positions); sizes straddle the kernels' blocks and vectors."""
    positions = draw(st.sampled_from([p for p in SPATIAL[draw(st.sampled_from(ndims))] if prod(p) <= largest]))
    channels = [n for n in (1, 2, 3, 4, 6, 8, 16, 17, 34, 64, 130, 257) if n * prod(positions) <= largest]
    c = draw(st.sampled_from(channels))
    samples = [n for n in (1, 2, 3, 5, 8, 9, 33, 38, 128, 1000, 5000) if n * c * prod(positions) <= largest]
    return (draw(st.sampled_from(samples)), c, *positions)


def draw_size(draw, norm: str, shape: tuple[int, ...]) -> int:
    if norm == "group":
        return draw(st.sampled_from([n for n in range(1, shape[1] + 1) if shape[1] % n == 0]))
    if norm in ("layer", "rms"):
        return draw(st.integers(1, len(shape) - 1))
    return draw(st.sampled_from([2, 1, 3, 4, 7, 16])) if norm == "ghost" else 1


@st.composite
def cases(draw, norms: tuple[str, ...] = NORMS, **fixed) -> Case:
    """Any call that the norms allow; `fixed` are fields that are not drawn."""
    fixed = {name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in fixed.items()}
    norm, shape = draw(st.sampled_from(norms)), draw(fixed.pop("shape", shapes()))
    dtype = draw(fixed.pop("dtype", st.sampled_from(DTYPES)))
    fields = {
        "data": st.sampled_from(DATA),
        "gradient": st.sampled_from(GRADIENTS),
        "seed": st.integers(0, 99),
        "dtype": st.just(dtype),
        "layout": st.sampled_from(LAYOUTS),
        "given": st.booleans() if norm in RUNNING else st.just(False),
        "affine": st.sampled_from(("both", "weight", "none")),
        "spread": st.sampled_from((0.0, 1.0, 30.0, 1e-3)),
        "mask": st.sampled_from(MASKS),
        "activation": st.sampled_from(ACTIVATIONS),
        "residual": st.booleans(),
        "eps": st.sampled_from((1e-5, 1e-12, 1.0, 0.0, float("inf"))),
        "wide": st.booleans() if dtype in HALF else st.just(False),
        "momentum": st.sampled_from((0.1, 1.0, 0.001)) if norm in RUNNING else st.just(0.1),
        "threads": st.sampled_from((1, 2)),
        "path": st.sampled_from(("kernels", "plain", "watched")),
    }
    drawn = {name: draw(strategy) for name, strategy in (fields | fixed).items()}
    return Case(norm, shape, size=draw_size(draw, norm, shape), **drawn)


def find_mask(case: Case) -> torch.Tensor | None:
    """The mask of a case, bool; at least two positions are real."""
    if not case.mask:
        return None
    generator = torch.Generator().manual_seed(case.seed)
    mask = torch.ones(case.positions, dtype=torch.bool)
    if case.mask == "holes":
        mask = torch.rand(case.positions, generator=generator) < 0.7
    elif case.mask == "prefix" and len(case.positions) > 1:
        reach = torch.randint(1, case.positions[-1] + 1, case.positions[:1], generator=generator)
        mask = mask & (torch.arange(case.positions[-1]) < reach.view(-1, *[1] * (len(case.positions) - 1)))
    elif case.mask == "empty sample":
        mask[int(torch.randint(case.positions[0], (1,), generator=generator))] = False
    if mask.sum() < 2:
        mask.view(-1)[:2] = True
    for part in mask.split(case.size) if case.norm == "ghost" else ():
        part.mul_(part.sum() > 1)
    return mask
