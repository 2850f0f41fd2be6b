"""Fused norms with the state of a specimen, for the tests of norms, graphs and classes."""

from __future__ import annotations

import torch

import anynorm
from anynorm.activations import ACTIVATIONS
from anynorm.modules.fused import Fused
from specimens import ARGUMENTS, SIZES, Specimen

NAMES = [*ACTIVATIONS, "identity"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ids = {"ids": str}


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
