"""Fused norms with the state of a specimen, for the tests of norms, graphs and classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import anynorm
from anynorm.modules.fused import Fused
from specimens import ARGUMENTS, SIZES, Specimen

# What each activation is, in torch's own words.
TORCHS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "leaky_relu(0.3)": partial(F.leaky_relu, negative_slope=0.3),
    "silu": F.silu,
    "gelu": F.gelu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "elu(0.5)": partial(F.elu, alpha=0.5),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
NAMES = [*TORCHS, "identity"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ids = {"ids": str}


def apply_torch(activation: str | None, z: Tensor) -> Tensor:
    """torch's activation in whole vectors: in the last elements of a tensor its derivative at NaN is another one."""
    if activation in (None, "identity"):
        return z
    return TORCHS[activation](torch.cat([z.flatten(), z.new_zeros(64)]))[: z.numel()].view(z.shape)


def fuse(specimen: Specimen, activation: str | None = "relu", dtype=torch.float32, **options) -> Fused:
    """The specimen's fused twin, with the state of `specimen.make`, negative gammas included."""
    plain = specimen.make(dtype=dtype, **options)
    assert specimen.kind.startswith(("Batch", "Instance", "Layer", "Group", "RMS"))
    kind = getattr(anynorm, specimen.kind.replace("Norm", "NormAct"))
    if specimen.scheme == "instance":
        options.setdefault("affine", True)
    arguments = ARGUMENTS.get(specimen.kind, (SIZES["c"][0],))
    fused = kind(*arguments, dtype=dtype, activation=activation, **options)
    fused.load_state_dict(plain.state_dict(), strict=True)
    assert (plain.weight < 0).any()
    return fused
