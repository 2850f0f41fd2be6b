"""The lazy variants: torch's lazy classes, which become ours once the first input has told the number of features."""

from __future__ import annotations

import torch.nn as nn

from .batch import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm
from .instance import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, _InstanceNorm


class LazyBatchNorm1d(_BatchNorm, nn.LazyBatchNorm1d):
    """`torch.nn.LazyBatchNorm1d` that becomes `anynorm.BatchNorm1d`."""

    cls_to_become: type[nn.BatchNorm1d] = BatchNorm1d
    _axes = BatchNorm1d._axes


class LazyBatchNorm2d(_BatchNorm, nn.LazyBatchNorm2d):
    """`torch.nn.LazyBatchNorm2d` that becomes `anynorm.BatchNorm2d`."""

    cls_to_become: type[nn.BatchNorm2d] = BatchNorm2d
    _axes = BatchNorm2d._axes


class LazyBatchNorm3d(_BatchNorm, nn.LazyBatchNorm3d):
    """`torch.nn.LazyBatchNorm3d` that becomes `anynorm.BatchNorm3d`."""

    cls_to_become: type[nn.BatchNorm3d] = BatchNorm3d
    _axes = BatchNorm3d._axes


class LazyInstanceNorm1d(_InstanceNorm, nn.LazyInstanceNorm1d):
    """`torch.nn.LazyInstanceNorm1d` that becomes `anynorm.InstanceNorm1d`."""

    cls_to_become: type[nn.InstanceNorm1d] = InstanceNorm1d
    _axes = InstanceNorm1d._axes


class LazyInstanceNorm2d(_InstanceNorm, nn.LazyInstanceNorm2d):
    """`torch.nn.LazyInstanceNorm2d` that becomes `anynorm.InstanceNorm2d`."""

    cls_to_become: type[nn.InstanceNorm2d] = InstanceNorm2d
    _axes = InstanceNorm2d._axes


class LazyInstanceNorm3d(_InstanceNorm, nn.LazyInstanceNorm3d):
    """`torch.nn.LazyInstanceNorm3d` that becomes `anynorm.InstanceNorm3d`."""

    cls_to_become: type[nn.InstanceNorm3d] = InstanceNorm3d
    _axes = InstanceNorm3d._axes
