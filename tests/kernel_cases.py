"""What the tests of the kernels share: poolings, inputs so large that threads share them, a fresh Python."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch import Tensor

import anynorm
from anynorm.family import FAMILY
from anynorm.pooling import Pooling, find_pooling


def run_python(source: str, **environment: str) -> str:
    """What a fresh Python prints."""
    found = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def make_pooling(name: str, x: Tensor, sizes: tuple = ()) -> Pooling:
    scheme = FAMILY[name]
    return find_pooling(scheme.pattern, scheme.affine, scheme.centred, x.dim(), sizes)


LARGE = {
    "rows, few and long": ((2, 3, 70_000), None),
    "rows, many": ((8, 64, 30, 30), None),
    "columns, few rows": ((30, 600), None),
    "columns, many rows": ((4, 40, 80, 100), torch.channels_last),
}


def compute_all(norm: torch.nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and the parameters."""
    leaf = x.detach().requires_grad_()
    y = norm(leaf)
    return [y, *torch.autograd.grad(y, [leaf, *norm.parameters()], g)]


def make_large(name: str) -> tuple[list[torch.nn.Module], Tensor, Tensor]:
    """Norms, an input and a gradient for them."""
    shape, layout = LARGE[name]
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=generator) for _ in range(2))
    if layout is not None:
        x, g = x.to(memory_format=layout), g.to(memory_format=layout)
    c = shape[1]
    kinds = {2: anynorm.BatchNorm1d, 3: anynorm.BatchNorm1d, 4: anynorm.BatchNorm2d}
    norms = [kinds[len(shape)](c), anynorm.GroupNorm(1, c), anynorm.LayerNorm(shape[-1]), anynorm.RMSNorm(shape[-1])]
    return norms, x, g
