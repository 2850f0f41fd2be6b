"""What is asked of the norms that keep running averages: `batch_norm` and `instance_norm`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import check_activation, check_finish, finish
from ..engine import paths as ops
from ..engine import protocol, watch
from ..errors import (
    check_batch_norm,
    check_channels,
    check_floating,
    check_floating_averages,
    check_groups,
    check_more_than_one,
    check_more_than_one_counted,
    check_no_overlap,
    check_parameter_dtypes,
)
from ..family import FAMILY
from ..padding import ragged
from ..padding.masks import find_mask
from ..pooling import Pooling

BATCH_OF_ONE = (
    "use a larger batch, drop a last batch of one with DataLoader(drop_last=True), call eval(), or build the norm with "
    "on_single='running'"
)
ONE_POSITION = "normalize before the positions are pooled away, or use layer norm"


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
    check_parameter_dtypes(function, x, weight=weight, bias=bias)
    averages = {"running_mean": mean, "running_var": var}
    if function == "instance_norm":
        check_floating_averages(function, **averages)
    else:
        check_parameter_dtypes(function, x, **averages)
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


def normalize_nothing(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    """torch's batch norm of an input without elements: of any dtype, with averages or without; none of them moves."""
    y = x.clone()
    for parameter in (weight, bias):  # They get a gradient, of zeros.
        y = y if parameter is None else y + parameter.sum().to(y.dtype)
    return finish(y, activation, residual)


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
    if mask is not None or lengths is not None:
        given: Any = (input, running_mean, running_var, weight, bias, training, momentum, eps)
        found = protocol.offer(batch_norm, given, activation, residual, mask, lengths)
        if found is not None:
            return found
        mask = find_mask("batch_norm", input, (1,), mask, lengths)
        if training and mask is not None and watch.has_memory(mask):
            check_more_than_one_counted("batch_norm", mask, input, BATCH_OF_ONE)
    if activation is not None:
        activation = check_activation("batch_norm", activation)
    key = watch.find_key(
        "batch_norm", (training, eps, activation), input, weight, bias, running_mean, running_var, residual, mask
    )
    if key is not None and key in ops.RECIPES:
        return run_with_running(
            key, input, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, mask
        )
    if key is None:
        if ragged.is_ragged(input):
            rest: Any = (running_mean, running_var, weight, bias, training, momentum, eps)
            return ragged.by_rows(batch_norm, input, residual, *rest, activation=activation)
        given = (input, running_mean, running_var, weight, bias, training, momentum, eps)
        found = protocol.offer(batch_norm, given, activation, residual)
        if found is not None:
            return found
    check_floating("batch_norm", input)
    activation = check_finish("batch_norm", input, activation, residual)
    if input.dim() == 1 and not input.numel():
        return normalize_nothing(input, weight, bias, activation, residual)
    check_batch_norm(input, training, eps, running_mean=running_mean, running_var=running_var)
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_channels("batch_norm", input.shape[1], **named)
    pooling = FAMILY["batch"].pool(input)
    if training and mask is None:
        check_more_than_one("batch_norm", pooling.count(input), "channel", input, BATCH_OF_ONE)
    if ops.prefers_torch(input) and mask is None and isinstance(momentum, float | int):
        return finish(
            F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps), activation, residual
        )
    if not input.numel():
        return normalize_nothing(input, weight, bias, activation, residual)
    running = (running_mean, running_var)
    return normalize_with_running(
        "batch_norm", input, pooling, running, weight, bias, training, momentum, eps, activation, residual, mask, key
    )


def copy_parameters(
    weight: Tensor | None, bias: Tensor | None, activation: str | None
) -> tuple[Tensor | None, Tensor | None]:
    """What instance norm keeps for backward, so that both may change in place until then, as torch's may."""
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        weight = weight.clone()
    if activation is not None and bias is not None and bias.requires_grad and torch.is_grad_enabled():
        bias = bias.clone()
    return weight, bias


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
    if mask is not None or lengths is not None:
        given: Any = (input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
        found = protocol.offer(instance_norm, given, activation, residual, mask, lengths)
        if found is not None:
            return found
        mask = find_mask("instance_norm", input, (1,), mask, lengths)
    if activation is not None:
        activation = check_activation("instance_norm", activation)
    key = watch.find_key(
        "instance_norm", (use_input_stats, activation), input, weight, bias, running_mean, running_var, residual, mask
    )
    if key is not None and key in ops.RECIPES:
        weight, bias = copy_parameters(weight, bias, activation)
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
    if key is None:
        if ragged.is_ragged(input):
            averages: Any = None if running_mean is None else (running_mean, running_var, momentum)
            how: Any = {"eps": eps, "activation": activation, "running": averages, "from_batch": use_input_stats}
            return ragged.by_sequence("instance_norm", input, residual, None, weight, bias, **how)
        given = (input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
        found = protocol.offer(instance_norm, given, activation, residual)
        if found is not None:
            return found
    check_floating("instance_norm", input)
    activation = check_finish("instance_norm", input, activation, residual)
    check_groups("instance_norm", input, 1)
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_channels("instance_norm", input.shape[1], **named)
    pooling = FAMILY["instance"].pool(input)
    if use_input_stats:
        if mask is None:
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
    weight, bias = copy_parameters(weight, bias, activation)
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
