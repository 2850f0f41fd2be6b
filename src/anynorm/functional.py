"""What is asked: the norms with the signatures of torch.nn.functional, checked and handed to the one engine.

Each function answers the three questions with its line of `family.FAMILY` and lets `ops.normalize` do the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, ragged, watch
from .activations import check_finish, finish
from .errors import (
    check_batch_norm,
    check_channels,
    check_floating,
    check_groups,
    check_more_than_one,
    check_more_than_one_counted,
    check_no_overlap,
    check_normalized_shape,
    check_parameter_dtypes,
    warn_of_one_value,
)
from .family import FAMILY, Scheme
from .masks import find_feature_mask, find_mask
from .pooling import Pooling, Sizes, find_pooling

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]

BATCH_OF_ONE = (
    "use a larger batch, drop a last batch of one with DataLoader(drop_last=True), call eval(), or build the norm with "
    "on_single='running'"
)
ONE_POSITION = "normalize before the positions are pooled away, or use layer norm"
FEWER_GROUPS = "use fewer groups"


def pool(scheme: Scheme, x: Tensor, sizes: Sizes = ()) -> Pooling:
    """The scheme's pattern, worked out for x."""
    return find_pooling(scheme.pattern, scheme.affine, scheme.centred, x.dim(), sizes)


def normalize_with_running(
    function: str,
    x: Tensor,
    pooling: Pooling,
    running: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    from_batch: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    key: tuple | None = None,
) -> Tensor:
    """Take statistics from the batch and move the running averages, or take them from the running averages."""
    mean, var = running
    names = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    check_parameter_dtypes(function, x, **names)
    if not from_batch:
        assert mean is not None
        assert var is not None
        return ops.normalize(x, pooling, weight, bias, eps, (mean, var), activation, residual, None, mask, key)
    if mean is not None and var is not None:
        if watch.has_memory(x, mean, var):
            check_no_overlap(function, x, mean, var)
        return ops.normalize(
            x, pooling, weight, bias, eps, None, activation, residual, (mean, var, momentum), mask, key
        )
    return ops.normalize(x, pooling, weight, bias, eps, None, activation, residual, None, mask, key)


