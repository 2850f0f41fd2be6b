"""`group_norm`: one mean and variance for each group of channels of each sample."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..engine.request import Request
from ..errors import check_channels, check_groups, check_more_than_one, check_parameter_dtypes, warn_of_one_value
from ..padding import ragged
from ..padding.masks import Lengths
from ..padding.ragged import Rows
from ..pooling import Pooling
from ..sources import BATCH
from .front import Front

FEWER_GROUPS = "use fewer groups"


class GroupFront(Front):
    """`sizes` is the number of groups."""

    def write_call(self, x: Any, weight: Any, bias: Any, request: Request) -> Any:
        return group_norm, (x, request.sizes, weight, bias, request.eps)

    def normalize_ragged(self, x: Any, weight: Any, bias: Any, residual: Any, request: Request) -> Any:
        return ragged.by_sequence(self.function, x, weight, bias, residual, request)

    def check(self, x: Any, weight: Any, bias: Any, request: Request) -> None:
        check_groups(self.function, x, request.sizes)
        check_channels(self.function, x.shape[1], weight=weight, bias=bias)
        if request.mask is None:
            check_more_than_one(self.function, x.numel() // max(request.sizes, 1), "group", x, FEWER_GROUPS)

    def check_memory(self, x: Any, weight: Any, bias: Any, request: Request) -> None:
        check_parameter_dtypes(self.function, x, weight=weight, bias=bias)

    def find_pooling(self, x: Tensor, request: Request) -> Pooling:
        return self.scheme.pool(x, (("g", request.sizes),))

    def warns(self, x: Tensor, pooling: Pooling) -> bool:
        count = pooling.count(pooling.open(x))
        return warn_of_one_value(self.function, count, "group", x, "beta whatever the input")

    def call_torch(self, x: Any, weight: Any, bias: Any, request: Request) -> Tensor:
        return F.group_norm(x, request.sizes, weight, bias, request.eps)


GROUP_NORM = GroupFront("group_norm", "group")


def group_norm(
    input: Rows,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Rows | None = None,
    mask: Tensor | None = None,
    lengths: Lengths | None = None,
) -> Rows:
    """Normalize each group of channels of each sample over the group and all positions.

    y[n,c,s] = (x[n,c,s] - mean[n,g]) / sqrt(var[n,g] + eps) * weight[c] + bias[c],  g the group of channel c

    Args:
        input: (N, C, *), floating point.
        num_groups: how many groups of C / num_groups neighbouring channels.
        weight, bias: (C,), gamma and beta.
        eps: in units of x squared.
        activation, residual: y = activation(norm(input) + residual), see `anynorm.activations`.
        mask, lengths: which positions count, see `padding.masks`: (N, *), or for (N, C, L) a length for each sample.

    Returns:
        Shape and dtype of input; channels_last where input is.

    Raises:
        RuntimeError: channels not divisible by groups; sizes or dtypes that do not fit.
        ValueError: a single value per group in a batch of one: the output would be beta.

    Source:
        Wu and He 2018, arXiv:1803.08494, equation 7.

    Example:
        >>> group_norm(torch.tensor([[1.0, 3.0, 5.0, 9.0]]), 2, eps=1e-12)
        tensor([[-1.,  1., -1.,  1.]])
    """
    request = Request(BATCH, eps, activation, mask, lengths, num_groups)
    y: Rows = GROUP_NORM.normalize(input, weight, bias, residual, request)
    return y
