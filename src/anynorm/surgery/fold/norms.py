"""Which norms can be folded, what they do to each channel, and what stands in their place then."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ...activations import find_activation
from ...modules import batch, domain, instance
from ...modules.adapted import Adapted, Adapter, read
from ...modules.fused import Fused
from ...modules.norm import Norm
from ..accelerate import BASES, is_unknown_norm
from ..adapters import Finder, find_base
from ..report import PAIRS, is_ours

NORMS = (*BASES, nn.LocalResponseNorm, Norm)
INSTANCE_NORMS = (nn.modules.instancenorm._InstanceNorm, instance._InstanceNorm)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, batch._BatchNorm)
# torch's own classes with running averages, by exact type.
TORCHS = {getattr(nn, f"{kind}Norm{n}d") for kind in ("Batch", "Instance") for n in (1, 2, 3)} | {nn.SyncBatchNorm}
OURS = (batch._BatchNorm, instance._InstanceNorm)
PLAIN = Adapter("batch")

OF_THE_INPUT = "its statistics are those of its input; only running averages, which are constants, can be folded"
UNKNOWN = "it is no norm with running averages that is known; anynorm.register({name}, ...) tells what it computes"


class NotFoldable(Exception):
    """Why a norm is not folded."""


@dataclass(frozen=True, eq=False)
class FixedNorm:
    """A norm by running averages, which is scale * x + shift for each channel.

    Attributes:
        name, norm: in the model.
        scale, shift: float64, one number for each channel.
        dims: how many axes of positions it takes; None for any number, 1 for one or none.
        behind: what its output goes through in the same module.
        is_open: whether another norm may be folded into its weight and bias.
    """

    name: str
    norm: nn.Module
    scale: Tensor
    shift: Tensor
    dims: int | None
    behind: tuple[nn.Module, ...]
    is_open: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of its running averages."""
        mean: Any = self.norm.running_mean
        dtype: torch.dtype = mean.dtype
        return dtype

    @property
    def takes_single(self) -> bool:
        """Whether it also takes one sample, without the axis of samples."""
        return isinstance(self.norm, INSTANCE_NORMS)

    def make_successor(self) -> nn.Module:
        """What takes the norm's place."""
        if len(self.behind) == 1:
            return self.behind[0]
        successor = nn.Sequential(*self.behind) if self.behind else nn.Identity()
        successor.training = self.norm.training
        return successor


