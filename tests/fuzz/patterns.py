"""Norms that nobody named: patterns of any axes, kept and pooled at will, read here once more in the simplest way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

import anynorm
from fuzz.call import along, compare
from fuzz.cases import DTYPES
from fuzz.families import DATA, GRADIENTS, Family, normal
from fuzz.layouts import LAYOUTS, draw
from fuzz.oracle import Question, answer


@dataclass(frozen=True)
class Pattern:
    """Axes of a view with their sizes; `joined` says which one is one axis of x with the next."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    kept: tuple[str, ...]
    affine: tuple[str, ...] = ()
    joined: int = -1
    centred: bool = True
    tracked: bool = False
    training: bool = True
    bias: bool = True
    data: Family = normal
    gradient: Family = normal
    seed: int = 0
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    eps: float = 1e-5
    path: str = "kernels"

    @property
    def text(self) -> str:
        words = list(self.names)
        if self.joined >= 0:
            words[self.joined : self.joined + 2] = [f"({words[self.joined]} {words[self.joined + 1]})"]
        return f"{' '.join(words)} -> {' '.join(self.kept)}"

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = list(self.sizes)
        if self.joined >= 0:
            sizes[self.joined : self.joined + 2] = [sizes[self.joined] * sizes[self.joined + 1]]
        return tuple(sizes)


@st.composite
def patterns(draw_from) -> Pattern:
    """Two to five axes, named by any letters but s and d, which stand for several."""
    names = tuple(draw_from(st.lists(st.sampled_from("nchwtbmgkx"), min_size=2, max_size=5, unique=True)))
    sizes = tuple(draw_from(st.sampled_from([2, 1, 3, 5, 8, 17])) for _ in names)
    keep = draw_from(st.lists(st.booleans(), min_size=len(names), max_size=len(names)).filter(lambda t: not all(t)))
    vary = draw_from(st.lists(st.booleans(), min_size=len(names), max_size=len(names)))
    centred = draw_from(st.booleans())
    return Pattern(
        names, sizes, tuple(n for n, yes in zip(names, keep) if yes), tuple(n for n, yes in zip(names, vary) if yes),
        draw_from(st.integers(-1, len(names) - 2)), centred, draw_from(st.booleans()) and centred,
        *(draw_from(s) for s in (st.booleans(), st.booleans(), st.sampled_from(DATA), st.sampled_from(GRADIENTS))),
        draw_from(st.integers(0, 99)), draw_from(st.sampled_from(DTYPES)), draw_from(st.sampled_from(LAYOUTS)),
        draw_from(st.sampled_from((1e-5, 1e-12, 1.0))), draw_from(st.sampled_from(("kernels", "plain", "watched"))),
    )  # fmt: skip


def is_pattern(p: Pattern) -> bool:
    """More than one value in each pool, and an axis of x that layouts can move."""
    return np.prod([size for name, size in zip(p.names, p.sizes) if name not in p.kept]) > 1 and len(p.shape) > 1


def check_pattern(p: Pattern) -> None:
    """y, all gradients and running averages of AnyNorm, against the formula."""
    sizes = dict(zip(p.names, p.sizes))
    norm = anynorm.AnyNorm(
        p.text, " ".join(p.affine), centred=p.centred, eps=p.eps, bias=p.bias, track_running_stats=p.tracked,
        dtype=p.dtype, **sizes,
    ).train(p.training)  # fmt: skip
    torch.manual_seed(p.seed)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor is None or tensor.normal_()
    x = draw(p.data, p.seed, p.shape, p.dtype, p.layout)
    g = draw(p.gradient, p.seed + 1, p.shape, p.dtype)
    tracked = [tuple(n for n in p.kept if n != "n")] * 2 if p.tracked else []
    old = [spread(b, p, names) for b, names in zip((norm.running_mean, norm.running_var), tracked)]
    leaf = x.detach().requires_grad_()
    wanted = {"dx": leaf, "dgamma": norm.weight, "dbeta": norm.bias}
    wanted = {name: t for name, t in wanted.items() if t is not None}
    with along(p.path):
        y = norm(leaf)
        got = {"y": y, **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), g)))}
    zero = np.zeros([1] * len(p.sizes))
    q = Question(
        spread(x, p, p.names), spread(g, p, p.names),
        tuple(a for a, name in enumerate(p.names) if name not in p.kept),
        zero + 1 if norm.weight is None else spread(norm.weight, p, p.affine),
        zero if norm.bias is None else spread(norm.bias, p, p.affine),
        zero, np.ones(p.sizes, dtype=bool), p.eps,
        tolerance=1e-13 if p.dtype == torch.float64 else 1e-6,
        narrow=p.dtype != torch.float64,
        centred=p.centred,
        given=tuple(old) if p.tracked and not p.training else None,
        # Given statistics under a mode are in the precision of x, see plain.compose.
        sums=1e-6,  # what has no walk is summed in the precision of x
    )  # fmt: skip
    truth = answer(q)
    for name, value in got.items():
        compare(value, *truth[name], f"{p.text}: {name}")
    for name, before, buffer in zip(("mean", "var"), old, (norm.running_mean, norm.running_var)):
        new, off = truth[name] if p.training else (before, zero)
        if "n" in p.kept:
            new, off = (np.mean(t, axis=p.names.index("n"), keepdims=True) for t in (new, off))
        share = 0.1 if p.training else 0.0
        off = share * off + q.tolerance * np.abs(before)
        compare(buffer, (1 - share) * before + share * new, off, f"{p.text}: running_{name}")


def spread(t: torch.Tensor, p: Pattern, names: tuple[str, ...]) -> np.ndarray:
    """In the axes of the view, of size 1 where it does not vary."""
    return (
        t.detach()
        .double()
        .clone()
        .numpy()
        .reshape([size if name in names else 1 for name, size in zip(p.names, p.sizes)])
    )
