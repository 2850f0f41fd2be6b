"""`batch_renorm`: batch norm that in training already looks at the running averages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import check_finish
from ..engine import paths, protocol
from ..engine.request import Request
from ..errors import check_floating, check_parameter_dtypes
from ..padding import ragged
from ..padding.masks import Lengths, find_mask
from ..padding.ragged import Rows
from ..sources import Batch, Renorm, correct
from .batch import BATCH_NORM, BatchFront, name_averages
from .front import find_source


class RenormFront(BatchFront):
    """With the source `Renorm`; with any other it is batch norm."""

    def normalize(self, x: Any, weight: Any, bias: Any, residual: Any, request: Request) -> Any:
        if type(request.source) is not Renorm:
            return BATCH_NORM.normalize(x, weight, bias, residual, request)
        found = self.hand_over(x, weight, bias, residual, request)
        if found is not None:
            return found
        moving = request._replace(source=Batch(request.source[0], request.source[1], request.source[2]))
        rows = ragged.open_rows(self.function, x) if ragged.is_ragged(x) else x
        check_floating(self.function, rows)
        if rows is x:
            check_finish(self.function, x, request.activation, residual)
        is_masked = request.mask is not None or request.lengths is not None  # Then batch norm counts positions.
        self.check(rows, weight, bias, moving if not is_masked else request)
        check_parameter_dtypes(self.function, rows, weight=weight, bias=bias, **name_averages(request))
        if rows.numel():
            mask = find_mask(self.function, x, (1,), request.mask, request.lengths)
            with torch.no_grad():
                moments = paths.find_moments(rows, self.scheme.pool(rows), mask)
                r, d = correct(moments, request.source, request.eps)
            dtype = rows.dtype if rows.dtype == torch.float64 else torch.float32
            weight, bias = join(r.to(dtype), d.to(dtype), weight, bias)
        return BATCH_NORM.normalize(x, weight, bias, residual, moving)

    def hand_over(self, x: Any, weight: Any, bias: Any, residual: Any, request: Request) -> Any:
        source, eps, activation, mask, lengths, _ = request
        if ragged.is_ragged(x):
            return None
        if source.known_mean is not source.running_mean:  # The public function has no name for it.
            return protocol.hand_over(self.normalize, (x, weight, bias, residual, request), {})
        r_max, d_max = source.limits
        options = {"r_max": r_max, "d_max": d_max, "start_share": source.start_share}
        options |= {"activation": activation, "residual": residual, "mask": mask, "lengths": lengths}
        return protocol.hand_over(
            batch_renorm, (x, source[0], source[1], weight, bias, True, source.momentum, eps), options
        )


RENORM: BatchFront = RenormFront("batch_renorm", "renorm")


def batch_renorm(
    input: Rows,
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
    residual: Rows | None = None,
    mask: Tensor | None = None,
    lengths: Lengths | None = None,
) -> Rows:
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
    source: Any = find_source(running_mean, running_var, training, momentum)
    if training:
        if running_mean is None or running_var is None:
            raise RuntimeError(
                "batch_renorm: training needs running statistics, too; got None; pass running_mean and running_var, or "
                "use batch_norm"
            )
        check_limits("batch_renorm", r_max, d_max, start_share)
        source = Renorm(running_mean, running_var, momentum, running_mean, running_var, (r_max, d_max), start_share)
    y: Rows = RENORM.normalize(input, weight, bias, residual, Request(source, eps, activation, mask, lengths))
    return y


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
