"""`rms_norm`: layer norm about zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..engine.request import Request
from ..errors import warn_of_one_value
from ..padding.masks import Lengths
from ..padding.ragged import Rows
from ..pooling import Pooling
from ..sources import BATCH
from ..torch_private import is_tracing_for_onnx
from .layer import FeaturesFront


class RMSFront(FeaturesFront):
    def write_call(self, x: Any, weight: Any, bias: Any, request: Request) -> Any:
        return rms_norm, (x, request.sizes, weight, request.eps)

    def check(self, x: Any, weight: Any, bias: Any, request: Request) -> None:
        super().check(x, weight, None, request)

    def warns(self, x: Tensor, pooling: Pooling) -> bool:
        return warn_of_one_value(self.function, pooling.count(x), "sample", x, "gamma with the sign of x")

    def is_torchs(self, request: Request) -> bool:
        return not is_tracing_for_onnx()

    def call_torch(self, x: Any, weight: Any, bias: Any, request: Request) -> Tensor:
        return F.rms_norm(x, request.sizes, weight, request.eps)


RMS_NORM = RMSFront("rms_norm", "rms")


def find_rms_eps(eps: float | None, x: Any) -> float:
    """eps, or what torch takes for None."""
    if eps is not None:
        return eps
    x = x.data if isinstance(x, PackedSequence) else x
    return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps


def rms_norm(
    input: Rows,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str | None = None,
    residual: Rows | None = None,
    mask: Tensor | None = None,
    lengths: Lengths | None = None,
) -> Rows:
    """Divide each sample by the root mean square of its last axes; nothing is subtracted.

    y[n,d] = x[n,d] / sqrt(mean over d of x[n,d]**2 + eps) * weight[d]

    Args:
        input: (*, *normalized_shape), floating point.
        normalized_shape: sizes of the last axes, which share a mean square.
        weight: normalized_shape, gamma.
        eps: in units of x squared; None takes the machine epsilon of the computation in torch: that of float32 for
            half types and float32, of float64 for float64.
        activation, residual: y = activation(norm(input) + residual), see `anynorm.activations`.
        mask, lengths: which positions count, see `padding.masks`: the input's axes before normalized_shape, or for
            (N, L, *) a length for each sample.

    Returns:
        Shape and dtype of input.

    Raises:
        RuntimeError: shapes that do not fit.

    Source:
        Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.

    Example:
        >>> rms_norm(torch.tensor([[3.0, 3.0]]), (2,))
        tensor([[1., 1.]])
    """
    request = Request(BATCH, find_rms_eps(eps, input), activation, mask, lengths, normalized_shape)
    y: Rows = RMS_NORM.normalize(input, weight, None, residual, request)
    return y
