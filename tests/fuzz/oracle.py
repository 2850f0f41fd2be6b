"""What is true: the formula and its gradients in NumPy float64, each with the error that is promised.

Nothing of the library is used, and not its reference either. Errors are relative to the largest term that is summed
within one pool, so that a small pool is not excused by a large one:

    y       1e-6 of the largest |xhat| * |gamma| + |beta| + |residual|, and no more than the activation makes of that
    dx      1e-6 of the largest rstd * |gamma * g| or rstd * |xhat * mean(gamma * g * xhat)|
    dgamma  4e-8 of the sum of |g * xhat|, or 1e-6 of the largest |g| * |xhat|, whichever is larger; dbeta alike

in float32 and half types, and then one rounding to the result's dtype; `compare` adds it. Float64 rounds x - mean, so
its terms are those of x and of the mean, 1e-13 of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fuzz.functions import slope_of, value_of

Array = NDArray[np.float64]
Bounded = tuple[Array, Array]  # a value and its allowed error
GATED = ("silu", "gelu", "gelu_tanh", "mish", "hardswish")  # products with a gate, whose slope is a sum


@dataclass(frozen=True)
class Question:
    """One norm of one array; all arrays broadcast over x, `axes` share a mean and a variance."""

    x: Array
    g: Array
    axes: tuple[int, ...]
    gamma: Array
    beta: Array
    residual: Array
    counted: Array  # bool: what is no padding
    eps: float
    tolerance: float = 1e-6
    narrow: bool = True  # computed in float32: x - mean costs nothing, sums are held to 4e-8
    centred: bool = True
    given: tuple[Array, Array] | None = None
    activation: str | None = None
    averages: tuple[Array, Array] | None = None  # batch renormalization reads them
    limits: tuple[float, float] = (1.0, 0.0)
    sums: float = 4e-8  # of the sum of the sizes of the terms


def find_moments(q: Question) -> tuple[Array, Array, Array]:
    """Count, mean and population variance of each pool; a pool of padding has mean 0 and variance 0."""
    count = np.sum(q.counted, axis=q.axes, keepdims=True).astype(float)
    if q.given is not None:
        return count, *q.given
    n = np.maximum(count, 1)
    mean = np.zeros_like(n)
    if q.centred:
        mean = np.sum(q.x, axis=q.axes, keepdims=True) / n
        mean = mean + np.sum(np.where(q.counted, q.x - mean, 0), axis=q.axes, keepdims=True) / n
    return count, mean, np.sum(np.where(q.counted, q.x - mean, 0) ** 2, axis=q.axes, keepdims=True) / n


def find_correction(q: Question, mean: Array, var: Array) -> tuple[Array, Bounded]:
    """r and d of batch renormalization, d with what the error of the mean makes of it."""
    if q.averages is None:
        return np.ones_like(mean), (np.zeros_like(mean), np.zeros_like(mean))
    rstd, (r_max, d_max) = 1 / np.sqrt(q.averages[1] + q.eps), q.limits
    r = np.clip(np.sqrt(var + q.eps) * rstd, 1 / r_max, r_max)
    off = q.tolerance * (largest(np.where(q.counted, q.x - mean, 0), q.axes) + np.abs(mean - q.averages[0])) * rstd
    d, low, high = (np.clip((mean - q.averages[0]) * rstd + e, -d_max, d_max) for e in (0 * off, -off, off))
    return r, (d, np.maximum(high - d, d - low))


def answer(q: Question) -> dict[str, Bounded]:
    """y, dx, dgamma, dbeta, dresidual, and mean and unbiased variance of each pool with its count."""
    count, mean, var = find_moments(q)
    rstd = 1 / np.sqrt(var + q.eps)
    xhat = np.where(q.counted, (q.x - mean) * rstd, 0)
    top = largest(xhat, q.axes)
    if not q.narrow or q.given is not None:
        top = (largest(q.x, q.axes) + np.abs(mean)) * rstd if not q.narrow else np.abs(xhat)
    r, (d, d_off) = find_correction(q, mean, var)
    z = xhat * r * q.gamma + d * q.gamma + q.beta + q.residual
    terms = top * r * np.abs(q.gamma) + np.abs(d * q.gamma) + np.abs(q.beta) + np.abs(q.residual)
    z_off = q.tolerance * terms + d_off * np.abs(q.gamma)
    if q.narrow:  # What is left of the mean behind its first float is lost below half a float's smallest step.
        z_off = z_off + 0.75e-45 * rstd * r * np.abs(q.gamma)
    y, y_off = bend(value_of, q.activation, z, z_off)
    slope, slope_off = bend(slope_of, q.activation, z, z_off)
    y_off = y_off + find_tail(q, z, GATED)
    slope_off = slope_off + find_tail(q, np.ones_like(z), (*GATED, "tanh", "sigmoid"))
    dz, dz_off = np.where(q.counted, q.g * slope, 0), np.where(q.counted, np.abs(q.g) * slope_off, 0)
    found = {"y": (np.where(q.counted, y, 0), np.where(q.counted, y_off + q.tolerance * np.abs(y), 0))}
    found["dresidual"] = dz, dz_off + q.tolerance * np.abs(dz)
    found["dx"] = find_dx(q, (count, rstd, xhat, top), r * q.gamma, (dz, dz_off))
    found["dbeta"] = add_up(q, dz, np.abs(dz), np.abs(dz), dz_off)
    size, most = (np.abs(dz) * (np.abs(t) * r + np.abs(d)) for t in (xhat, top))
    found["dgamma"] = add_up(
        q, dz * (xhat * r + d), size, most, dz_off * (np.abs(xhat) * r + np.abs(d)) + np.abs(dz) * d_off
    )
    found["mean"] = mean, q.tolerance * largest(q.x, q.axes)
    unbiased = var * count / np.maximum(count - 1, 1)
    wide = 0 if q.narrow else q.tolerance * (largest(q.x, q.axes) + np.abs(mean)) * np.sqrt(unbiased)
    found["var"] = unbiased, q.tolerance * unbiased + wide
    return found


def find_dx(q: Question, known: tuple[Array, ...], scale: Array, dz: Bounded) -> Bounded:
    """rstd * (h - mean(h) - xhat * mean(h * xhat)), h = scale * dz; given statistics are constants."""
    count, rstd, xhat, top = known
    h, h_off = scale * dz[0], np.abs(scale) * dz[1]
    if q.given is not None:
        return rstd * h, rstd * (q.tolerance * np.abs(h) + h_off)

    def mean(t: Array) -> Array:
        return np.sum(t, axis=q.axes, keepdims=True) / np.maximum(count, 1)

    pull = mean(h * xhat)
    dx = h - mean(h) * q.centred - xhat * pull
    most = np.maximum(largest(h, q.axes), largest(xhat * pull, q.axes))
    off = q.tolerance * most * (1 if q.narrow else (1 + top) * (1 + top))
    off = off + h_off + mean(h_off) + np.abs(xhat) * mean(h_off * np.abs(xhat))
    return np.where(q.counted, rstd * dx, 0), np.where(q.counted, rstd * off, 0)


def add_up(q: Question, terms: Array, sizes: Array, most: Array, off: Array) -> Bounded:
    """The sum over what gamma does not vary over, and its allowed error; `most` is what a term's error is relative to.

    A float's smallest step for each term comes on top: products of subnormal numbers.
    """
    axes = tuple(axis for axis, size in enumerate(q.gamma.shape) if size == 1)
    total, size, off = (np.sum(t, axis=axes, keepdims=True) for t in (terms, sizes, off))
    if not q.narrow:
        return total, q.tolerance * np.sum(most, axis=axes, keepdims=True) + off
    step = 1.5e-45 * terms.size / total.size
    return total, np.maximum(q.tolerance * largest(most, axes), q.sums * size) + off + step


def largest(t: Array, axes: tuple[int, ...]) -> Array:
    return np.max(np.abs(t), axis=axes, keepdims=True, initial=0)


def bend(function, activation: str | None, z: Array, off: Array) -> Bounded:
    """function(z), and how far it is from there within z - off .. z + off."""
    value, low, high = (function(activation, t) for t in (z, z - off, z + off))
    return value, np.maximum(np.abs(low - value), np.abs(high - value))


def find_tail(q: Question, z: Array, activations: tuple[str, ...]) -> Array:
    """What these may be off where they near 0: as much as at 1, and not in proportion to their value."""
    return q.tolerance * np.minimum(np.abs(z), 1) * (q.activation in activations)
