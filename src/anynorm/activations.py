"""What may follow a norm in the same operation: a residual that is added, then an activation.

    y = activation(norm(x) + residual)

The table is the only list of the activations; modules, functions, kernels and surgery read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .pooling import remember


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        name: as in ``activation=``; a number may follow where there is an option: ``leaky_relu(0.2)``.
        function: differentiable, elementwise, in every floating dtype; takes that number, too.
        module: torch's class for it.
        option: what torch calls that number, or "".
        default: torch's value of it.
        settings: what other options of class and function must be to mean this activation.
        spelling: what torch.nn.functional calls it; the name, where it is "".
    """

    name: str
    function: Callable[..., Tensor]
    module: type[nn.Module]
    option: str = ""
    default: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    spelling: str = ""


ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation("relu", F.relu, nn.ReLU),
        Activation("leaky_relu", F.leaky_relu, nn.LeakyReLU, "negative_slope", 0.01),
        Activation("silu", F.silu, nn.SiLU),
        Activation("gelu", F.gelu, nn.GELU, settings={"approximate": "none"}),
        Activation("relu6", F.relu6, nn.ReLU6),
        Activation("hardswish", F.hardswish, nn.Hardswish),
        Activation("elu", F.elu, nn.ELU, "alpha", 1.0),
        Activation("tanh", torch.tanh, nn.Tanh),
        Activation("sigmoid", torch.sigmoid, nn.Sigmoid),
        Activation("mish", F.mish, nn.Mish),
        Activation(
            "gelu_tanh",
            partial(F.gelu, approximate="tanh"),
            nn.GELU,
            settings={"approximate": "tanh"},
            spelling="gelu",
        ),
    )
}
IDENTITY = "identity"  # says aloud what None means


@remember
def find_activation(text: str) -> tuple[Activation, float] | None:
    """What a name stands for, or a name with a number in parentheses, and that number; None where it is neither."""
    name, opened, rest = text.partition("(")
    activation = ACTIVATIONS.get(name)
    if activation is None or not opened:
        return None if activation is None else (activation, activation.default)
    try:
        number = float(rest.removesuffix(")"))
    except ValueError:
        return None
    return (activation, number) if activation.option and rest.endswith(")") and isfinite(number) else None


def write_activation(activation: Activation, number: float) -> str:
    """The text that `find_activation` reads, the same for the same activation."""
    return activation.name if number == activation.default else f"{activation.name}({number!r})"


def match_options(activations: Sequence[Activation], given: dict[str, Any]) -> tuple[str, str]:
    """Which of several activations, that have one function or class, is meant by the options given.

    Returns:
        As in ``activation=``; or "", and why none is.
    """
    defaults = activations[0].settings
    chosen = {name: given.get(name, default) for name, default in defaults.items()}
    for activation in activations:
        if activation.settings != chosen:
            continue
        number = given.get(activation.option, activation.default)
        if isinstance(number, (int, float)) and isfinite(number):
            return write_activation(activation, float(number)), ""
        return "", f"{activation.name} is fused with a plain number as {activation.option}, this has {number!r}"
    return "", f"{activations[0].name} is not fused with {chosen}"


def list_activations() -> str:
    """The names, for sentences."""
    *names, last = ACTIVATIONS
    return f"{', '.join(names)} and {last}"


def check_activation(function: str, name: str | None) -> str | None:
    """The name, in its one spelling, or None where nothing is applied."""
    if name is None or name == IDENTITY:
        return None
    if name in ACTIVATIONS:
        return name
    found = find_activation(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(
            f"{function}: activation must be one of {', '.join(ACTIVATIONS)}, {IDENTITY} or None, as 'leaky_relu(0.2)' "
            f"and 'elu(0.5)' with a number; got {name!r}; leave it out and apply yours to the output"
        )
    return write_activation(*found)


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
    found = None if activation is None else find_activation(activation)
    if found is None:
        return y
    known, number = found
    return known.function(y, number) if known.option else known.function(y)
