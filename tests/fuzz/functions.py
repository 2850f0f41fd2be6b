"""What may follow a norm, and its derivative, in NumPy float64."""

from __future__ import annotations

from math import erfc, pi, sqrt

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def read_name(activation: str | None) -> tuple[str, float]:
    """``elu(0.5)`` as name and number."""
    name, _, number = (activation or "").partition("(")
    return name, float(number[:-1] or {"leaky_relu": 0.01, "elu": 1.0}.get(name, 0.0))


def value_of(activation: str | None, z: Array) -> Array:
    name, number = read_name(activation)
    if name in ("relu", "leaky_relu"):
        return np.where(z > 0, z, z * number)
    if name == "relu6":
        return np.clip(z, 0, 6)
    if name == "elu":
        return np.where(z > 0, z, number * np.expm1(np.minimum(z, 0)))
    if name == "tanh":
        return np.tanh(z)
    if name == "sigmoid":
        return sigmoid(z)
    return z * gate(name, z)


def slope_of(activation: str | None, z: Array) -> Array:
    """The derivative; at a kink torch's choice, that of the flat side, and of the left."""
    name, number = read_name(activation)
    if name in ("relu", "leaky_relu"):
        return np.where(z > 0, 1.0, number)
    if name == "relu6":
        return np.where((z > 0) & (z < 6), 1.0, 0.0)
    if name == "elu":
        return np.where(z > 0, 1.0, number * np.exp(np.minimum(z, 0)))
    if name == "tanh":
        return 4 * sigmoid(2 * z) * sigmoid(-2 * z)
    if name == "sigmoid":
        return sigmoid(z) * sigmoid(-z)
    near = np.clip(z, -40, 40)
    return gate(name, z) + near * gate_slope(name, near)


def gate(name: str, z: Array) -> Array:
    """What z is multiplied by."""
    if name == "silu":
        return sigmoid(z)
    if name == "gelu":
        return share(z)
    if name == "gelu_tanh":
        return sigmoid(2 * inner(np.clip(z, -40, 40)))
    if name == "mish":
        return np.tanh(np.logaddexp(0, z))
    if name == "hardswish":
        return np.clip(z + 3, 0, 6) / 6
    return np.ones_like(z)


def gate_slope(name: str, z: Array) -> Array:
    """The derivative of `gate`."""
    if name == "silu":
        return sigmoid(z) * sigmoid(-z)
    if name == "gelu":
        return np.exp(-z * z / 2) / sqrt(2 * pi)
    if name == "gelu_tanh":
        t = 2 * inner(z)
        return sigmoid(t) * sigmoid(-t) * 2 * sqrt(2 / pi) * (1 + 3 * 0.044715 * z * z)
    if name == "mish":
        return sigmoid(z) / np.cosh(np.logaddexp(0, z)) ** 2
    if name == "hardswish":
        return np.where((z > -3) & (z < 3), 1 / 6, 0.0)
    return np.zeros_like(z)


def inner(z: Array) -> Array:
    """What GELU by tanh takes tanh of."""
    return sqrt(2 / pi) * (z + 0.044715 * z**3)


def sigmoid(z: Array) -> Array:
    e = np.exp(-np.abs(z))
    return np.where(z > 0, 1, e) / (1 + e)


def share(z: Array) -> Array:
    """Of a standard normal, what is below z."""
    return np.vectorize(erfc, otypes=[float])(-z / sqrt(2)) / 2
