"""Measure the errors of anynorm and torch against float64 and write docs/accuracy.md: `make accuracy`.

Errors are relative to the largest value of the result or the largest term summed into it, whichever is larger, so that
they mean something where the true gradient is 0. Float64 is `anynorm.reference` on the same float32 input.
"""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import anynorm
from anynorm import reference

from . import hard_data

RATIOS = (0.0, 1.0, 1e2, 1e4, 1e6)
PROMISE = 1e-6
HARD = """## Data that round alike

Roundings of random data cancel in a sum; those of two values, of few levels or of a geometric row do not. Below is the
worst over batch, instance, group, layer and RMS norm, contiguous, channels_last and (N, C), runs of 16 to 50,003
positions, and four families of gradients: of y and the running variance / of all gradients. A gradient of gamma or beta
is measured here by the sum of the sizes of its terms: that is what a sum of rounded terms can keep, and what holds
behind an activation and under torch.compile too. Where nothing follows the norm its terms are exact and it is rounded
once. Sums in the kernels are double for this; `python -m benchmarks.builds OTHER.so` times two builds against each
other, and so says what it costs. Under a mode that watches the operations (FlopCounterMode) evaluation sums gradients
in the precision of x, within 1e-6 of the sum of the sizes of the terms.
"""
PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"


@dataclass(frozen=True)
class Case:
    """A norm on a shape in a layout; `axes` and `view` tell the reference what the norm pools."""

    name: str
    make: Callable
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    gamma: tuple[int, ...]
    view: tuple[int, ...] = ()
    layout: torch.memory_format = torch.contiguous_format
    running: bool = False
    centred: bool = True

    def __str__(self) -> str:
        place = "" if self.layout == torch.contiguous_format else ", channels_last"
        return f"{self.name} {self.shape}{place}{', evaluation' if self.running else ''}"


def find_cases() -> list[Case]:
    """Every layer in every layout it has, batch and running source, and one tensor of several blocks."""
    last, last3 = torch.channels_last, torch.channels_last_3d
    image, volume, large = (16, 16, 12, 12), (4, 8, 6, 6, 6), (32, 64, 28, 28)
    cases = [
        Case("BatchNorm1d", lambda lib: lib.BatchNorm1d(48), (200, 48), (0,), (1, 48)),
        Case("BatchNorm1d", lambda lib: lib.BatchNorm1d(16), (24, 16, 30), (0, 2), (1, 16, 1)),
        Case("BatchNorm2d", lambda lib: lib.BatchNorm2d(64), large, (0, 2, 3), (1, 64, 1, 1)),
        Case("InstanceNorm1d", lambda lib: lib.InstanceNorm1d(16, affine=True), (24, 16, 30), (2,), (1, 16, 1)),
        Case("LayerNorm", lambda lib: lib.LayerNorm(192), (64, 192), (1,), (192,)),
        Case("RMSNorm", lambda lib: lib.RMSNorm(192, eps=1e-5), (64, 192), (1,), (192,), centred=False),
        Case("BatchNorm2d", lambda lib: lib.BatchNorm2d(16), image, (0, 2, 3), (1, 16, 1, 1)),
        Case("BatchNorm2d", lambda lib: lib.BatchNorm2d(16), image, (0, 2, 3), (1, 16, 1, 1), running=True),
        Case("InstanceNorm2d", lambda lib: lib.InstanceNorm2d(16, affine=True), image, (2, 3), (1, 16, 1, 1)),
        Case("GroupNorm", lambda lib: lib.GroupNorm(4, 16), image, (2, 3, 4), (1, 4, 4, 1, 1), (16, 4, 4, 12, 12)),
        Case("LayerNorm", lambda lib: lib.LayerNorm(image[1:]), image, (1, 2, 3), image[1:]),
        Case("BatchNorm3d", lambda lib: lib.BatchNorm3d(8), volume, (0, 2, 3, 4), (1, 8, 1, 1, 1)),
        Case("InstanceNorm3d", lambda lib: lib.InstanceNorm3d(8, affine=True), volume, (2, 3, 4), (1, 8, 1, 1, 1)),
    ]
    formats = {4: last, 5: last3}
    return cases + [replace(case, layout=formats[len(case.shape)]) for case in cases if len(case.shape) in formats]


