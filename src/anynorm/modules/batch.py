"""What is remembered: the norms that keep running averages, `BatchNorm1d/2d/3d` and `InstanceNorm1d/2d/3d`.

Constructors, attributes, buffers and state_dict are those of torch.nn, whose classes these are; `forward` is ours. It
is one call to a function that FX records as a whole, because classes outside torch.nn are traced through.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional
from .state import CheckedState


def batch_norm_forward(
    input: Tensor,
    axes: tuple[int, ...],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    track: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """One step of a BatchNorm module: count the batch, choose the source, normalize."""
    check_axes(input, axes)
    counted = num_batches_tracked if training and track else None
    factor: float | Tensor = 0.0 if momentum is None else momentum
    if momentum is None and counted is not None:
        # The cumulative average; a tensor, so that no compiler has to wait for its value (pytorch#194504).
        factor = (counted + 1).double().reciprocal()
    from_batch = training or (running_mean is None and running_var is None)
    if training and not track:
        running_mean = running_var = None
    y = functional.batch_norm(input, running_mean, running_var, weight, bias, from_batch, factor, eps)
    if counted is not None:
        counted.add_(1)  # Last, so that an input that is refused changes nothing.
    return y


def instance_norm_forward(
    input: Tensor,
    axes: tuple[int, int],
    num_features: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    from_input: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """One step of an InstanceNorm module, with or without a sample axis."""
    check_axes(input, axes)
    single = input.dim() == axes[0]
    channels = input.shape[0 if single else 1]
    if channels != num_features:
        message = (
            f"instance_norm: expected input's size at dim={0 if single else 1} to match num_features ({num_features}), "
            f"but got: {channels}"
        )
        if weight is not None:
            raise ValueError(f"{message}; build the norm for {channels} channels")
        warnings.warn(f"{message}; without affine and running statistics num_features is not used", stacklevel=3)
    x = input.unsqueeze(0) if single else input
    y = functional.instance_norm(x, running_mean, running_var, weight, bias, from_input, momentum, eps)
    return y.squeeze(0) if single else y


torch.fx.wrap("batch_norm_forward")
torch.fx.wrap("instance_norm_forward")


def check_axes(input: Tensor, axes: tuple[int, ...]) -> None:
    if input.dim() not in axes:
        raise ValueError(
            f"expected {' or '.join(f'{a}D' for a in axes)} input (got {input.dim()}D input); "
            f"got shape {tuple(input.shape)}; use the norm of the right dimension or unsqueeze"
        )


class _BatchNorm(CheckedState, nn.modules.batchnorm._BatchNorm):
    _axes: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:
        """y = (x - mean) / sqrt(var + eps) * weight + bias, see `anynorm.functional.batch_norm`."""
        return batch_norm_forward(
            input,
            self._axes,
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            self.weight,
            self.bias,
            self.training,
            self.track_running_stats,
            self.momentum,
            self.eps,
        )


class _InstanceNorm(CheckedState, nn.modules.instancenorm._InstanceNorm):
    _axes: tuple[int, int]

    def forward(self, input: Tensor) -> Tensor:
        """y = (x - mean) / sqrt(var + eps) * weight + bias, see `anynorm.functional.instance_norm`."""
        return instance_norm_forward(
            input,
            self._axes,
            self.num_features,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
        )


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, exact in float32 at any mean, for (N, C) or (N, C, L).

    Example:
        >>> anynorm.BatchNorm1d(2)(torch.tensor([[1.0, 1e6], [3.0, 1e6 + 2]])).detach()
        tensor([[-1.0000, -1.0000],
                [ 1.0000,  1.0000]])
    """

    _axes = (2, 3)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, exact in float32 at any mean, for (N, C, H, W).

    Example:
        >>> anynorm.BatchNorm2d(3).load_state_dict(torch.nn.BatchNorm2d(3).state_dict())
        <All keys matched successfully>
    """

    _axes = (4,)


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, exact in float32 at any mean, for (N, C, D, H, W).

    Example:
        >>> anynorm.BatchNorm3d(3)(torch.randn(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])
    """

    _axes = (5,)


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d`, exact in float32 at any mean, for (N, C, L) or (C, L).

    Example:
        >>> anynorm.InstanceNorm1d(1)(torch.tensor([[[1.0, 3.0]]]))
        tensor([[[-1.0000,  1.0000]]])
    """

    _axes = (2, 3)


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d`, exact in float32 at any mean and keeping channels_last, for (N, C, H, W) or (C, H, W).

    Example:
        >>> x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
        >>> anynorm.InstanceNorm2d(3)(x).is_contiguous(memory_format=torch.channels_last)
        True
    """

    _axes = (3, 4)


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d`, exact in float32 at any mean, for (N, C, D, H, W) or (C, D, H, W).

    Example:
        >>> anynorm.InstanceNorm3d(3)(torch.randn(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])
    """

    _axes = (4, 5)