def run_with_running(
    key: Any,
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    from_batch: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """`normalize_with_running` where the same checks have passed before."""
    recipe = ops.RECIPES[key]
    if mean is None or var is None:
        return ops.run(recipe, x, weight, bias, eps, None, activation, residual, None, mask)
    if not from_batch:
        return ops.run(recipe, x, weight, bias, eps, (mean, var), activation, residual, None, mask)
    try:
        return ops.run(recipe, x, weight, bias, eps, None, activation, residual, (mean, var, momentum), mask)
    except ValueError:  # The kernels refuse memory that overlaps, before they touch it; say what overlaps.
        check_no_overlap(key[0], x, mean, var)
        raise


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Any = None,
) -> Tensor:
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
        mask, lengths: which positions count, see `anynorm.masks`: (N, *), or for (N, C, L) a length for each sample.

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
    if mask is not None or lengths is not None:
        mask = find_mask("batch_norm", input, (1,), mask, lengths)
        if training and mask is not None and watch.has_memory(mask):
            check_more_than_one_counted("batch_norm", mask, input, BATCH_OF_ONE)
    options = (training, eps, activation)
    key = watch.find_key("batch_norm", options, input, weight, bias, running_mean, running_var, residual, mask)
    if key is not None and key in ops.RECIPES:
        return run_with_running(
            key, input, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, mask
        )
    if key is None and ragged.is_ragged(input):
        how: Any = (running_mean, running_var, weight, bias, training, momentum, eps)
        return ragged.by_rows(batch_norm, input, residual, *how, activation=activation)
    check_floating("batch_norm", input)
    activation = check_finish("batch_norm", input, activation, residual)
    check_batch_norm(input, training, eps, running_mean=running_mean, running_var=running_var)
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_channels("batch_norm", input.shape[1], **named)
    pooling = pool(FAMILY["batch"], input)
    if training:
        check_more_than_one("batch_norm", pooling.count(input), "channel", input, BATCH_OF_ONE)
    if ops.prefers_torch(input) and mask is None and isinstance(momentum, float | int):
        return finish(
            F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps), activation, residual
        )
    running = (running_mean, running_var)
    return normalize_with_running(
        "batch_norm", input, pooling, running, weight, bias, training, momentum, eps, activation, residual, mask, key
    )


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Any = None,
) -> Tensor:
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
        mask, lengths: which positions count, see `anynorm.masks`: (N, *), or for (N, C, L) a length for each sample.

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
    if mask is not None or lengths is not None:
        mask = find_mask("instance_norm", input, (1,), mask, lengths)
    options = (use_input_stats, activation)
    key = watch.find_key("instance_norm", options, input, weight, bias, running_mean, running_var, residual, mask)
    if key is not None and key in ops.RECIPES:
        return run_with_running(
            key,
            input,
            running_mean,
            running_var,
            weight,
            bias,
            use_input_stats,
            momentum,
            eps,
            activation,
            residual,
            mask,
        )
    if key is None and ragged.is_ragged(input):
        averages: Any = None if running_mean is None else (running_mean, running_var, momentum)
        return ragged.by_sequence(
            "instance_norm", input, residual, None, weight, bias, eps, activation, averages, use_input_stats
        )
    check_floating("instance_norm", input)
    activation = check_finish("instance_norm", input, activation, residual)
    check_groups("instance_norm", input, 1)
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_channels("instance_norm", input.shape[1], **named)
    pooling = pool(FAMILY["instance"], input)
    if use_input_stats:
        check_more_than_one("instance_norm", pooling.count(input), "channel of a sample", input, ONE_POSITION)
        if (running_mean is None) != (running_var is None):
            raise ValueError(
                "instance_norm: running_mean and running_var are given together or not at all; got one of them; "
                "pass both"
            )
    elif running_mean is None or running_var is None:
        raise RuntimeError(
            "instance_norm: use_input_stats=False needs running statistics; got None; pass running_mean and running_var"
        )
    if ops.prefers_torch(input) and mask is None:
        return finish(
            F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps),
            activation,
            residual,
        )
    running = (running_mean, running_var)
    return normalize_with_running(
        "instance_norm",
        input,
        pooling,
        running,
        weight,
        bias,
        use_input_stats,
        momentum,
        eps,
        activation,
        residual,
        mask,
        key,
    )


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
        mask, lengths: which positions count, see `anynorm.masks`: the input's axes before normalized_shape, or for
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
    hashable = normalized_shape if type(normalized_shape) is tuple else str(normalized_shape)
    if mask is not None or lengths is not None:
        mask = find_feature_mask("layer_norm", input, normalized_shape, mask, lengths)
    key = watch.find_key("layer_norm", (hashable, activation), input, weight, bias, residual, mask)
    if key is not None and key in ops.RECIPES:
        return ops.run(ops.RECIPES[key], input, weight, bias, eps, None, activation, residual, None, mask)
    if key is None and ragged.is_ragged(input):
        return ragged.by_rows(layer_norm, input, residual, normalized_shape, weight, bias, eps, activation=activation)
    check_floating("layer_norm", input)
    activation = check_finish("layer_norm", input, activation, residual)
    if input.is_nested:
        return finish(F.layer_norm(input, normalized_shape, weight, bias, eps), activation, residual)
    shape = check_normalized_shape("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    if ops.prefers_torch(input) and mask is None:
        return finish(F.layer_norm(input, shape, weight, bias, eps), activation, residual)
    check_parameter_dtypes("layer_norm", input, weight=weight, bias=bias)
    pooling = pool(FAMILY["layer"], input, (("d", shape),))
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
        mask, lengths: which positions count, see `anynorm.masks`: the input's axes before normalized_shape, or for
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
    hashable = normalized_shape if type(normalized_shape) is tuple else str(normalized_shape)
    if mask is not None or lengths is not None:
        mask = find_feature_mask("rms_norm", input, normalized_shape, mask, lengths)
    key = watch.find_key("rms_norm", (hashable, activation), input, weight, residual, mask)
    if key is not None and key in ops.RECIPES:
        eps = find_rms_eps(eps, input)
        return ops.run(ops.RECIPES[key], input, weight, None, eps, None, activation, residual, None, mask)
    if key is None and ragged.is_ragged(input):
        return ragged.by_rows(rms_norm, input, residual, normalized_shape, weight, eps, activation=activation)
    check_floating("rms_norm", input)
    activation = check_finish("rms_norm", input, activation, residual)
    if input.is_nested:
        return finish(F.rms_norm(input, normalized_shape, weight, eps), activation, residual)
    shape = check_normalized_shape("rms_norm", input, normalized_shape, weight=weight)
    if ops.prefers_torch(input) and mask is None:
        return finish(F.rms_norm(input, shape, weight, eps), activation, residual)
    pooling = pool(FAMILY["rms"], input, (("d", shape),))
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
        mask, lengths: which positions count, see `anynorm.masks`: (N, *), or for (N, C, L) a length for each sample.

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
        mask = find_mask("group_norm", input, (1,), mask, lengths)
    key = watch.find_key("group_norm", (num_groups, activation), input, weight, bias, residual, mask)
    if key is not None and key in ops.RECIPES:
        return ops.run(ops.RECIPES[key], input, weight, bias, eps, None, activation, residual, None, mask)
    if key is None and ragged.is_ragged(input):
        return ragged.by_sequence("group_norm", input, residual, num_groups, weight, bias, eps, activation)
    check_floating("group_norm", input)
    activation = check_finish("group_norm", input, activation, residual)
    check_groups("group_norm", input, num_groups)
    check_channels("group_norm", input.shape[1], weight=weight, bias=bias)
    check_more_than_one("group_norm", input.numel() // max(num_groups, 1), "group", input, FEWER_GROUPS)
    if ops.prefers_torch(input) and mask is None:
        return finish(F.group_norm(input, num_groups, weight, bias, eps), activation, residual)
    check_parameter_dtypes("group_norm", input, weight=weight, bias=bias)
    pooling = pool(FAMILY["group"], input, (("g", num_groups),))
    count = pooling.count(pooling.open(input))
    warn_of_one_value("group_norm", count, "group", input, "beta whatever the input")
    return ops.normalize(
        input, pooling, weight, bias, eps, None, activation, residual, None, mask, key if count > 1 else None
    )


# FX records a call of these as one node.
for name in __all__:
    torch.fx.wrap(name)
