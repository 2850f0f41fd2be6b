"""One norm as another kind: which class it becomes, and the gamma and beta by which it starts near the old function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from ..modules import batch, domain, fused, ghost, group, instance, layer, pattern, renorm, rms
from ..modules.adapted import Adapted
from ..modules.sync import SyncBatchNorm
from ..torch_private import NormBase
from .report import FUSED, UNFREEZE_FIRST

# By the number of spatial axes; 0 for (N, C).
BY_DIMS: dict[str, tuple[Any, ...]] = {
    "batch": (batch.BatchNorm1d, batch.BatchNorm1d, batch.BatchNorm2d, batch.BatchNorm3d),
    "ghost": (ghost.GhostBatchNorm1d, ghost.GhostBatchNorm1d, ghost.GhostBatchNorm2d, ghost.GhostBatchNorm3d),
    "renorm": (renorm.BatchRenorm1d, renorm.BatchRenorm1d, renorm.BatchRenorm2d, renorm.BatchRenorm3d),
    "instance": (None, instance.InstanceNorm1d, instance.InstanceNorm2d, instance.InstanceNorm3d),
}
KEEPS_AVERAGES = ("batch", "ghost", "renorm", "sync")
KINDS = (*KEEPS_AVERAGES, "group", "layer", "instance", "rms", "identity")
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, batch._BatchNorm)
CHANNEL_NORMS = (NormBase, batch._Running, nn.GroupNorm, group._GroupNorm)
FEATURE_NORMS = (nn.LayerNorm, nn.RMSNorm, layer._ByFeatures)
OPTIONS = {
    "group": ("num_groups",),
    "ghost": ("ghost_size",),
    "renorm": ("r_max", "d_max", "warmup"),
    "sync": ("process_group",),
}


class Refused(Exception):
    """A norm that is not converted; the message is the reason."""


def check_convertible(norm: Any, counts: dict[int, int]) -> None:
    """Raise where a norm cannot be replaced at all; `counts`: how many modules hold each parameter."""
    if getattr(norm, "frozen", None) is not None:
        raise Refused(UNFREEZE_FIRST)
    if "forward" in vars(norm):
        raise Refused("its forward was replaced on the object")
    if isinstance(norm, domain._Domain):
        raise Refused("it has averages for each domain")
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
        raise Refused("it has not seen an input; run one batch first")
    # Old weight norm and pruning: hooks compute them, and know the norm that they were put on.
    if any(name in vars(norm) for name in ("weight", "bias")):
        raise Refused("its gamma or beta is computed by a hook; remove weight norm or pruning first")
    if is_parametrized(norm):
        raise Refused("its gamma or beta is parametrized; remove the parametrization first")
    if isinstance(norm, Adapted):
        if norm.adapter.norm != "batch" or norm.adapter.then:
            behind = f" and calls {' and '.join(norm.adapter.then)} behind it" if norm.adapter.then else ""
            raise Refused(f"its class computes {norm.adapter.norm} norm in its own way{behind}")
    elif type(norm).__module__.partition(".")[0] not in ("torch", "anynorm"):
        raise Refused("a subclass may have code of its own")
    if any(counts[id(p)] > 1 for p in norm.parameters(recurse=False)):
        raise Refused("its gamma or beta is shared with another module")


def find_dims(norm: nn.Module, shape: tuple[int, ...] | None) -> int | None:
    """The number of spatial axes of its inputs; None where neither its class nor an example tells."""
    if shape is not None:
        return len(shape) - 2
    for dims in (2, 3):
        if type(norm).__name__.endswith(f"{dims}d"):
            return dims
    return None


def make(norm: Any, to: str, shape: tuple[int, ...] | None, options: dict[str, Any]) -> nn.Module:
    """The module that takes a norm's place.

    Args:
        norm: of torch's classes or ours.
        to: one of `KINDS`.
        shape: of its input on the example; None without one.
        options: for the constructor.

    Raises:
        Refused: there is none, or its groups would have one element.
    """
    if to == "identity":
        if isinstance(norm, fused.Fused):
            raise Refused(f"it applies {norm.activation} too; accelerate(model, undo=True) parts the two")
        return nn.Identity()
    if isinstance(norm, FEATURE_NORMS):
        return make_over_features(norm, to)
    channels = int(getattr(norm, "num_channels", 0) or norm.num_features)
    kind, named = find_class(to, channels, find_dims(norm, shape), dict(options))
    check_groups(to, channels, named, shape)
    named |= {"eps": norm.eps, **find_place(norm)}
    if to in KEEPS_AVERAGES and isinstance(norm, BATCH_NORMS):
        named |= {"momentum": norm.momentum}
    new: nn.Module = kind(**named) if not isinstance(norm, fused.Fused) else make_fused(norm, kind, named)
    if to in KEEPS_AVERAGES and isinstance(norm, BATCH_NORMS):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if norm._buffers.get(name) is None:
                raise Refused("it keeps no running averages")
            new._buffers[name] = norm._buffers[name]
            if name in norm._non_persistent_buffers_set:
                new._non_persistent_buffers_set.add(name)
    return new


def make_fused(norm: fused.Fused, kind: Any, named: dict[str, Any]) -> nn.Module:
    """The new norm's twin with the old one's activation."""
    if kind not in FUSED:
        raise Refused(f"it applies {norm.activation} too, and the new norm has no such twin")
    found: Any = FUSED[kind]
    made: nn.Module = found(**named, activation=norm.activation)
    return made


def find_class(to: str, channels: int, dims: int | None, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class, and the constructor's arguments but eps, dtype and device."""
    if to in ("group", "layer"):
        groups = 1 if to == "layer" else find_group_count(channels, options.pop("num_groups", 32))
        return group.GroupNorm, {"num_groups": groups, "num_channels": channels}
    if to == "rms":
        return pattern.AnyNorm, {"pattern": "n c s -> n", "affine": "c", "centred": False, "c": channels}
    if to == "sync":
        return SyncBatchNorm, {"num_features": channels, **options}
    if dims is None:
        raise Refused(f"its inputs may be (N, C) or (N, C, L), which is not the same to {to} norm; pass an example")
    kind = BY_DIMS[to][dims]
    if kind is None:
        raise Refused("instance norm of inputs (N, C) has groups of one element, whose output is always beta")
    if to == "ghost":
        options.setdefault("ghost_size", 32)
    return kind, {"num_features": channels, **({"affine": True} if to == "instance" else {}), **options}


