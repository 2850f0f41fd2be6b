"""Data that round alike: families, layouts and norms, and the errors of y, the averages and all gradients.

Random data hide the roundings of a sum, since those cancel. The families here are such that they do not: two values,
constants, few levels, sorted, alternating, one outlier, geometric, heavy tails. `make accuracy` writes the worst of
each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from anynorm import reference


@dataclass(frozen=True)
class Layout:
    """A shape, samples and channels first, and how it lies in memory."""

    shape: tuple[int, ...]
    channels_last: bool = False


LAYOUTS = {
    "rows": Layout((16, 4, 16, 32)),
    "long rows": Layout((2, 2, 50_003)),
    "short rows": Layout((128, 4, 7, 7)),
    "channels_last": Layout((16, 4, 16, 32), channels_last=True),
    "columns": Layout((4096, 4)),
    "features": Layout((48, 768)),
}
# Each walk over memory in each norm that takes it.
CASES = [
    *(("batch", layout) for layout in ("rows", "long rows", "short rows", "channels_last", "columns")),
    *(("instance", layout) for layout in ("rows", "long rows", "channels_last")),
    *(("group", layout) for layout in ("rows", "short rows", "channels_last")),
    *((norm, layout) for norm in ("layer", "rms") for layout in ("features", "long rows")),
]


def fill(shape: tuple[int, ...], values: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """values(position) for each channel, where position counts its elements over samples and positions."""
    size = int(np.prod(shape)) // shape[1]
    flat = np.asarray(values(np.arange(size)), dtype=np.float64).astype(np.float32)
    by_channel = np.broadcast_to(flat, (shape[1], size)).reshape(shape[1], shape[0], *shape[2:])
    return np.ascontiguousarray(np.swapaxes(by_channel, 0, 1))


def noise(i: np.ndarray, kind: str = "normal") -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.standard_normal(i.shape) if kind == "normal" else generator.standard_t(1.5, i.shape)


def outlier(i: np.ndarray, base: np.ndarray | float) -> np.ndarray:
    """1e6 in the third place of `base`."""
    return np.where(i == min(2, i.size - 1), 1e6, base)


FAMILIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "two values": lambda i: np.where(i % 32 < 8, 0.0, 1.9536933898925781),
    "two values, one rare": lambda i: np.where(i % 61 == 0, 0.3, 0.1),
    "constant": lambda i: np.full(i.shape, 0.1),
    "seven levels": lambda i: (i * 5 % 7) * 0.37,
    "sorted": lambda i: i / i.size * 3.3,
    "alternating": lambda i: np.where(i % 2, 1.1, -0.7),
    "outlier among ones": lambda i: outlier(i, 1.0),
    "outlier among two values": lambda i: outlier(i, np.where(i % 2, 0.3, 0.1)),
    "geometric": lambda i: 1.7 ** -(i % 60.0),
    "heavy tails": lambda i: noise(i, "heavy"),
    "normal": lambda i: noise(i),
}
GRADIENTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "normal": lambda i: np.random.default_rng(1).standard_normal(i.shape),
    "mean 10": lambda i: np.random.default_rng(1).standard_normal(i.shape) + 10,
    "constant": lambda i: np.full(i.shape, 0.1),
    "two values": lambda i: np.where(i % 3 == 0, 0.7, -1.3),
}


def lay_out(t: Tensor, layout: Layout) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if layout.channels_last else t


def draw_x(family: str, layout: Layout) -> Tensor:
    """float32, in the layout's shape and memory."""
    return lay_out(torch.from_numpy(fill(layout.shape, FAMILIES[family])), layout)


