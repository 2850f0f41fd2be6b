"""Is this batch a part of a larger one? Then whoever runs all parts says how the norm normalizes it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Protocol

import torch
import torch.nn as nn


class Together(Protocol):
    """Runs the parts of a batch."""

    def normalize(self, layer: nn.Module, input: Any, options: dict[str, Any]) -> Any:
        """What `layer.normalize(input, **options)` is, with the statistics of all parts."""
        ...


TOGETHER: ContextVar[Together | None] = ContextVar("anynorm.accumulate", default=None)


def find_together() -> Together | None:
    """Who runs the parts; None where a batch is whole, and in graphs, which `accumulate` refuses."""
    return None if torch.compiler.is_compiling() else TOGETHER.get()
