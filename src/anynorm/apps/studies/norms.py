"""The norms that are compared: each name answers with a factory(num_features, dims)."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor, nn

import anynorm

# num_features and the number of spatial axes of the input: 0 for (N, C), 1 for (N, C, L), 2 for (N, C, H, W).
NormFactory = Callable[[int, int], nn.Module]


class CannotNormalize(Exception):
    """A norm that cannot exist at this place; the message is the reason, shown beside n/a."""


def check_dims(dims: int) -> None:
    """Raise where `dims` is not a number of spatial axes."""
    if dims not in (0, 1, 2, 3):
        raise ValueError(f"norm(num_features, dims): dims counts the spatial axes, 0 to 3; got {dims!r}")


def none(num_features: int, dims: int) -> nn.Module:
    """No normalization: the baseline."""
    return nn.Identity()


def batch(num_features: int, dims: int) -> nn.Module:
    """Each channel over the batch and all positions."""
    kinds = (anynorm.BatchNorm1d, anynorm.BatchNorm1d, anynorm.BatchNorm2d, anynorm.BatchNorm3d)
    return kinds[dims](num_features)


def layer(num_features: int, dims: int) -> nn.Module:
    """Each sample over all channels and positions; gamma and beta per channel, as in Wu & He (2018)."""
    return anynorm.AnyNorm("n c s -> n", affine="c", c=num_features)


def instance(num_features: int, dims: int) -> nn.Module:
    """Each channel of each sample over its positions, with gamma and beta."""
    if dims == 0:
        raise CannotNormalize(
            "instance norm on a dense layer has one value in each group, and one value minus its own mean is always 0"
        )
    kinds = (anynorm.InstanceNorm1d, anynorm.InstanceNorm2d, anynorm.InstanceNorm3d)
    return kinds[dims - 1](num_features, affine=True)


def group(num_features: int, dims: int) -> nn.Module:
    """Each group of channels of each sample over all positions."""
    return anynorm.GroupNorm(choose_groups(num_features), num_features)


def rms(num_features: int, dims: int) -> nn.Module:
    """Each sample over all channels and positions, divided by the root mean square; nothing is subtracted."""
    return anynorm.AnyNorm("n c s -> n", affine="c", centred=False, c=num_features)


def choose_groups(num_features: int) -> int:
    """The divisor of num_features nearest to its square root, neither 1 nor all where another exists, at most 32."""
    between = [g for g in range(2, min(num_features - 1, 32) + 1) if num_features % g == 0]
    return min(between, key=lambda g: abs(g - isqrt(num_features)), default=1)


NORMS: dict[str, NormFactory] = {
    "none": none,
    "batch": batch,
    "layer": layer,
    "instance": instance,
    "group": group,
    "rms": rms,
}


class InParts(nn.Module):
    """A norm that is called, in training, on `size` samples after the other: as if it saw micro-batches."""

    def __init__(self, norm: nn.Module, size: int) -> None:
        super().__init__()
        self.norm, self.size = norm, size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(part) for part in x.split(self.size)]) if self.training else self.norm(x)


def ghosts(size: int, batch: int) -> NormFactory:
    """Batch norm of each `size` samples of a batch; averages are over equally many samples at any size."""
    kinds = (anynorm.GhostBatchNorm1d, anynorm.GhostBatchNorm1d, anynorm.GhostBatchNorm2d, anynorm.GhostBatchNorm3d)
    return lambda num_features, dims: kinds[dims](num_features, momentum=0.1 * size / batch, ghost_size=size)


def renorm_ghosts(size: int, batch: int, samples: int) -> NormFactory:
    """Batch renormalization of each `size` samples, with the paper's schedule as shares of a training on `samples`."""
    kinds = (anynorm.BatchRenorm1d, anynorm.BatchRenorm1d, anynorm.BatchRenorm2d, anynorm.BatchRenorm3d)
    count = samples // size
    warmup = (count // 20, count * 6 // 20, count * 4 // 20)

    def make(num_features: int, dims: int) -> nn.Module:
        return InParts(kinds[dims](num_features, momentum=0.1 * size / batch, warmup=warmup), size)

    return make