def draw_gradient(family: str, x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(torch.from_numpy(fill(tuple(x.shape), GRADIENTS[family])))


def make_batch(lib: Any, shape: tuple[int, ...], eps: float, act: str) -> nn.Module:
    kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d"}[len(shape)]
    name = kind.replace("Norm", "NormAct") if act else kind
    return getattr(lib, name)(shape[1], eps=eps, momentum=1.0)


def make_instance(lib: Any, shape: tuple[int, ...], eps: float, act: str) -> nn.Module:
    name = "InstanceNorm2d" if len(shape) == 4 else "InstanceNorm1d"
    return getattr(lib, name.replace("Norm", "NormAct") if act else name)(shape[1], eps=eps, affine=True)


def make_group(lib: Any, shape: tuple[int, ...], eps: float, act: str) -> nn.Module:
    return getattr(lib, "GroupNormAct" if act else "GroupNorm")(2, shape[1], eps=eps)


def make_layer(lib: Any, shape: tuple[int, ...], eps: float, act: str) -> nn.Module:
    return getattr(lib, "LayerNormAct" if act else "LayerNorm")(shape[-1:], eps=eps)


def make_rms(lib: Any, shape: tuple[int, ...], eps: float, act: str) -> nn.Module:
    return getattr(lib, "RMSNormAct" if act else "RMSNorm")(shape[-1:], eps=eps)


NORMS = {"batch": make_batch, "instance": make_instance, "group": make_group, "layer": make_layer, "rms": make_rms}
MASKED = ("batch", "instance", "group")  # that share statistics over positions


def find_view(norm: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The shape in which the reference sees x, the axes it pools, and the shape of gamma there."""
    positions = int(np.prod(shape[2:]))
    if norm == "batch":
        return (shape[0], shape[1], positions), (0, 2), (1, shape[1], 1)
    if norm == "instance":
        return (shape[0], shape[1], positions), (2,), (1, shape[1], 1)
    if norm == "group":
        return (shape[0], 2, shape[1] // 2, positions), (2, 3), (1, 2, shape[1] // 2, 1)
    return (-1, shape[-1]), (1,), (1, shape[-1])


def measure(lib: Any, norm: str, x: Tensor, g: Tensor, how: str = "bare", eps: float = 1e-5) -> dict[str, float]:
    """Errors of y, the running variance and the gradients, each in the measure of docs/accuracy.md.

    Args:
        how: "bare", "masked" by a mask that is full, "fused" with relu, or both.
    """
    shape = tuple(x.shape)
    view, axes, gamma_shape = find_view(norm, shape)
    act = "relu" if "fused" in how else ""
    module = NORMS[norm](lib, shape, eps, act)
    options = {}
    if "masked" in how and norm in MASKED:
        options["mask"] = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(leaf, **options)
    found = torch.autograd.grad(y, [leaf, *module.parameters()], g)
    rx, rg = (t.contiguous().double().numpy().reshape(view) for t in (x, g))
    centred = norm != "rms"
    y_true = reference.forward(rx, axes, eps=eps, centred=centred)
    if act:  # where y is 0 by a hair the derivative may be either
        rg = rg * (y.detach().contiguous().double().numpy().reshape(view) > 0)
        y_true = np.maximum(y_true, 0)
    mean, var = reference.moments(rx, axes, centred)
    rstd = 1 / np.sqrt(var + eps)
    true = reference.gradients(rg, rx, axes, np.ones(gamma_shape), eps, centred=centred)
    terms = np.abs(rg * rstd).max(), total(rg * (rx - mean) * rstd, gamma_shape), total(rg, gamma_shape)
    errors = {"y": worst(y.detach(), y_true, np.abs(y_true).max())}
    for name, got, want, size in zip(("dx", "dgamma", "dbeta"), found, true, terms, strict=False):
        errors[name] = worst(got, want, np.maximum(np.abs(want).max() if name == "dx" else 0, size))
    if norm == "batch":
        count = rx.size // shape[1]
        errors["running_var"] = worst(module.running_var, var * (count / (count - 1)), var.max() * count / (count - 1))
    return errors


def total(terms: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The sum of the sizes of the terms that a parameter's gradient adds up."""
    return reference.shrink(np.abs(terms), shape)


def worst(got: Tensor, true: np.ndarray, size: Any) -> float:
    """The largest error by its size, or the error itself where every term is 0."""
    difference = np.abs(got.contiguous().double().numpy().reshape(true.shape) - true)
    return float((difference / np.where(size > 0, size, 1)).max())


def table(lib: Any, peer: Any, broken: list[str]) -> Iterator[str]:
    """Rows of docs/accuracy.md: the worst of forward and of gradients over layouts, norms and gradients.

    Args:
        broken: receives what is beyond 1e-6 of `lib`.
    """
    yield "| data | anynorm | torch | worst of anynorm's |"
    yield "|---|---|---|---|"
    for family in FAMILIES:
        cells, where = [], ""
        for library in (lib, peer):
            forward = gradients = most = 0.0
            for (norm, layout), gradient in product(CASES, GRADIENTS):
                x = draw_x(family, LAYOUTS[layout])
                errors = measure(library, norm, x, draw_gradient(gradient, x))
                averages = [errors[name] for name in ("y", "running_var") if name in errors]
                forward = max(forward, *averages)
                gradients = max([gradients, *(e for name, e in errors.items() if name[0] == "d")])
                if library is lib and max(errors.values()) > most:
                    most, where = max(errors.values()), f"{norm}, {layout}, gradient {gradient}"
            cells.append(f"{forward:.0e} / {gradients:.0e}")
            if library is lib and most > 1e-6:
                broken.append(f"{family}: {where}: {most:.1e}")
        yield f"| {family} | {cells[0]} | {cells[1]} | {where} |"
