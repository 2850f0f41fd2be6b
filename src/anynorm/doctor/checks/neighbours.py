"""What several checks ask of the layers around a norm."""

from __future__ import annotations

import torch.nn as nn

from ...surgery.fold.layers import is_layer
from ..facts import NormFacts
from ..structure import Step


def find_source(norm: NormFacts) -> Step | None:
    """The convolution or linear layer right before a norm, if its output goes nowhere else; None for anything else."""
    if not norm.around.before or norm.around.calls != 1 or len(norm.names) != 1:
        return None
    step = norm.around.before[0]
    if step.module is None or not is_layer(step.module) or step.is_shared:
        return None
    return step if speaks_of_channels(step.module, norm) else None


def speaks_of_channels(layer: nn.Module, norm: NormFacts) -> bool:
    """Whether a layer's outputs are the norm's channels: a linear layer's are the last axis, a norm's the second."""
    if isinstance(layer, nn.Linear):
        return norm.kind == "batch" and layer.out_features == getattr(norm.module, "num_features", -1)
    return True
