"""What several checks ask of the layers around a norm."""

from __future__ import annotations

import torch.nn as nn

from ...surgery.fold.layers import is_layer
from ..facts import Facts, NormFacts
from ..structure import Step


def find_source(norm: NormFacts, facts: Facts | None = None) -> Step | None:
    """The convolution or linear layer right before a norm, if its output goes nowhere else, and it is called once; None
    for anything else. Batches tell more, where facts are given."""
    if not norm.around.before or norm.around.calls != 1 or len(norm.names) != 1:
        return None
    step = norm.around.before[0]
    if step.module is None or not is_layer(step.module) or step.is_shared:
        return None
    if isinstance(step.module, nn.Linear) and facts is not None and facts.has_data:
        seen = facts.evaluation.seen.get(norm.name)
        if seen is not None and any(len(shape) != 2 for shape in seen.shapes):
            return None  # its features are the last axis, not the norm's channels
    return step if speaks_of_channels(step.module, norm) else None


def speaks_of_channels(layer: nn.Module, norm: NormFacts) -> bool:
    """Whether a layer's outputs are the norm's channels: a linear layer's are the last axis, a norm's the second."""
    if isinstance(layer, nn.Linear):
        return norm.kind == "batch" and layer.out_features == getattr(norm.module, "num_features", -1)
    return True


def has_weights(module: nn.Module | None) -> bool:
    """Whether a step is a layer with parameters."""
    return module is not None and any(True for _ in module.parameters())
