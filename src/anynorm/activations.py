"""What may follow a norm in the same operation: a residual that is added, then an activation.

    y = activation(norm(x) + residual)

The table is the only list of the activations; modules, functions, kernels and surgery read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        name: as in ``activation=``, and as torch.nn.functional calls it.
        function: differentiable, elementwise, in every floating dtype.
        module: torch's class for it.
        settings: what that class's and that function's options must be to mean this activation; these are their
            defaults.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    module: type[nn.Module]
    settings: dict[str, Any] = field(default_factory=dict)


ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation("relu", F.relu, nn.ReLU),
        Activation("leaky_relu", F.leaky_relu, nn.LeakyReLU, {"negative_slope": 0.01}),
        Activation("silu", F.silu, nn.SiLU),
        Activation("gelu", F.gelu, nn.GELU, {"approximate": "none"}),
    )
}
IDENTITY = "identity"  # says aloud what None means


def list_activations() -> str:
    """The names, for sentences."""
    *names, last = ACTIVATIONS
    return f"{', '.join(names)} and {last}"


def check_activation(function: str, name: str | None) -> str | None:
    """The name, or None where nothing is applied."""
    if name is None or name == IDENTITY:
        return None
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{function}: activation must be one of {', '.join(ACTIVATIONS)}, {IDENTITY} or None; got {name!r}; "
            "leave it out and apply yours to the output"
        )
    return name


def check_finish(function: str, x: Tensor, activation: str | None, residual: Tensor | None) -> str | None:
    """Check what `finish` is to be given; the activation's name, or None.

    A residual that broadcasts or promotes would make a sum of another shape or dtype than the norm's output.
    """
    if residual is not None and (residual.dtype != x.dtype or not (x.is_nested or residual.shape == x.shape)):
        raise RuntimeError(
            f"{function}: residual must have the shape and dtype of the input; got residual {tuple(residual.shape)} "
            f"{residual.dtype}, input {tuple(x.shape)} {x.dtype}; convert it, or add it to the output"
        )
    return check_activation(function, activation)


def finish(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    """activation(y + residual), either of them absent."""
    if residual is not None:
        y = y + residual
    return y if activation is None or activation == IDENTITY else ACTIVATIONS[activation].function(y)