def is_any_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, or calls itself one."""
    return isinstance(module, NORMS) or is_unknown_norm(module)


def normalizes_by_running(norm: Any) -> bool:
    """Whether a call of this norm, in the mode it is in, normalizes by its running averages alone."""
    if getattr(norm, "running_mean", None) is None or getattr(norm, "running_var", None) is None:
        return False
    if is_frozen(norm) and norm.frozen.statistics:
        return True
    if isinstance(norm, INSTANCE_NORMS):
        return not norm.training and bool(norm.track_running_stats)
    # A frozen norm of another package has no mode.
    return not (norm.training and isinstance(norm, BATCH_NORMS))


def is_frozen(norm: Any) -> bool:
    """Whether `anynorm.freeze` keeps its switches there."""
    return isinstance(getattr(getattr(norm, "frozen", None), "statistics", None), bool)


def waits_for_evaluation(norm: Any) -> bool:
    """Whether it would normalize by its running averages if it were in evaluation."""
    if not isinstance(norm, (*INSTANCE_NORMS, *BATCH_NORMS)) or isinstance(norm, nn.modules.lazy.LazyModuleMixin):
        return False
    return norm.training and isinstance(norm.running_var, Tensor) and not normalizes_by_running(norm)


def read_norm(name: str, norm: Any, finder: Finder) -> FixedNorm:
    """What a norm computes.

    Raises:
        NotFoldable: it has no such form, or its numbers are no numbers.
    """
    adapter = find_adapter(norm, finder)
    if isinstance(norm, domain._Domain):
        raise NotFoldable("it has averages for each domain")
    if not normalizes_by_running(norm):
        kept = isinstance(norm, (*INSTANCE_NORMS, *BATCH_NORMS))
        raise NotFoldable("it keeps no running averages, so it normalizes by its input" if kept else OF_THE_INPUT)
    scale, shift = compute_affine(norm, adapter)
    is_frozen = adapter.norm == "frozen"
    base = type(norm) if is_ours(type(norm)) and not isinstance(norm, Adapted) else find_base(type(norm))
    digit = re.search("([123])d$", base.__name__) if base else None
    behind = find_behind(norm, adapter)
    dims = 2 if is_frozen else int(digit[1]) if digit else None
    return FixedNorm(name, norm, scale, shift, dims, behind, not is_frozen)


def find_adapter(norm: nn.Module, finder: Finder) -> Adapter:
    """What says where a norm keeps its numbers.

    Raises:
        NotFoldable: nothing does, or it is no batch norm and no instance norm.
    """
    kind = type(norm)
    if isinstance(norm, torch.jit.ScriptModule):
        raise NotFoldable("it is compiled by torch.jit.script")
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
        raise NotFoldable("it does not know its size yet; call the model once before")
    if isinstance(norm, Adapted):
        adapter = norm.adapter
    elif kind in TORCHS or is_frozen(norm) or (is_ours(kind) and isinstance(norm, OURS)):
        return PLAIN
    elif isinstance(norm, Norm) and not is_ours(kind):
        raise NotFoldable("a subclass of ours may have code of its own")
    elif isinstance(norm, Norm) or kind in PAIRS or kind is nn.LocalResponseNorm:
        raise NotFoldable(OF_THE_INPUT)
    else:
        found = finder.find(norm)
        if found is None or found[0] is None:
            raise NotFoldable(found[1] if found else UNKNOWN.format(name=kind.__name__))
        adapter = found[0].adapter
    if adapter.norm not in ("batch", "instance", "frozen"):
        raise NotFoldable(OF_THE_INPUT)
    # torch's classes keep their numbers where torch does.
    return adapter if adapter.norm == "frozen" else PLAIN._replace(then=adapter.then)


def compute_affine(norm: nn.Module, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Scale and shift in float64.

    Raises:
        NotFoldable: they are no finite numbers.
    """
    tensors = {key: read(norm, key) for key in ("running_mean", "running_var")}
    tensors |= {"weight": read(norm, adapter.weight), "bias": read(norm, adapter.bias)}
    for key, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.is_meta or not tensor.is_floating_point():
            raise NotFoldable(f"its {key} holds no real numbers")
        if not bool(tensor.isfinite().all()):
            raise NotFoldable(f"its {key} is not finite")
    mean, var, weight, bias = (None if t is None else t.detach().double() for t in tensors.values())
    assert mean is not None
    assert var is not None
    eps = getattr(norm, adapter.eps) if isinstance(adapter.eps, str) else adapter.eps
    if bool((var < 0).any()):
        raise NotFoldable(f"its running_var is negative ({float(var.min()):.3g})")
    scale = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    if not bool(scale.isfinite().all() and shift.isfinite().all()):
        raise NotFoldable("its running_var + eps is 0")
    return scale, shift


def find_behind(norm: Any, adapter: Adapter) -> tuple[nn.Module, ...]:
    """The modules that apply what a fused or adapted norm applies to its output."""
    if isinstance(norm, Fused):
        found = find_activation(norm.activation)
        if found is None or norm.activation == "identity":
            return ()
        known, number = found
        activation = known.module(**known.settings, **({known.option: number} if known.option else {}))
        activation.training = norm.training
        return (activation,)
    modules = [getattr(norm, key, None) for key in adapter.then]
    return tuple(module for module in modules if module is not None and type(module) is not nn.Identity)


def write_norm(fixed: FixedNorm) -> None:
    """Give a norm the weight and bias with which it computes what `fixed` says; its averages stay."""
    norm: Any = fixed.norm
    rstd = (norm.running_var.detach().double() + norm.eps).rsqrt()
    values = {"weight": fixed.scale / rstd, "bias": fixed.shift + norm.running_mean.detach().double() * fixed.scale}
    for key, value in values.items():
        old = getattr(norm, key)
        like = norm.running_mean if old is None else old
        parameter = nn.Parameter(value.to(like.dtype), requires_grad=old is not None and old.requires_grad)
        norm.register_parameter(key, parameter)
    norm.affine = True
