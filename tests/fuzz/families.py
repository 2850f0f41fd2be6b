"""What numbers a tensor holds: families of data that norms have failed on, each a function of a shape.

They round systematically (equal terms round alike), cancel, or come near the limits of float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[np.float64]
Family = Callable[[Generator, tuple[int, ...]], Array]


def normal(rng: Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape)


def two_values(rng: Generator, shape: tuple[int, ...]) -> Array:
    return np.where(rng.random(shape) < rng.random(), rng.standard_normal(), rng.standard_normal())


def step(rng: Generator, shape: tuple[int, ...]) -> Array:
    """One value up to a position of the last axis, another from there on."""
    low, high = rng.standard_normal(2) * rng.choice([1.0, 1e3])
    return np.broadcast_to(np.where(np.arange(shape[-1]) < rng.integers(0, shape[-1] + 1), low, high), shape)


def constant(rng: Generator, shape: tuple[int, ...]) -> Array:
    return np.full(shape, rng.choice([0.1, -7.3, 1e5, 1e30, rng.standard_normal()]))


def few_levels(rng: Generator, shape: tuple[int, ...]) -> Array:
    return rng.integers(0, 5, shape) * rng.standard_normal() + rng.standard_normal()


def ascending(rng: Generator, shape: tuple[int, ...]) -> Array:
    return np.sort(rng.standard_normal(shape), axis=None).reshape(shape)


def alternating(rng: Generator, shape: tuple[int, ...]) -> Array:
    signs = np.where(np.arange(np.prod(shape)) % 2, 1.0, -1.0).reshape(shape)
    return signs * rng.standard_normal() + rng.choice([0.0, 1.0, 100.0])


def one_outlier(rng: Generator, shape: tuple[int, ...]) -> Array:
    values = rng.choice([0.0, 1.0]) * rng.standard_normal(shape) + rng.choice([0.0, 1.0])
    values.flat[rng.choice([0, rng.integers(0, values.size)])] = rng.choice([1e3, 1e6, 1e9])
    return values


def geometric(rng: Generator, shape: tuple[int, ...]) -> Array:
    return (rng.choice([0.5, 0.9, 0.99]) ** (np.arange(np.prod(shape)) % 500)).reshape(shape)


def heavy_tails(rng: Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_t(rng.choice([1, 2, 3]), shape)


def large_mean(rng: Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape) + rng.choice([10.0, 1e3, 1e6])


def subnormal(rng: Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape) * rng.choice([1e-38, 1e-40, 1e-42])


def huge(rng: Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape) * rng.choice([1e15, 1e29, 1e33, 1e37])


def tiny(rng: Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape) * rng.choice([1e-8, 1e-20, 1e-30])


def with_a_mean(rng: Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape) + 10


def ones(rng: Generator, shape: tuple[int, ...]) -> Array:
    return np.ones(shape)


def one_hot(rng: Generator, shape: tuple[int, ...]) -> Array:
    values = np.zeros(shape)
    values.flat[rng.integers(0, values.size)] = rng.standard_normal()
    return values


def large(rng: Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape) * 1e10


DATA: tuple[Family, ...] = (
    normal, two_values, step, constant, few_levels, ascending, alternating, one_outlier, geometric, heavy_tails,
    large_mean, subnormal, huge, tiny,
)  # fmt: skip
GRADIENTS: tuple[Family, ...] = (
    normal, ones, with_a_mean, two_values, step, alternating, one_hot, one_outlier, heavy_tails, large, tiny,
)  # fmt: skip
