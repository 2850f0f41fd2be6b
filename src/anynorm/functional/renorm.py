"""What is asked of `batch_renorm`: batch norm that in training already looks at the running averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..activations import check_finish
from ..engine import paths as ops
from ..engine import protocol
from ..errors import check_batch_norm, check_channels, check_floating, check_more_than_one, check_parameter_dtypes
from ..family import FAMILY
from ..padding import ragged
from ..padding.masks import find_mask
from ..sources import correct
from ..statistics import Moments
from .batch import BATCH_OF_ONE, batch_norm


def batch_renorm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    r_max: float | Tensor = 3.0,
    d_max: float | Tensor = 5.0,
    start_share: float | Tensor = 0.0,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Any = None,
) -> Tensor:
    """Batch norm whose output in training is moved towards what evaluation will give.

    y[n,c,s] = ((x[n,c,s] - mean[c]) / sqrt(var[c] + eps) * r[c] + d[c]) * weight[c] + bias[c]
    r[c] = clip(sqrt(var[c] + eps) / sqrt(running_var[c] + eps), 1 / r_max, r_max)
    d[c] = clip((mean[c] - running_mean[c]) / sqrt(running_var[c] + eps), -d_max, d_max)

    No gradient flows through r and d. Where neither is clipped, y is what evaluation gives with the averages as they
    were before this batch. In evaluation it is `batch_norm`.

    Args:
        input, weight, bias, training, momentum, eps, activation, residual, mask, lengths: as for `batch_norm`.
        running_mean, running_var: (C,), needed in training, too: read for r and d, then moved.
        r_max: 1 or more. d_max: 0 or more. With 1 and 0 it is batch norm.
        start_share: how much of the running averages still is what they started from, mean 0 and variance 1; r and d
            are found from averages without that part. At 1 there is no history: r is 1 and d 0.

    Returns:
        Shape and dtype of input; channels_last where input is.

    Raises:
        ValueError: one value per channel in training; limits or a start_share out of range.
        RuntimeError: sizes or dtypes that do not fit; no running averages.

    Note:
        `var` is the population variance, running_var moves towards n/(n-1) times that, as in torch. r compares the two
        as they are, because evaluation uses running_var as it is: so r is sqrt((n-1)/n) on average and not 1. The
        paper's running sigma is an average of standard deviations, population ones. x is read once more than by batch
        norm.

    Source:
        Ioffe 2017, arXiv:1702.03275, algorithm 1; start_share is ours.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> batch_renorm(x, torch.tensor([1.0]), torch.tensor([4.0]), training=True, eps=1e-12)
        tensor([[0.],
                [1.]])
    """
    options: Any = {"activation": activation, "residual": residual, "mask": mask, "lengths": lengths}
    if not ragged.is_ragged(input):
        given = (input, running_mean, running_var, weight, bias, training, momentum, eps)
        limits = {"r_max": r_max, "d_max": d_max, "start_share": start_share}
        handed = protocol.hand_over(batch_renorm, given, options | limits)
        if handed is not None:
            return handed
        activation = check_finish("batch_renorm", input, activation, residual)
    options["activation"] = activation
    if not training:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps, **options)
    if running_mean is None or running_var is None:
        raise RuntimeError(
            "batch_renorm: training needs running statistics, too; got None; pass running_mean and running_var, or use "
            "batch_norm"
        )
    check_limits("batch_renorm", r_max, d_max, start_share)
    mean, var = running_mean, running_var

    def find(moments: Moments) -> tuple[Tensor, Tensor]:
        return correct(moments, mean, var, eps, (r_max, d_max), start_share)

    return renormalize(input, mean, var, weight, bias, momentum, eps, find, **options)


def renormalize(
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    find: Callable[[Moments], tuple[Tensor, Tensor]],
    **options: Any,
) -> Any:
    """`batch_renorm` in training with r and d that `find` finds from the batch's moments."""
    given = (input, running_mean, running_var, weight, bias, momentum, eps, find)
    handed = None if ragged.is_ragged(input) else protocol.hand_over(renormalize, given, options)
    if handed is not None:
        return handed
    rows = ragged.open_rows("batch_renorm", input) if ragged.is_ragged(input) else input
    check_floating("batch_renorm", rows)
    check_batch_norm(rows, True, eps, running_mean=running_mean, running_var=running_var)
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_channels("batch_renorm", rows.shape[1], **named)
    check_parameter_dtypes("batch_renorm", rows, **named)
    pooling = FAMILY["renorm"].pool(rows)
    if options.get("mask") is None and options.get("lengths") is None:  # Else batch_norm counts.
        check_more_than_one("batch_renorm", pooling.count(rows), "channel", rows, BATCH_OF_ONE)
    if rows.numel():
        mask = find_mask("batch_renorm", input, (1,), options.get("mask"), options.get("lengths"))
        with torch.no_grad():
            found = find(ops.find_moments(rows, pooling, mask))
        dtype = rows.dtype if rows.dtype == torch.float64 else torch.float32
        weight, bias = join(found[0].to(dtype), found[1].to(dtype), weight, bias)
    return batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps, **options)


def join(r: Tensor, d: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(xhat * r + d) * weight + bias as one scale and one shift of xhat.

    In the precision of r and d: the gradient of a half-typed weight is a sum of two, which may cancel, rounded once.
    """
    if weight is not None:
        weight = weight.to(r.dtype)
        r, d = r * weight, d * weight
    return r, d if bias is None else d + bias.to(d.dtype)


def check_limits(function: str, r_max: Any, d_max: Any, start_share: Any = 0.0) -> None:
    """Numbers are checked; tensors come from a schedule that was."""
    for name, value, least, most in (
        ("r_max", r_max, 1, float("inf")),
        ("d_max", d_max, 0, float("inf")),
        ("start_share", start_share, 0, 1),
    ):
        if not isinstance(value, Tensor) and not least <= value <= most:
            rule = f"{least} or more" if most > 1 else "from 0 to 1"
            raise ValueError(f"{function}: {name} must be {rule}; got {value}; batch norm itself is r_max=1, d_max=0")
