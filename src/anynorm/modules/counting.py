"""Does this batch move the running averages?

Every batch in training does, but for the exceptions here: one that activation checkpointing computes again, a repeat
within `update_once`, and one that is refused because it is not finite.
"""

from __future__ import annotations

import warnings
from contextvars import ContextVar, Token
from typing import Any
from weakref import WeakSet

import torch
import torch.nn as nn
from torch import Tensor

from ..padding.masks import describe
from ..sources import find_momentum, update_running
from ..statistics import Moments
from ..torch_private import find_backward

# Within `update_once` the layers that have counted the batch; None outside. Weak, so that it keeps no model alive.
COUNTED: ContextVar[WeakSet[nn.Module] | None] = ContextVar("anynorm.update_once", default=None)


class update_once:
    """Let every norm count one batch inside, however often it is called.

    For training steps that run a model more than once on the same data, as sharpness-aware minimization and gradient
    penalties do: torch moves the running averages at each call. The first call that is not refused counts. A layer
    that a model uses several times counts once, too. Compiled graphs count every call.

    Example:
        >>> norm, x = anynorm.BatchNorm1d(2), torch.randn(4, 2)
        >>> with anynorm.update_once():
        ...     _ = norm(x), norm(x)
        >>> norm.num_batches_tracked
        tensor(1)
    """

    def __init__(self) -> None:
        # A stack: one object may be entered several times, also within itself.
        self._tokens: list[Token[WeakSet[nn.Module] | None]] = []

    def __enter__(self) -> update_once:
        self._tokens.append(COUNTED.set(WeakSet()))
        return self

    def __exit__(self, *exception: object) -> None:
        COUNTED.reset(self._tokens.pop())


def is_counted(layer: nn.Module) -> bool:
    """Whether a layer's call may move its running averages; those of a frozen norm stay.

    Forward inside backward is activation checkpointing, of either kind, which computes again what was counted
    (pytorch#96136).
    """
    frozen = getattr(layer, "frozen", None)
    if frozen is not None and frozen.updates:
        return False
    if torch.compiler.is_compiling():  # Neither backward nor the context is known to a graph: it counts every call.
        return True
    if find_backward() != -1:
        return False
    counted = COUNTED.get()
    return counted is None or layer not in counted


def mark_counted(layer: nn.Module) -> None:
    """Note that a layer's averages have moved by this batch."""
    counted = None if torch.compiler.is_compiling() else COUNTED.get()
    if counted is not None:
        counted.add(layer)


class NonFiniteGuard:
    """Keeps running averages, to go back where a batch makes them NaN or Inf (pytorch#90342).

    Args:
        layer: a norm with `on_nonfinite`.
        mean, var: its running averages, before they move.
    """

    layer: Any
    moving: tuple[Tensor, Tensor]

    def __init__(self, layer: Any, mean: Tensor, var: Tensor) -> None:
        self.layer, self.moving = layer, (mean, var)
        # Averages move inside the kernel, before anybody can look at the statistics; so they are copied and put back.
        # That costs two copies of C numbers and, on an accelerator, a wait for the device: only layers that ask pay it.
        self.before: tuple[Tensor, ...] = tuple(t.clone() for t in self.moving)

    def restore_if_nonfinite(self) -> bool:
        """Whether the batch made an average NaN or Inf; the averages are put back then.

        Raises:
            FloatingPointError: where the layer asks for an error.
        """
        # What was not finite before is not this batch's fault, and does not refuse all batches to come.
        pairs = tuple(zip(self.moving, self.before, strict=True))
        if all(bool((new.isfinite() | ~old.isfinite()).all()) for new, old in pairs):
            return False
        with torch.no_grad():
            for new, old in pairs:
                new.copy_(old)
        name = describe(self.layer)
        if self.layer.on_nonfinite == "error":
            raise FloatingPointError(
                f"{name}: the batch has statistics that are NaN or Inf; its running averages were not moved; look for "
                "the first layer that overflows, or build the norm with on_nonfinite='skip'"
            )
        self.layer.nonfinite_batches += 1
        if self.layer.nonfinite_batches == 1:
            warnings.warn(
                f"{name}: a batch with NaN or Inf was not counted in the running averages; this is said once, "
                "nonfinite_batches counts",
                stacklevel=5,
            )
        return True


def count_whole_batch(layer: Any, moments: Moments) -> None:
    """Move a batch norm's running averages by the moments of a whole batch that came in parts, as one call would.

    Raises:
        FloatingPointError: see `NonFiniteGuard`.
    """
    if not (layer.training and layer.track_running_stats and is_counted(layer) and moments.count):
        return
    mean, var, counter = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if mean is not None and var is not None:
        guard = NonFiniteGuard(layer, mean, var) if layer.on_nonfinite != "propagate" else None
        momentum = find_momentum(None, counter) if layer.momentum is None else layer.momentum
        update_running(mean, var, moments, (), momentum)
        if guard is not None and guard.restore_if_nonfinite():
            return
    if counter is not None:
        counter.add_(1)
    mark_counted(layer)