def draw(case: Case, ratio: float, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """x with mean `ratio` and standard deviation 1, and a gradient, in the case's layout."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(case.shape, generator=generator, dtype=torch.float64) + ratio).to(dtype)
    g = torch.randn(case.shape, generator=generator).to(dtype)
    return x.to(memory_format=case.layout), g.to(memory_format=case.layout)


def build(case: Case, library: object, x: torch.Tensor) -> nn.Module:
    """The layer with random gamma (negative ones too) and beta; in evaluation, with the statistics of x."""
    module = case.make(library).to(x.dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if case.running:
            mean, var = reference.moments(x.double().numpy(), case.axes)
            module.running_mean.copy_(torch.from_numpy(mean).flatten())
            module.running_var.copy_(torch.from_numpy(var).flatten())
    return module.train(not case.running)


def measure(case: Case, module: nn.Module, call: Callable, x: torch.Tensor, g: torch.Tensor) -> dict[str, float]:
    """Errors of y, dx, dgamma and dbeta."""
    view = case.view or case.shape
    bias = getattr(module, "bias", None)
    wide = {name: t.detach().double().numpy() for name, t in (("x", x), ("g", g), ("gamma", module.weight))}
    gamma = wide["gamma"].reshape(case.gamma)
    beta = 0.0 if bias is None else bias.detach().double().numpy().reshape(case.gamma)
    given = None
    if case.running:
        given = tuple(b.double().numpy().reshape(case.gamma) for b in (module.running_mean, module.running_var))
    options = {"eps": module.eps, "centred": case.centred, "given": given}
    rx, rg = wide["x"].reshape(view), wide["g"].reshape(view)
    y_true = reference.forward(rx, case.axes, gamma, beta, **options)
    dx_true, dgamma_true, dbeta_true = reference.gradients(rg, rx, case.axes, gamma, **options)
    mean, var = reference.moments(rx, case.axes, case.centred) if given is None else given
    rstd = 1 / np.sqrt(var + module.eps)

    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    inputs = [leaf, module.weight] + ([bias] if bias is not None else [])
    y = call(leaf)
    found = torch.autograd.grad(y, inputs, g)
    terms = [np.abs(gamma * rstd * rg).max(), np.abs(rg * (rx - mean) * rstd).max(), np.abs(rg).max()]
    errors = {"y": find_error(y, y_true, 0.0)}
    for name, got, true, term in zip(
        ("dx", "dgamma", "dbeta"), found, (dx_true, dgamma_true, dbeta_true), terms, strict=False
    ):
        errors[name] = find_error(got, true, term)
    return errors


def find_error(got: torch.Tensor, true: np.ndarray, term: float) -> float:
    """Largest error over the largest value or summed term."""
    difference = np.abs(got.detach().double().numpy().reshape(true.shape) - true).max()
    return float(difference / max(np.abs(true).max(), term)) if np.isfinite(difference) else float("inf")


def table(broken: list[str]) -> Iterator[str]:
    """Rows of the grid: the worst of forward and gradients, for ours, ours compiled and torch's.

    Args:
        broken: receives the cells of ours beyond the promise.
    """
    yield "| layer | path | " + " | ".join(f"{ratio:g}" for ratio in RATIOS) + " |"
    yield "|---|---|" + "---|" * len(RATIOS)
    for case in find_cases():
        for path, library, compiled in (
            ("anynorm", anynorm, False),
            ("anynorm, compiled", anynorm, True),
            ("torch", nn, False),
        ):
            cells = []
            torch.compiler.reset()
            for ratio in RATIOS:
                x, g = draw(case, ratio)
                module = build(case, library, x)
                call = torch.compile(module, fullgraph=True) if compiled else module
                errors = measure(case, module, call, x, g)
                gradients = max(error for name, error in errors.items() if name != "y")
                cells.append(f"{errors['y']:.0e} / {gradients:.0e}")
                if library is anynorm and max(errors.values()) > PROMISE:
                    broken.append(f"{case}, {path}, |mean|/std {ratio:g}: {errors}")
            yield f"| {case if path == 'anynorm' else ''} | {path} | " + " | ".join(cells) + " |"
            print(".", end="", flush=True)


def specials() -> Iterator[str]:
    """Inputs that have broken other norms."""
    yield "| input | anynorm | torch |"
    yield "|---|---|---|"
    for text, function in (
        ("batch norm of a channel that is 0.1 everywhere, beta 0.25: largest distance from beta", constant_channel),
        ("batch norm of values around 1e37: error of y", huge_values),
        ("batch norm of ones with one 1e6 among them: error of y", outlier),
        ("group norm, channels_last, of U(5, 6): error of y", uniform_group),
        ("layer norm in bfloat16, bias gradient of 1,000 rows of ones (true value 1000)", half_bias_gradient),
        ("batch norm in bfloat16, mean/std 1: error of y in units in the last place", half_ulps),
    ):
        yield f"| {text} | {function(anynorm)} | {function(nn)} |"


def constant_channel(library: object) -> str:
    norm = library.BatchNorm1d(1)
    nn.init.constant_(norm.bias, 0.25)
    return f"{float((norm(torch.full((1000, 1), 0.1)) - 0.25).abs().max()):.1g}"


def outlier(library: object) -> str:
    x = torch.ones(4096, 1)
    x[17] = 1e6
    return error_of(library.BatchNorm1d(1), x)


def huge_values(library: object) -> str:
    return error_of(library.BatchNorm1d(1), torch.randn(4096, 1, generator=torch.Generator().manual_seed(0)) * 1e37)


def error_of(norm: nn.Module, x: torch.Tensor) -> str:
    true = reference.forward(x.numpy(), (0,), eps=norm.eps)
    return f"{find_error(norm(x), true, 0.0):.0e}"


def uniform_group(library: object) -> str:
    x = torch.rand(8, 16, 32, 32, generator=torch.Generator().manual_seed(0)) + 5
    y = library.GroupNorm(4, 16)(x.to(memory_format=torch.channels_last))
    true = reference.forward(x.reshape(8, 4, 4, 32, 32).numpy(), (2, 3, 4))
    return f"{find_error(y.contiguous(), true, 0.0):.0e}"


def half_bias_gradient(library: object) -> str:
    norm = library.LayerNorm(8).bfloat16()
    norm(torch.randn(1000, 8).bfloat16()).sum().backward()
    return f"{float(norm.bias.grad[0]):g}"


def half_ulps(library: object) -> str:
    x = (torch.randn(512, 8, generator=torch.Generator().manual_seed(0)) + 1).bfloat16()
    y = library.BatchNorm1d(8).bfloat16()(x).detach().double().numpy()
    true = reference.forward(x.double().numpy(), (0,))
    ulp = 2.0 ** (np.floor(np.log2(np.abs(true) + 1e-30)) - 7)
    return f"{float((np.abs(y - true) / np.maximum(ulp, 2.0**-14)).max()):.2f}"


def main() -> None:
    warnings.filterwarnings("ignore")
    broken: list[str] = []
    grid, rest = "\n".join(table(broken)), "\n".join(specials())
    hard = "\n".join(hard_data.table(anynorm, nn, broken))
    verdict = "is broken" if broken else "is kept"
    PAGE.write_text(
        f"""# Accuracy

Written by `make accuracy`; torch's figures are from the same run. Each cell is the error of the forward result / the
worst error of all gradients, in float32, against the formula in float64 on the same input; columns are |mean|/std of
the input. Errors are relative to the largest value of the result or the largest term that is summed into it, whichever
is larger; float32 itself resolves 6e-8. The promise, at most 1e-6 in every cell of anynorm's, {verdict} in this run.

{grid}

{HARD}
{hard}

## Inputs that have broken other norms

{rest}

Machine: {platform.machine()}, {torch.get_num_threads()} threads; Python {platform.python_version()},
torch {torch.__version__}, NumPy {np.__version__}. CPU only: on other devices torch's own operations serve unless
`anynorm.exact(True)`, and nothing is measured there.
"""
    )
    if broken:
        sys.exit("beyond the promise of 1e-6:\n" + "\n".join(broken))
    print(f"\nwrote {PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE}")


if __name__ == "__main__":
    main()
