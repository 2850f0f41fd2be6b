"""A norm of every class in the family, with inputs in every layout and what the reference needs to know about it.

Patterns are interpreted here a second time, in the simplest way, so that a fault in `anynorm.pooling` cannot hide.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import anynorm
from anynorm import FAMILY, reference

SIZES = {"n": (5,), "c": (6,), "g": (3,), "k": (2,), "d": (4, 9)}
SPATIAL = {"BatchNorm1d": (7,), "InstanceNorm1d": (9,), "GroupNorm": (3, 5)}
ARGUMENTS = {"LayerNorm": (SIZES["d"],), "RMSNorm": (SIZES["d"],), "GroupNorm": (3, 6)}
LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "expanded")


class Operations(TorchDispatchMode):
    """Which operations are seen by a mode of somebody's."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Specimen:
    scheme: str
    kind: str
    spatial: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind}-{len(self.shape)}d"

    @property
    def view(self) -> dict[str, tuple[int, ...]]:
        """Sizes of each named axis on the left of the pattern."""
        left = FAMILY[self.scheme].pattern.split("->")[0].replace("(", "").replace(")", "").split()
        return {name: self.spatial if name == "s" else SIZES[name] for name in left}

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of x, the names in parentheses being one axis."""
        pattern = FAMILY[self.scheme].pattern.split("->")[0]
        sizes = [size for name, axis in self.view.items() if name not in ("g", "k") for size in axis]
        if "(g k)" in pattern:
            sizes.insert(1, prod(SIZES["g"] + SIZES["k"]))
        return tuple(sizes)

    def spread(self, names: list[str]) -> tuple[int, ...]:
        """Sizes of the view, 1 where the axis is not among `names`."""
        return tuple(size if name in names else 1 for name, axis in self.view.items() for size in axis)

    @property
    def flat(self) -> tuple[int, ...]:
        return tuple(size for axis in self.view.values() for size in axis)

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes of the view that are pooled."""
        kept = FAMILY[self.scheme].pattern.split("->")[1].split()
        pooled = self.spread([name for name in self.view if name not in kept])
        letters = [name for name, axis in self.view.items() for _ in axis]
        return tuple(a for a, name in enumerate(letters) if name not in kept and len(pooled) > a)

    def make(self, library: object = anynorm, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
        """The layer with random gamma, beta and running averages."""
        if self.scheme == "instance":
            options.setdefault("affine", True)
        module = getattr(library, self.kind)(*ARGUMENTS.get(self.kind, (SIZES["c"][0],)), dtype=dtype, **options)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, tensor in module.state_dict().items():
                if name != "num_batches_tracked":
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
                if name == "running_var":
                    tensor.copy_(tensor.abs() + 0.5)
        return module

    def draw(self, layout: str = "contiguous", dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
        return lay_out(self.shape, layout, dtype, seed)

    def forward(self, module: nn.Module, x: torch.Tensor, given: tuple | None = None) -> np.ndarray:
        """What y should be, in float64."""
        return reference.forward(
            wide(x).reshape(self.flat), self.axes, *self.affine(module), **self.options(module, given)
        )

    def gradients(self, module: nn.Module, g: torch.Tensor, x: torch.Tensor, given: tuple | None = None):
        """What dx, dgamma and dbeta should be, in float64."""
        gamma, _ = self.affine(module)
        x_wide, g_wide = wide(x).reshape(self.flat), wide(g).reshape(self.flat)
        return reference.gradients(g_wide, x_wide, self.axes, gamma, **self.options(module, given))

    def affine(self, module: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        shape = self.spread(FAMILY[self.scheme].affine.split())
        weight, bias = module.weight, getattr(module, "bias", None)
        gamma = np.ones(shape) if weight is None else wide(weight).reshape(shape)
        return gamma, np.zeros(shape) if bias is None else wide(bias).reshape(shape)

    def options(self, module: nn.Module, given: tuple | None) -> dict:
        eps = module.eps
        if eps is None:
            eps = float(
                torch.finfo(
                    torch.float64 if getattr(module.weight, "dtype", None) == torch.float64 else torch.float32
                ).eps
            )
        return {"eps": eps, "centred": FAMILY[self.scheme].centred, "given": given}

    def running(self, module: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        """The running averages, spread over the view."""
        shape = self.spread(["c"])
        return wide(module.running_mean).reshape(shape), wide(module.running_var).reshape(shape)


def wide(t: torch.Tensor) -> np.ndarray:
    return t.detach().double().contiguous().numpy()


def lay_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random values with mean 3 in the given memory layout."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> torch.Tensor:
        return (torch.randn(sizes, generator=generator, dtype=torch.float64) + 3).to(dtype)

    if layout == "channels_last":
        x = draw(*shape)
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if len(shape) in formats:
            return x.to(memory_format=formats[len(shape)])
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return draw(*reversed(shape)).permute(*reversed(range(len(shape))))
    if layout == "strided":
        return draw(*(2 * size for size in shape))[tuple(slice(1, None, 2) for _ in shape)]
    if layout == "expanded":
        return (
            draw(*shape[:-1], 1).expand(shape) + 0 * draw(*shape)
            if len(shape) < 2
            else draw(1, *shape[1:]).expand(shape)
        )
    return draw(*shape)


def find_specimens() -> list[Specimen]:
    """Every class of torch.nn in the family; BatchNorm1d and GroupNorm with and without positions."""
    found = []
    for scheme in FAMILY.values():
        if scheme.variant_of:  # They have tests of their own.
            continue
        for kind in scheme.classes:
            dims = int(kind[-2]) if kind.endswith("d") else 0
            found.append(Specimen(scheme.name, kind, SPATIAL.get(kind, (4, 3, 5)[:dims])))
            if kind in ("BatchNorm1d", "GroupNorm"):
                found.append(Specimen(scheme.name, kind, ()))
    return found


SPECIMENS = find_specimens()
TRACKING = [s for s in SPECIMENS if "running" in FAMILY[s.scheme].source_names]


def assert_close(got: torch.Tensor, true: np.ndarray, factor: float, what: str, term: float = 0.0) -> None:
    """|got - true| <= factor * eps(dtype) * the largest value or summed term; half types: 1 ulp + 1e-6 of it."""
    largest = max(float(np.abs(true).max(initial=0.0)), term)
    eps = torch.finfo(got.dtype).eps
    if got.dtype in (torch.bfloat16, torch.float16):
        smallest = torch.finfo(got.dtype).smallest_normal
        allowed = eps * np.maximum(np.abs(true), smallest) + 1e-6 * largest
    else:
        allowed = np.full(true.shape, factor * eps * largest)
    error = np.abs(wide(got).reshape(true.shape) - true)
    worst = np.unravel_index(np.argmax(error - allowed), error.shape) if error.size else ()
    assert error.size == 0 or (error <= allowed).all(), (
        f"{what}: {error[worst]:.3g} at {worst}, allowed {allowed[worst]:.3g}, true value {true[worst]:.3g}"
    )


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 3e-6) -> None:
    """Numbers without axes are sums of hundreds of terms that nearly cancel, and get ten times the tolerance."""
    for mine, its in zip(ours, theirs, strict=True):
        scale = (1 if mine.dim() else 10) * max(1.0, float(its.detach().abs().max()))
        torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance * scale)
