"""What is remembered: `InstanceNorm1d/2d/3d`, which may keep running averages."""

from __future__ import annotations

import warnings
from typing import Any

import torch.nn as nn
from torch import Tensor

from .. import functional
from ..padding.ragged import is_ragged, open_rows
from .batch import _Running
from .counting import is_counted, mark_counted


def unsqueeze(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.unsqueeze(0)


class _InstanceNorm(_Running):
    def normalize(self, input: Tensor, **options: Any) -> Tensor:
        """Normalize with or without a sample axis; see `anynorm.functional.instance_norm`."""
        if is_ragged(input):
            single = False
            self._check_channels(open_rows("instance_norm", input).shape[1], 1)
        else:
            self._check_input_dim(input)
            single = input.dim() == self._axes[0]
            self._check_channels(input.shape[0 if single else 1], 0 if single else 1)
        if single:
            input = input.unsqueeze(0)
            options |= {name: unsqueeze(options.get(name)) for name in ("residual", "mask")}
        from_input = self.training or not self.track_running_stats
        moves = not from_input or (self.running_mean is not None and is_counted(self))
        y = functional.instance_norm(
            input,
            self.running_mean if moves else None,
            self.running_var if moves else None,
            self.weight,
            self.bias,
            from_input,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
            **options,
        )
        if from_input and moves:
            mark_counted(self)
        return y.squeeze(0) if single else y

    def find_channel_axes(self, input: Tensor) -> tuple[int, ...]:
        """Axis 0 of a single sample, else axis 1."""
        return (0,) if input.dim() == self._axes[0] else (1,)

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


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d`, exact in float32 at any mean, for (N, C, L) or (C, L).

    Example:
        >>> anynorm.InstanceNorm1d(1)(torch.tensor([[[1.0, 3.0]]]))
        tensor([[[-1.0000,  1.0000]]])
    """

    _axes: tuple[int, ...] = (2, 3)


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d`, exact in float32 at any mean and keeping channels_last, for (N, C, H, W) or (C, H, W).

    Example:
        >>> x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
        >>> anynorm.InstanceNorm2d(3)(x).is_contiguous(memory_format=torch.channels_last)
        True
    """

    _axes: tuple[int, ...] = (3, 4)


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d`, exact in float32 at any mean, for (N, C, D, H, W) or (C, D, H, W).

    Example:
        >>> anynorm.InstanceNorm3d(3)(torch.randn(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])
    """

    _axes: tuple[int, ...] = (4, 5)
