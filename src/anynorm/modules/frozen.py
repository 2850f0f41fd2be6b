"""What a frozen norm remembers: which of its three parts stand still, and how they were before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.nn as nn


@dataclass
class Frozen:
    """Which parts of a norm `anynorm.freeze` has stopped.

    Attributes:
        statistics: it normalizes by its running averages in training too.
        updates: its running averages do not move.
        affine: gamma and beta want no gradient.
        training: the mode that the norm was last set to, which it does not follow where `statistics` is set.
        requires_grad: of its parameters, by name, before they were frozen.
        before, became: the class that it had, where it was not one of ours, and the one that it got; of an adapted
            norm's, which was made at run time, what it is made of.
    """

    statistics: bool = False
    updates: bool = False
    affine: bool = False
    training: bool = True
    requires_grad: dict[str, bool] = field(default_factory=dict)
    before: type[nn.Module] | None = None
    became: Any = None

    def follows(self) -> bool:
        """Whether running averages move though the batch is normalized by them."""
        return self.statistics and not self.updates and self.training

    def describe(self) -> str:
        """What stands still, in words."""
        return ", ".join(name for name in ("statistics", "updates", "affine") if getattr(self, name))
