"""`instance_norm`: one mean and variance for each channel of each sample."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..engine.request import Request
from ..errors import (
    check_channels,
    check_floating_averages,
    check_groups,
    check_more_than_one,
    check_parameter_dtypes,
)
from ..padding import ragged
from ..padding.masks import Lengths
from ..padding.ragged import Rows
from ..torch_private import is_tracing_for_onnx
from .batch import check_averages, is_given, name_averages
from .front import Front, find_source

ONE_POSITION = "normalize before the positions are pooled away, or use layer norm"


class InstanceFront(Front):
    copies = True

    def write_call(self, x: Any, weight: Any, bias: Any, request: Request) -> Any:
        mean, var, *momentum = request.source
        return instance_norm, (x, mean, var, weight, bias, not is_given(request), *(momentum or [0.1]), request.eps)

    def normalize_ragged(self, x: Any, weight: Any, bias: Any, residual: Any, request: Request) -> Any:
        return ragged.by_sequence(self.function, x, weight, bias, residual, request)

    def check(self, x: Any, weight: Any, bias: Any, request: Request) -> None:
        check_groups(self.function, x, 1)
        averages = name_averages(request)
        check_channels(self.function, x.shape[1], weight=weight, bias=bias, **averages)
        mean, var = averages.values()
        if is_given(request):
            if mean is None or var is None:
                raise RuntimeError(
                    "instance_norm: use_input_stats=False needs running statistics; got None; pass running_mean and "
                    "running_var"
                )
            return
        if request.mask is None:
            count = self.scheme.pool(x).count(x)
            check_more_than_one(self.function, count, "channel of a sample", x, ONE_POSITION)
        if (mean is None) != (var is None):
            raise ValueError(
                "instance_norm: running_mean and running_var are given together or not at all; got one of them; "
                "pass both"
            )

    def check_memory(self, x: Any, weight: Any, bias: Any, request: Request) -> None:
        check_parameter_dtypes(self.function, x, weight=weight, bias=bias)
        check_floating_averages(self.function, **name_averages(request))
        check_averages(self.function, x, request)

    def is_torchs(self, request: Request) -> bool:
        return not (is_given(request) and is_tracing_for_onnx())  # whose symbol of it asks for sizes that are free

    def call_torch(self, x: Any, weight: Any, bias: Any, request: Request) -> Tensor:
        return F.instance_norm(*self.write_call(x, weight, bias, request)[1])


INSTANCE_NORM = InstanceFront("instance_norm", "instance")


def instance_norm(
    input: Rows,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Rows | None = None,
    mask: Tensor | None = None,
    lengths: Lengths | None = None,
) -> Rows:
    """Normalize each channel of each sample over its positions.

    y[n,c,s] = (x[n,c,s] - mean[n,c]) / sqrt(var[n,c] + eps) * weight[c] + bias[c]

    Args:
        input: (N, C, *), floating point.
        running_mean, running_var: (C,), averages over samples, read unless `use_input_stats`, else moved in place.
        weight, bias: (C,), gamma and beta.
        use_input_stats: take mean and variance from the input.
        momentum: weight of the new value in the running averages.
        eps: in units of x squared.
        activation, residual: y = activation(norm(input) + residual), see `anynorm.activations`.
        mask, lengths: which positions count, see `padding.masks`: (N, *), or for (N, C, L) a length for each sample.

    Returns:
        Shape and dtype of input; channels_last where input is (torch returns contiguous, pytorch#72341).

    Raises:
        ValueError: one position per channel with `use_input_stats`: every output would be beta.
        RuntimeError: sizes or dtypes that do not fit.

    Source:
        Ulyanov, Vedaldi and Lempitsky 2016, arXiv:1607.08022, equation 3.

    Example:
        >>> instance_norm(torch.tensor([[[1.0, 3.0]]]), eps=1e-12)
        tensor([[[-1.,  1.]]])
    """
    source = find_source(running_mean, running_var, use_input_stats, momentum)
    request = Request(source, eps, activation, mask, lengths)
    y: Rows = INSTANCE_NORM.normalize(input, weight, bias, residual, request)
    return y