def find_group_count(channels: int, most: int) -> int:
    """The largest number of groups, at most `most`, that divides the channels and leaves each two of them or more."""
    return max((g for g in range(1, most + 1) if channels % g == 0 and channels // g >= 2), default=1)


def check_groups(to: str, channels: int, named: dict[str, Any], shape: tuple[int, ...] | None) -> None:
    """Refuse groups of one element, whose output is always beta (pytorch#19250, opacus#567)."""
    if to not in ("group", "layer", "instance"):
        return
    together = channels // named["num_groups"] if "num_groups" in named else 1
    positions = 1 if shape is None else int(torch.Size(shape[2:]).numel())
    if together * positions == 1 and (shape is not None or to != "instance"):
        raise Refused(f"{to} norm here has groups of one element, whose output is always beta; got input {shape}")


def make_over_features(norm: Any, to: str) -> nn.Module:
    """Layer or RMS norm over the same features."""
    if to not in ("layer", "rms"):
        raise Refused(f"its features are the last axes of its input; {to} norm is over channels at axis 1")
    kind: Any = layer.LayerNorm if to == "layer" else rms.RMSNorm
    named: dict[str, Any] = {"normalized_shape": norm.normalized_shape, "eps": norm.eps, **find_place(norm)}
    if to == "rms" and getattr(norm, "bias", None) is not None:
        raise Refused("RMS norm has no beta, and it has one")
    if to == "layer":
        named["bias"] = getattr(norm, "bias", None) is not None
        if norm.eps is None:  # RMS norm's, for what its input is
            named["eps"] = torch.finfo(named["dtype"] or torch.float32).eps
    made: nn.Module = make_fused(norm, kind, named) if isinstance(norm, fused.Fused) else kind(**named)
    return made


def is_alike(norm: nn.Module, new: nn.Module) -> bool:
    """Whether a norm is of the new one's kind already."""
    same = type(norm).__name__ == type(new).__name__
    return same and all(getattr(norm, name, None) == getattr(new, name, None) for name in ("num_groups", "ghost_size"))


def find_place(norm: nn.Module) -> dict[str, Any]:
    """Device and dtype of a norm's tensors."""
    tensors = [t for t in (*norm._parameters.values(), *norm._buffers.values()) if t is not None]
    floats = [t for t in tensors if t.is_floating_point()]
    return {"device": floats[0].device, "dtype": floats[0].dtype} if floats else {"device": None, "dtype": None}


def find_affine(norm: Any, new: nn.Module, to: str) -> tuple[Tensor | None, Tensor | None]:
    """Gamma and beta of the new norm, by which it computes what the old one did where samples are alike.

    Batch norm's y = (x - m) / s * gamma + beta, with running averages m and s per channel, is

        (x - M) / S * (gamma * S / s) + (beta + gamma * (M - m) / s)

    with the mean M and standard deviation S that a group of its channels has: S^2 = average of s^2 + (m - M)^2. RMS
    norm has M = 0. Other norms have no averages that could be taken over; their gamma and beta go over as they are.
    """
    mean, var = norm._buffers.get("running_mean"), norm._buffers.get("running_var")
    weight, bias = (
        None if t is None else t.detach().double() for t in (getattr(norm, "weight", None), getattr(norm, "bias", None))
    )
    if to not in ("group", "layer", "rms") or mean is None or not isinstance(norm, BATCH_NORMS):
        return weight, bias
    mean, var = mean.detach().double(), var.detach().double()
    groups = int(getattr(new, "num_groups", 1))
    center = torch.zeros_like(mean) if to == "rms" else average(mean, groups)
    spread = average(var + (mean - center).square(), groups) + norm.eps
    own = (var + norm.eps).sqrt()
    weight = torch.ones_like(own) if weight is None else weight
    bias = torch.zeros_like(own) if bias is None else bias
    return weight * spread.sqrt() / own, bias + weight * (center - mean) / own


def average(t: Tensor, groups: int) -> Tensor:
    """The average over each group of channels, at each of its channels."""
    return t.view(groups, -1).mean(1, keepdim=True).expand(groups, len(t) // groups).reshape(-1)


def hand_over(norm: Any, new: Any, affine: tuple[Tensor | None, Tensor | None]) -> None:
    """Give the new norm the old one's parameters, with these values, its hooks, mode and name.

    The very parameters and dictionaries of hooks: optimizers and handles of hooks know them.
    """
    for name, value in zip(("weight", "bias"), affine, strict=True):
        old, own = norm._parameters.get(name), new._parameters.get(name)
        if own is None:
            continue
        with torch.no_grad():
            if value is not None:
                own.copy_(value.view_as(own))
            if old is not None and old.shape == own.shape and old.dtype == own.dtype:
                old.copy_(own)
                new._parameters[name] = old
            elif old is not None:
                own.requires_grad_(old.requires_grad)
    for name in [key for key in vars(norm) if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))]:
        if name in vars(new) and not name.startswith(("_state_dict", "_load_state_dict")):
            vars(new)[name] = vars(norm)[name]
    new._is_full_backward_hook = norm._is_full_backward_hook
    new.train(norm.training)
    if hasattr(norm, "label") and not isinstance(new, nn.Identity):
        new.label = norm.label
