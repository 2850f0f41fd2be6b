"""The norms that are compared: each name answers with a factory(num_features, dims)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from math import isqrt

import torch
from torch import Tensor, nn

import anynorm

# num_features and the number of spatial axes of the input: 0 for (N, C), 1 for (N, C, L), 2 for (N, C, H, W).
NormFactory = Callable[[int, int], nn.Module]


class CannotNormalize(Exception):
    """A norm that cannot exist at this place; the message is the reason, shown beside n/a."""


class Unchanged(nn.Identity):
    """Its input as it is; it can be called as a norm with a mask is."""

    def forward(self, x: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """The input."""
        return x


def check_dims(dims: int) -> None:
    """Raise where `dims` is not a number of spatial axes."""
    if dims not in (0, 1, 2, 3):
        raise ValueError(f"norm(num_features, dims): dims counts the spatial axes, 0 to 3; got {dims!r}")


def arm(factory: NormFactory) -> NormFactory:
    """A factory whose norms know under which name they are compared, see `find_arm`."""

    @wraps(factory)
    def make(num_features: int, dims: int) -> nn.Module:
        norm = factory(num_features, dims)
        norm.compared_as = factory.__name__  # type: ignore[assignment] # torch annotates every attribute as Tensor | Module
        return norm

    return make


def find_arm(norm: nn.Module) -> str:
    """The name out of NORMS under which a norm is compared; empty for any other module."""
    return str(getattr(norm, "compared_as", ""))


@arm
def none(num_features: int, dims: int) -> nn.Module:
    """No normalization: the baseline."""
    return Unchanged()


@arm
def batch(num_features: int, dims: int) -> nn.Module:
    """Each channel over the batch and all positions."""
    kinds = (anynorm.BatchNorm1d, anynorm.BatchNorm1d, anynorm.BatchNorm2d, anynorm.BatchNorm3d)
    return kinds[dims](num_features)


@arm
def layer(num_features: int, dims: int) -> nn.Module:
    """Each sample over all channels and positions; gamma and beta per channel, as in Wu & He (2018)."""
    return anynorm.GroupNorm(1, num_features)  # which, unlike the pattern "n c s -> n", takes a mask


@arm
def instance(num_features: int, dims: int) -> nn.Module:
    """Each channel of each sample over its positions, with gamma and beta."""
    if dims == 0:
        raise CannotNormalize(
            "instance norm on a dense layer has one value in each group, and one value minus its own mean is always 0"
        )
    kinds = (anynorm.InstanceNorm1d, anynorm.InstanceNorm2d, anynorm.InstanceNorm3d)
    return kinds[dims - 1](num_features, affine=True)


@arm
def group(num_features: int, dims: int) -> nn.Module:
    """Each group of channels of each sample over all positions."""
    return anynorm.GroupNorm(choose_groups(num_features), num_features)


@arm
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

    norm: nn.Module
    size: int

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
