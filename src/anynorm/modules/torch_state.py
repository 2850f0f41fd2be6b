"""Parameters, buffers and constructors of torch's norms, for classes that must not be instances of torch's norms.

They build, reset, load and print just what `torch.nn`'s classes do, whose methods are called unbound where those need
no instance of their own class.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import Parameter

from ..torch_private import NormBase


def register_affine(module: nn.Module, shape: tuple[int, ...], weight: bool, bias: bool, **options: Any) -> None:
    """Register gamma and beta of a shape, or None in the place of either."""
    for name, wanted in (("weight", weight), ("bias", bias)):
        module.register_parameter(name, Parameter(torch.empty(shape, **options)) if wanted else None)


class TorchState(nn.Module):
    """What the states here share: they reset and print themselves by the methods of torch's class.

    Attributes:
        theirs: that class, whose methods read attributes only.
    """

    theirs: ClassVar[Any]

    def reset_parameters(self) -> None:
        """Gamma 1, beta 0, and running statistics, where there are any, as at the start."""
        self.theirs.reset_parameters(self)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        arguments: str = self.theirs.extra_repr(self)
        return arguments


class BatchNormState(TorchState):
    """The state of `torch.nn.BatchNorm1d/2d/3d`."""

    theirs = NormBase
    _version = NormBase._version
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    num_features: int
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        register_affine(self, (num_features,), affine, affine and bias, device=device, dtype=dtype)
        tracked: tuple[Tensor | None, ...] = (None, None, None)
        if track_running_stats:
            mean, var = (torch.empty(num_features, device=device, dtype=dtype) for _ in range(2))
            tracked = mean, var, torch.tensor(0, dtype=torch.long, device=device)
        for name, buffer in zip(("running_mean", "running_var", "num_batches_tracked"), tracked, strict=True):
            self.register_buffer(name, buffer)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batch counted."""
        NormBase.reset_running_stats(self)  # it reads attributes only

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        # Checkpoints of version 1 (before torch 0.4.1) have no counter, and leave it as it is.
        key, counter = prefix + "num_batches_tracked", self.num_batches_tracked
        if (local_metadata.get("version") or 1) < 2 and self.track_running_stats and key not in state_dict:
            known = counter is not None and not counter.is_meta
            state_dict[key] = counter if known else torch.tensor(0, dtype=torch.long, device="cpu")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class InstanceNormState(BatchNormState):
    """The state of `torch.nn.InstanceNorm1d/2d/3d`."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        # Before torch 0.4.0 (no version) averages were always there; they must not vanish in silence. torch's text.
        kept = [prefix + name for name in ("running_mean", "running_var") if prefix + name in state_dict]
        if local_metadata.get("version") is None and not self.track_running_stats and kept:
            names, kind = " and ".join(f'"{key}"' for key in kept), type(self).__name__.replace("Act", "")
            rest[-1].append(
                f"Unexpected running stats buffer(s) {names} for {kind} with track_running_stats=False. If state_dict "
                "is a checkpoint saved before 0.4.0, this may be expected because "
                f"{kind} does not track running stats by default since 0.4.0. Please remove these keys from "
                "state_dict. If the running stats are actually needed, instead set track_running_stats=True in "
                f"{kind} to enable them. See the documentation of {kind} for details."
            )
            for key in kept:
                state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class GroupNormState(TorchState):
    """The state of `torch.nn.GroupNorm`."""

    theirs = nn.GroupNorm
    num_groups: int
    num_channels: int
    eps: float
    affine: bool

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_channels % num_groups:
            raise ValueError(f"num_channels ({num_channels}) must be divisible by num_groups ({num_groups})")
        self.num_groups, self.num_channels, self.eps, self.affine = num_groups, num_channels, eps, affine
        register_affine(self, (num_channels,), affine, affine and bias, device=device, dtype=dtype)
        self.reset_parameters()


class LayerNormState(TorchState):
    """The state of `torch.nn.LayerNorm`."""

    theirs = nn.LayerNorm
    eps: float
    elementwise_affine: bool

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape: tuple[int, ...] = as_shape(normalized_shape)
        self.eps, self.elementwise_affine = eps, elementwise_affine
        wanted = elementwise_affine, elementwise_affine and bias
        register_affine(self, self.normalized_shape, *wanted, device=device, dtype=dtype)
        self.reset_parameters()


class RMSNormState(TorchState):
    """The state of `torch.nn.RMSNorm`."""

    theirs = nn.RMSNorm
    eps: float | None
    elementwise_affine: bool

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape: tuple[int, ...] = as_shape(normalized_shape)
        self.eps, self.elementwise_affine = eps, elementwise_affine
        weight = torch.empty(self.normalized_shape, device=device, dtype=dtype) if elementwise_affine else None
        self.register_parameter("weight", None if weight is None else Parameter(weight))
        self.reset_parameters()


def as_shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """The sizes of the last axes, one of which may be given as a number."""
    if isinstance(normalized_shape, Integral):  # NumPy's too, which are no int
        return (int(normalized_shape),)
    return tuple(normalized_shape)  # type: ignore[arg-type] # int is Integral, which type checkers do not know
