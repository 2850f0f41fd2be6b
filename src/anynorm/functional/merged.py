"""What is asked of batch norm over several parts: other ranks' mini-batches, or other micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import check_finish
from ..engine import merged, protocol, watch
from ..errors import check_batch_norm, check_channels, check_floating, check_no_overlap, check_parameter_dtypes
from ..family import FAMILY
from ..padding import ragged
from ..padding.masks import find_mask


@torch._disable_dynamo  # Nothing that waits for others can be part of a graph.
def merged_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    exchange: merged.Exchange,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Any = None,
) -> Tensor:
    """`anynorm.functional.batch_norm` in training, with the moments of all parts.

    Args:
        input: (N, C) or (N, C, *), floating point; N may be 0.
        exchange: brings the parts together.
        running_mean, running_var, weight, bias, momentum, eps, activation, residual, mask, lengths: as there.

    Returns:
        Shape and dtype of input; channels_last where input is. It can be differentiated once.
    """
    handed = None
    if not ragged.is_ragged(input):
        options: Any = {"activation": activation, "residual": residual, "mask": mask, "lengths": lengths}
        given: Any = (input, running_mean, running_var, weight, bias, momentum, eps, exchange)
        handed = protocol.hand_over(merged_batch_norm, given, options)
    if handed is not None:
        return handed
    mask = find_mask("batch_norm", input, (1,), mask, lengths)
    if ragged.is_ragged(input):
        given = (running_mean, running_var, weight, bias, momentum, eps, exchange)
        return ragged.by_rows(merged_batch_norm, input, residual, *given, activation=activation)
    check_floating("batch_norm", input)
    activation = check_finish("batch_norm", input, activation, residual)
    check_batch_norm(input, True, eps, running_mean=running_mean, running_var=running_var)
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_channels("batch_norm", input.shape[1], **named)
    check_parameter_dtypes("batch_norm", input, **named)
    running = None
    if running_mean is not None and running_var is not None:
        if watch.has_memory(input, running_mean, running_var):
            check_no_overlap("batch_norm", input, running_mean, running_var)
        running = (running_mean, running_var, momentum)
    pooling = FAMILY["batch"].pool(input)
    return merged.normalize(input, pooling, weight, bias, eps, exchange, activation, residual, running, mask)
