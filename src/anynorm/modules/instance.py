"""What is remembered: `InstanceNorm1d/2d/3d`, which may keep running averages."""

from __future__ import annotations

import warnings
from typing import Any

import torch.nn as nn
from torch import Tensor

from ..engine.request import Request
from ..functional.instance import INSTANCE_NORM
from ..padding.ragged import is_ragged, open_rows
from ..sources import BATCH, Batch, Given, Source
from .batch import _Running
from .counting import is_counted, mark_counted


class _InstanceNorm(_Running):
    """What instance norm does at a call."""

    def normalize(
        self, input: Any, residual: Any = None, activation: Any = None, mask: Any = None, lengths: Any = None
    ) -> Any:
        """Check, choose the source, normalize with or without a sample axis, note that averages have moved."""
        if is_ragged(input):
            single = False
            self._check_channels(open_rows("instance_norm", input).shape[1], 1)
        else:
            self._check_input_dim(input)
            single = input.dim() == self._axes[0]
            self._check_channels(input.shape[0 if single else 1], 0 if single else 1)
        if single:
            input, residual, mask = (t if t is None else t.unsqueeze(0) for t in (input, residual, mask))
        source, moves = self.find_source()
        request = Request(source, self.eps, activation, mask, lengths)
        y = INSTANCE_NORM.normalize(input, *self.read_affine(), residual, request)
        if moves:
            mark_counted(self)
        return y.squeeze(0) if single else y

    def find_source(self) -> tuple[Source, bool]:
        """Where statistics come from, and whether running averages move."""
        mean, var = self.running_mean, self.running_var
        if not self.training and self.track_running_stats:
            return Given(mean, var), False  # type: ignore[arg-type] # None is refused by the checks
        if mean is None or not is_counted(self):
            return BATCH, False
        return Batch(mean, var, 0.0 if self.momentum is None else self.momentum), True

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
