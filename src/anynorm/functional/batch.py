"""`batch_norm`: one mean and variance for each channel, over the batch and all positions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..engine import watch
from ..engine.request import Request
from ..errors import (
    check_batch_norm,
    check_channels,
    check_more_than_one,
    check_more_than_one_counted,
    check_no_overlap,
    check_parameter_dtypes,
)
from ..padding.masks import Lengths
from ..padding.ragged import Rows
from ..sources import Batch, Given, Merged
from ..torch_private import is_tracing_for_onnx
from .front import Front, find_source

BATCH_OF_ONE = (
    "use a larger batch, drop a last batch of one with DataLoader(drop_last=True), call eval(), or build the norm with "
    "on_single='running'"
)


def name_averages(request: Request) -> dict[str, Tensor | None]:
    """The running averages of a request, as torch calls them."""
    return {"running_mean": request.source[0], "running_var": request.source[1]}


class BatchFront(Front):
    def write_call(self, x: Any, weight: Any, bias: Any, request: Request) -> Any:
        mean, var, *momentum = request.source
        return batch_norm, (x, mean, var, weight, bias, not is_given(request), *(momentum or [0.1]), request.eps)

    def is_enough(self, count: int, request: Request) -> bool:
        return count != 1 or type(request.source) is not Batch

    def read_mask(self, x: Any, request: Request) -> Request:
        request = super().read_mask(x, request)
        # Other parts may have more.
        if type(request.source) is Batch and request.mask is not None and watch.has_memory(request.mask):
            check_more_than_one_counted(self.function, request.mask, x, BATCH_OF_ONE)
        return request

    def check(self, x: Any, weight: Any, bias: Any, request: Request) -> None:
        averages = name_averages(request)
        check_batch_norm(x, not is_given(request), request.eps, **averages)
        check_channels(self.function, x.shape[1], weight=weight, bias=bias, **averages)
        if request.mask is None and type(request.source) is Batch:
            check_more_than_one(self.function, self.scheme.pool(x).count(x), "channel", x, BATCH_OF_ONE)

    def check_memory(self, x: Any, weight: Any, bias: Any, request: Request) -> None:
        averages = name_averages(request)
        check_parameter_dtypes(self.function, x, weight=weight, bias=bias, **averages)
        check_averages(self.function, x, request)

    def takes_nothing(self, request: Request) -> bool:
        return type(request.source) is not Merged

    def is_torchs(self, request: Request) -> bool:
        if is_given(request):
            return True
        is_known = type(request.source) is Batch and isinstance(request.source.momentum, (float, int))
        # Its symbol of a batch norm without averages asks for sizes that are free.
        return is_known and not (request.source[0] is None and is_tracing_for_onnx())

    def call_torch(self, x: Any, weight: Any, bias: Any, request: Request) -> Tensor:
        return F.batch_norm(*self.write_call(x, weight, bias, request)[1])


def is_given(request: Request) -> bool:
    """Whether the averages are read, and not moved."""
    return type(request.source) is Given


def check_averages(function: str, x: Tensor, request: Request) -> None:
    """Refuse averages that share memory, where they are about to move."""
    mean, var = request.source[0], request.source[1]  # not a slice: torch.compile of 2.8 makes none of named tuples
    if not is_given(request) and mean is not None and var is not None and watch.has_memory(x, mean, var):
        check_no_overlap(function, x, mean, var)


BATCH_NORM: BatchFront = BatchFront("batch_norm", "batch")


def batch_norm(
    input: Rows,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Rows | None = None,
    mask: Tensor | None = None,
    lengths: Lengths | None = None,
) -> Rows:
    """Normalize each channel over the batch and all positions.

    y[n,c,s] = (x[n,c,s] - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c]

    Args:
        input: (N, C) or (N, C, *), floating point.
        running_mean, running_var: (C,), read in evaluation, moved in place in training; or None in training.
        weight, bias: (C,), gamma and beta.
        training: take mean and variance from the batch.
        momentum: weight of the new value in the running averages; a tensor is allowed.
        eps: in units of x squared.
        activation, residual: y = activation(norm(input) + residual), see `anynorm.activations`.
        mask, lengths: which positions count, see `padding.masks`: (N, *), or for (N, C, L) a length for each sample.

    Returns:
        Shape and dtype of input; channels_last where input is.

    Raises:
        ValueError: one value per channel in training; buffers that share memory.
        RuntimeError: sizes or dtypes that do not fit.

    Note:
        The batch is normalized by its population variance; running_var moves towards n/(n-1) times that, as in torch.

    Source:
        Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> batch_norm(x, None, None, training=True, eps=1e-12)
        tensor([[-1.],
                [ 1.]])
    """
    request = Request(find_source(running_mean, running_var, training, momentum), eps, activation, mask, lengths)
    y: Rows = BATCH_NORM.normalize(input, weight, bias, residual, request)
    return y
