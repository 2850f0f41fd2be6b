"""Question (c): over what do gamma and beta vary?"""

from __future__ import annotations

import torch
from torch import Tensor

from .pooling import Pooling


def spread(parameter: Tensor | None, pooling: Pooling, view: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Shape gamma or beta so that it broadcasts over the opened x, in the dtype of the computation."""
    if parameter is None:
        return None
    shape = [size if axis in pooling.affine else 1 for axis, size in enumerate(view.shape)]
    return parameter.to(dtype).reshape(shape)


def scale_shift(xhat: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """xhat * gamma + beta, either of them absent."""
    y = xhat if gamma is None else xhat * gamma
    return y if beta is None else y + beta


def expand_in_turn(t: Tensor, view: Tensor) -> Tensor:
    """t as large as the view, without memory: one axis after the other, so that autograd sums its gradient likewise.

    torch cascades along one axis, and not across several.
    """
    # torch's exporter to ONNX by tracing would write the example's sizes into the graph; autograd has no part there.
    if torch.jit.is_tracing():  # type: ignore[attr-defined] # public, but not said so
        return t
    if not view.numel():  # torch lays out what is empty as its factors are
        return t
    for axis, size in enumerate(view.shape):
        if t.shape[axis] != size:
            t = t.expand([size if a == axis else n for a, n in enumerate(t.shape)])
    return t
