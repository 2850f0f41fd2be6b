"""Samples and values in units of their own spread, as the training part has it."""

from __future__ import annotations

import numpy as np


def standardize(x: np.ndarray, train: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
    """Mean 0 and standard deviation 1 over the training samples, as float32.

    Columns of a table have units of their own, as have the channels of padded sequences; pixels share one. Padding
    neither counts nor keeps what was in it: it is 0.
    """
    x = x.astype(np.float32)
    if lengths is None:
        axes = 0 if x.ndim == 2 else None
        mean, std = x[train].mean(axes, dtype=np.float64), x[train].std(axes, dtype=np.float64)
        found: np.ndarray = ((x - mean) / np.where(std > 0, std, 1.0)).astype(np.float32)
        return found
    axis = find_positions(x, lengths)
    real = np.arange(x.shape[axis]) < lengths[:, None]
    moved = np.moveaxis(x, axis, 1)
    values = moved[train][real[train]].astype(np.float64)
    mean, std = values.mean(0), values.std(0)
    moved = (moved - mean) / np.where(std > 0, std, 1.0)
    moved[~real] = 0.0
    return np.ascontiguousarray(np.moveaxis(moved, 1, axis), dtype=np.float32)


def find_positions(x: np.ndarray, lengths: np.ndarray) -> int:
    """The axis of positions: the one that is as long as the longest sequence, or else the last that can hold it."""
    longest = int(lengths.max())
    axes = [axis for axis in range(x.ndim - 1, 0, -1) if x.shape[axis] >= longest]
    return next((axis for axis in axes if x.shape[axis] == longest), axes[0])


def standardize_values(
    y: np.ndarray, train: np.ndarray, wanted: bool
) -> tuple[np.ndarray, tuple[float, ...], tuple[float, ...]]:
    """(values as float32, means, standard deviations by which they were standardized)."""
    mean, std = (y[train].mean(0), y[train].std(0)) if wanted else (np.zeros(y.shape[1]), np.ones(y.shape[1]))
    std = np.where(std > 0, std, 1.0)
    return ((y - mean) / std).astype(np.float32), tuple(mean.tolist()), tuple(std.tolist())
