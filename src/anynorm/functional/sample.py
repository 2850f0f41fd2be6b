"""What is asked of the norms that look at one sample at a time: `layer_norm`, `rms_norm` and `group_norm`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import check_activation, check_finish, finish
from ..engine import paths as ops
from ..engine import protocol, watch
from ..errors import (
    check_channels,
    check_floating,
    check_groups,
    check_more_than_one,
    check_normalized_shape,
    check_parameter_dtypes,
    warn_of_one_value,
)
from ..family import FAMILY
from ..padding import ragged
from ..padding.masks import find_feature_mask, find_mask

FEWER_GROUPS = "use fewer groups"


def find_shape_key(normalized_shape: Any) -> Any:
    """What tells one shape from another that equals it and is refused, as (7.0,) and (True,) are."""
    if type(normalized_shape) is tuple:
        return normalized_shape, *map(type, normalized_shape)
    return repr(normalized_shape)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Any = None,
) -> Tensor:
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
    hashable = find_shape_key(normalized_shape)
    if mask is not None or lengths is not None:
        given: Any = (input, normalized_shape, weight, bias, eps)
        found = protocol.offer(layer_norm, given, activation, residual, mask, lengths)
        if found is not None:
            return found
        mask = find_feature_mask("layer_norm", input, normalized_shape, mask, lengths)
    if activation is not None:
        activation = check_activation("layer_norm", activation)
    key = watch.find_key("layer_norm", (hashable, activation), input, weight, bias, residual, mask)
    if key is not None and key in ops.RECIPES:
        return ops.run(ops.RECIPES[key], input, weight, bias, eps, None, activation, residual, None, mask)
    if key is None:
        if ragged.is_ragged(input):
            return ragged.by_rows(
                layer_norm, input, residual, normalized_shape, weight, bias, eps, activation=activation
            )
        given = (input, normalized_shape, weight, bias, eps)
        found = protocol.offer(layer_norm, given, activation, residual)
        if found is not None:
            return found
    check_floating("layer_norm", input)
    activation = check_finish("layer_norm", input, activation, residual)
    if input.is_nested:
        return finish(F.layer_norm(input, normalized_shape, weight, bias, eps), activation, residual)
    shape = check_normalized_shape("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    if ops.prefers_torch(input) and mask is None:
        return finish(F.layer_norm(input, shape, weight, bias, eps), activation, residual)
    check_parameter_dtypes("layer_norm", input, weight=weight, bias=bias)
    pooling = FAMILY["layer"].pool(input, (("d", shape),))
    warn_of_one_value("layer_norm", prod(shape), "sample", input, "beta whatever the input")
    return ops.normalize(
        input, pooling, weight, bias, eps, None, activation, residual, None, mask, key if prod(shape) > 1 else None
    )


def find_rms_eps(eps: float | None, x: Tensor) -> float:
    """eps, or what torch takes for None."""
    if eps is not None:
        return eps
    return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Any = None,
) -> Tensor:
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
    hashable = find_shape_key(normalized_shape)
    if mask is not None or lengths is not None:
        given: Any = (input, normalized_shape, weight, eps)
        found = protocol.offer(rms_norm, given, activation, residual, mask, lengths)
        if found is not None:
            return found
        mask = find_feature_mask("rms_norm", input, normalized_shape, mask, lengths)
    if activation is not None:
        activation = check_activation("rms_norm", activation)
    key = watch.find_key("rms_norm", (hashable, activation), input, weight, residual, mask)
    if key is not None and key in ops.RECIPES:
        eps = find_rms_eps(eps, input)
        return ops.run(ops.RECIPES[key], input, weight, None, eps, None, activation, residual, None, mask)
    if key is None:
        if ragged.is_ragged(input):
            return ragged.by_rows(rms_norm, input, residual, normalized_shape, weight, eps, activation=activation)
        given = (input, normalized_shape, weight, eps)
        found = protocol.offer(rms_norm, given, activation, residual)
        if found is not None:
            return found
    check_floating("rms_norm", input)
    activation = check_finish("rms_norm", input, activation, residual)
    if input.is_nested:
        return finish(F.rms_norm(input, normalized_shape, weight, eps), activation, residual)
    shape = check_normalized_shape("rms_norm", input, normalized_shape, weight=weight)
    if ops.prefers_torch(input) and mask is None:
        return finish(F.rms_norm(input, shape, weight, eps), activation, residual)
    pooling = FAMILY["rms"].pool(input, (("d", shape),))
    warn_of_one_value("rms_norm", prod(shape), "sample", input, "gamma with the sign of x")
    eps = find_rms_eps(eps, input)
    return ops.normalize(
        input, pooling, weight, None, eps, None, activation, residual, None, mask, key if prod(shape) > 1 else None
    )


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Any = None,
) -> Tensor:
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
    if mask is not None or lengths is not None:
        given: Any = (input, num_groups, weight, bias, eps)
        found = protocol.offer(group_norm, given, activation, residual, mask, lengths)
        if found is not None:
            return found
        mask = find_mask("group_norm", input, (1,), mask, lengths)
    if activation is not None:
        activation = check_activation("group_norm", activation)
    key = watch.find_key("group_norm", (num_groups, type(num_groups), activation), input, weight, bias, residual, mask)
    if key is not None and key in ops.RECIPES:
        return ops.run(ops.RECIPES[key], input, weight, bias, eps, None, activation, residual, None, mask)
    if key is None:
        if ragged.is_ragged(input):
            return ragged.by_sequence(
                "group_norm", input, residual, num_groups, weight, bias, eps=eps, activation=activation
            )
        given = (input, num_groups, weight, bias, eps)
        found = protocol.offer(group_norm, given, activation, residual)
        if found is not None:
            return found
    check_floating("group_norm", input)
    activation = check_finish("group_norm", input, activation, residual)
    check_groups("group_norm", input, num_groups)
    check_channels("group_norm", input.shape[1], weight=weight, bias=bias)
    if mask is None:
        check_more_than_one("group_norm", input.numel() // max(num_groups, 1), "group", input, FEWER_GROUPS)
    if ops.prefers_torch(input) and mask is None:
        return finish(F.group_norm(input, num_groups, weight, bias, eps), activation, residual)
    check_parameter_dtypes("group_norm", input, weight=weight, bias=bias)
    pooling = FAMILY["group"].pool(input, (("g", num_groups),))
    count = pooling.count(pooling.open(input))
    warn_of_one_value("group_norm", count, "group", input, "beta whatever the input")
    return ops.normalize(
        input, pooling, weight, bias, eps, None, activation, residual, None, mask, key if count > 1 else None
    )
