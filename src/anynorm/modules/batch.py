"""What is remembered: the norms that keep running averages, `BatchNorm1d/2d/3d` and `InstanceNorm1d/2d/3d`.

Constructors, attributes, buffers and state_dict are those of torch.nn, whose classes these are; the numbers are ours.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch.nn as nn
from torch import Tensor

from .. import functional
from ..errors import check_axes
from ..sources import find_momentum
from .state import Norm


class _Running(Norm):
    """What the mix-ins here ask of a class, so that torch's subclasses and the fused classes share them."""

    _axes: tuple[int, ...]
    num_features: int
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    weight: Any  # Tensor | None; every class of torch's declares it in its own way
    bias: Any
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def _check_input_dim(self, input: Tensor) -> None:
        check_axes(input, self._axes)


class _BatchNorm(_Running):
    def normalize(self, input: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        """Choose the source, normalize, count the batch; see `anynorm.functional.batch_norm`."""
        self._check_input_dim(input)  # torch's hook: subclasses override it
        training, running_mean, running_var, counter = self.training, None, None, None
        momentum: float | Tensor | None = self.momentum
        if not training or self.track_running_stats:
            running_mean, running_var = self.running_mean, self.running_var
            if training:
                counter = self.num_batches_tracked
        if momentum is None:
            momentum = find_momentum(None, counter)
        y = functional.batch_norm(
            input,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            training or (running_mean is None and running_var is None),
            momentum,
            self.eps,
            activation=activation,
            residual=residual,
        )
        if counter is not None:
            counter.add_(1)  # Last, so that an input that is refused changes nothing.
        return y


class _InstanceNorm(_Running):
    def normalize(self, input: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        """Normalize with or without a sample axis; see `anynorm.functional.instance_norm`."""
        self._check_input_dim(input)
        single = input.dim() == self._axes[0]
        self._check_channels(input.shape[0 if single else 1], 0 if single else 1)
        if single:
            input, residual = input.unsqueeze(0), residual if residual is None else residual.unsqueeze(0)
        y = functional.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
            activation=activation,
            residual=residual,
        )
        return y.squeeze(0) if single else y

    def _check_channels(self, channels: int, axis: int) -> None:
        if channels == self.num_features:
            return
        message = (
            f"instance_norm: expected input's size at dim={axis} to match num_features ({self.num_features}), "
            f"but got: {channels}"
        )
        if self.affine:
            raise ValueError(f"{message}; build the norm for {channels} channels")
        warnings.warn(f"{message}; without affine and running statistics num_features is not used", stacklevel=5)


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
