"""The formula in NumPy float64, forward and gradients: the oracle of every test, independent of the rest.

Nothing here is fast or clever. `axes` are the axes that share a mean and a variance; gamma and beta must already
have a shape that broadcasts over x.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def moments(x: ArrayLike, axes: tuple[int, ...], centred: bool = True) -> tuple[Array, Array]:
    """Mean and population variance over `axes`, which stay with size 1; 0 and mean square where not centred."""
    x = np.asarray(x, dtype=np.float64)
    mean = np.mean(x, axis=axes, keepdims=True)
    if not centred:
        mean = np.zeros_like(mean)
    mean = mean + np.mean(x - mean, axis=axes, keepdims=True) * centred  # Takes back what the first sum rounded away.
    return mean, np.mean((x - mean) ** 2, axis=axes, keepdims=True)


def forward(
    x: ArrayLike,
    axes: tuple[int, ...],
    gamma: ArrayLike = 1.0,
    beta: ArrayLike = 0.0,
    eps: float = 1e-5,
    *,
    centred: bool = True,
    given: tuple[ArrayLike, ArrayLike] | None = None,
) -> Array:
    """y = (x - mean) / sqrt(var + eps) * gamma + beta.

    Args:
        given: (mean, var) to use instead of those of x.

    Example:
        >>> forward([[1.0], [3.0]], axes=(0,), eps=0.0)
        array([[-1.],
               [ 1.]])
    """
    x = np.asarray(x, dtype=np.float64)
    mean, var = moments(x, axes, centred) if given is None else (np.asarray(g, dtype=np.float64) for g in given)
    return (x - mean) / np.sqrt(var + eps) * np.asarray(gamma, np.float64) + np.asarray(beta, np.float64)


def gradients(
    g: ArrayLike,
    x: ArrayLike,
    axes: tuple[int, ...],
    gamma: ArrayLike = 1.0,
    eps: float = 1e-5,
    *,
    centred: bool = True,
    given: tuple[ArrayLike, ArrayLike] | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of sum(g * y) for x, gamma and beta, the last two in the shape of gamma.

    dx = rstd * (gamma*g - mean(gamma*g) - xhat * mean(gamma*g*xhat)); given statistics are constants, and an uncentred
    norm has no middle term.
    """
    g, x = np.asarray(g, dtype=np.float64), np.asarray(x, dtype=np.float64)
    gamma = np.asarray(gamma, dtype=np.float64)
    mean, var = moments(x, axes, centred) if given is None else (np.asarray(a, dtype=np.float64) for a in given)
    rstd = 1 / np.sqrt(var + eps)
    xhat = (x - mean) * rstd
    scaled = g * gamma
    dx = scaled.copy()
    if given is None:
        dx -= xhat * np.mean(scaled * xhat, axis=axes, keepdims=True)
        if centred:
            dx -= np.mean(scaled, axis=axes, keepdims=True)
    return rstd * dx, shrink(g * xhat, gamma.shape), shrink(g, gamma.shape)


def shrink(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum x over the axes along which something of `shape` was broadcast."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    found: Array = x.sum(axis=tuple(a for a, size in enumerate(shape) if size == 1), keepdims=True)
    return found
