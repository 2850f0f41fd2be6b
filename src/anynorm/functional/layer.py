"""`layer_norm`: one mean and variance for each sample, over its last axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..engine.request import Request
from ..errors import check_normalized_shape, check_parameter_dtypes, warn_of_one_value
from ..padding.masks import Lengths, find_feature_mask
from ..padding.ragged import Rows
from ..pooling import Pooling
from ..sources import BATCH
from .front import Front


class FeaturesFront(Front):
    """What the norms over the last axes share; `sizes` is the shape of these."""

    def find_channels(self, request: Request) -> tuple[int, int] | None:
        return (-len(request.sizes), len(request.sizes)) if type(request.sizes) is tuple else None

    def read_mask(self, x: Any, request: Request) -> Request:
        mask = find_feature_mask(self.function, x, request.sizes, request.mask, request.lengths)
        return request._replace(mask=mask, lengths=None)

    def check(self, x: Any, weight: Any, bias: Any, request: Request) -> None:
        check_normalized_shape(self.function, x, request.sizes, weight=weight, bias=bias)

    def find_pooling(self, x: Tensor, request: Request) -> Pooling:
        return self.scheme.pool(x, (("d", tuple(request.sizes)),))


class LayerFront(FeaturesFront):
    def write_call(self, x: Any, weight: Any, bias: Any, request: Request) -> Any:
        return layer_norm, (x, request.sizes, weight, bias, request.eps)

    def check_memory(self, x: Any, weight: Any, bias: Any, request: Request) -> None:
        check_parameter_dtypes(self.function, x, weight=weight, bias=bias)

    def warns(self, x: Tensor, pooling: Pooling) -> bool:
        return warn_of_one_value(self.function, pooling.count(x), "sample", x, "beta whatever the input")

    def call_torch(self, x: Any, weight: Any, bias: Any, request: Request) -> Tensor:
        return F.layer_norm(x, request.sizes, weight, bias, request.eps)


LAYER_NORM = LayerFront("layer_norm", "layer")


def layer_norm(
    input: Rows,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Rows | None = None,
    mask: Tensor | None = None,
    lengths: Lengths | None = None,
) -> Rows:
    """Normalize each sample over its last axes.

    y[n,d] = (x[n,d] - mean[n]) / sqrt(var[n] + eps) * weight[d] + bias[d]

    Args:
        input: (*, *normalized_shape), floating point.
        normalized_shape: sizes of the last axes, which share a mean and a variance.
        weight, bias: normalized_shape, gamma and beta.
        eps: in units of x squared.
        activation, residual: y = activation(norm(input) + residual), see `anynorm.activations`.
        mask, lengths: which positions count, see `padding.masks`: the input's axes before normalized_shape, or for
            (N, L, *) a length for each sample.

    Returns:
        Shape and dtype of input.

    Raises:
        RuntimeError: shapes or dtypes that do not fit.

    Source:
        Ba, Kiros and Hinton 2016, arXiv:1607.06450, equations 3 and 4.

    Example:
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), (2,), eps=1e-12)
        tensor([[-1.,  1.]])
    """
    request = Request(BATCH, eps, activation, mask, lengths, normalized_shape)
    y: Rows = LAYER_NORM.normalize(input, weight, bias, residual, request)
    return y
