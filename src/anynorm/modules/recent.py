"""What did the last calls of a layer start from? Activation checkpointing computes them again, when that has moved."""

from __future__ import annotations

from collections import deque
from math import inf
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
from torch import Tensor

from ..statistics import Moments

# For each layer the mean of each call's batch, and what the call started from.
RECENT: WeakKeyDictionary[nn.Module, deque[Any]] = WeakKeyDictionary()
KEPT = 8


def keep_call(recent: deque[Any], moments: Moments, start: Any) -> Any:
    """Keep a copy of what this call starts from, and return it."""
    assert moments.mean is not None
    kept = start and tuple(t.clone() if isinstance(t, Tensor) else t for t in start)
    recent.append((moments.mean.detach().flatten().clone(), kept))
    return kept


def find_call(recent: deque[Any], moments: Moments, eps: float) -> Any:
    """The latest of the calls that had this batch; None where none of them had it.

    The mean of a batch that is computed again may differ by rounding. Where it is NaN or Inf it says nothing.
    """
    assert moments.mean is not None
    mean, std = moments.mean.flatten(), (moments.var.flatten() + eps).sqrt()
    allowed = 1e-3 * std + 1e-5 * mean.abs()
    best, least = None, 1.0
    for call in recent:
        off = torch.where(allowed.isfinite(), (mean - call[0].to(mean)).abs() / allowed, 0.0)
        distance = float(off.nan_to_num(nan=inf).amax())
        if distance <= least:
            best, least = call, distance
    return best
