"""Norms of other packages: which adapters are known, and how users register theirs.

Classes are known by their qualified name, so that no package is imported for them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from ..modules import layer
from ..modules.adapted import Adapter, FeatureNorm, FrozenNorm, list_members, make_adapted
from ..modules.norm import Norm
from ..modules.sync import SyncBatchNorm
from .proof import NOT_COMPARED, find_difference, find_half_note
from .report import PAIRS, describe

NORMS = ("batch", "instance", "group", "layer", "rms", "frozen")
OF_TORCH = {"batch": "BatchNorm", "instance": "InstanceNorm", "group": "GroupNorm"}
EPS = ("eps", "variance_epsilon", "epsilon")
BEHIND = ("drop", "act")
MODULE_ATTRIBUTES = {*vars(nn.Module())}  # what every module has

# What timm's classes compute where timm's own switch for lower precision is off, as it is from the start.
FAST = ("_fast_norm",)
RMS = Adapter("rms", bias="")
T5 = Adapter("rms", eps="variance_epsilon", bias="")
GEMMA = Adapter("rms", bias="", weight_offset=1.0)
# The look-alikes of one package, most of them copies of each other; a proof decides which one it is.
RMS_COPIES = (T5, RMS, GEMMA, Adapter("rms", eps="variance_epsilon", bias="", weight_offset=1.0))
LAYER_COPIES = (T5, Adapter("layer", eps="variance_epsilon"), Adapter("layer", eps="variance_epsilon", bias=""), RMS)
FROZEN_COPIES = (Adapter("frozen"), Adapter("frozen", eps=1e-5))
KNOWN: list[tuple[str, tuple[Adapter, ...]]] = [
    (r"timm\.layers\.norm\.GroupNorm1?", (Adapter("group", unless=FAST),)),
    (r"timm\.layers\.norm\.LayerNorm(Fp32)?", (Adapter("layer", unless=FAST),)),
    (r"timm\.layers\.norm\.LayerNorm(2d|2dFp32|Exp2d)", (Adapter("layer", channel_axis=1, unless=FAST),)),
    (r"timm\.layers\.norm\.RmsNorm(Fp32)?", (Adapter("rms", bias="", unless=FAST),)),
    (r"timm\.layers\.norm\.RmsNorm2d(Fp32)?", (Adapter("rms", bias="", channel_axis=1, unless=FAST),)),
    (r"timm\.layers\.norm_act\.BatchNormAct2d", (Adapter("batch", then=BEHIND),)),
    (r"timm\.layers\.norm_act\.FrozenBatchNormAct2d", (Adapter("frozen", then=BEHIND),)),
    (r"timm\.layers\.norm_act\.GroupNorm1?Act", (Adapter("group", then=BEHIND, unless=FAST),)),
    (r"timm\.layers\.norm_act\.LayerNormAct(Fp32)?", (Adapter("layer", then=BEHIND, unless=FAST),)),
    (
        r"timm\.layers\.norm_act\.LayerNormAct2d(Fp32)?",
        (Adapter("layer", channel_axis=1, then=BEHIND, unless=FAST),),
    ),
    (r"torchvision\.ops\.misc\.FrozenBatchNorm2d", FROZEN_COPIES),
    (r"torchvision\.models\.convnext\.LayerNorm2d", (Adapter("layer", channel_axis=1),)),
    (r"segmentation_models_pytorch\..*\.LayerNorm2d", (Adapter("layer", channel_axis=1),)),
    (r"monai\.networks\.nets\.navit\._RMSNorm", (RMS, Adapter("rms", weight="gamma", bias=""))),
    (r"transformers\.models\..*FrozenBatchNorm2d", FROZEN_COPIES),
    (r"transformers\.models\..*(RMSNorm|RmsNorm|L2Norm)", RMS_COPIES),
    (r"transformers\.models\..*LayerNorm", (Adapter("layer", channel_axis=1), *LAYER_COPIES)),
]


def register(
    kind: type[nn.Module] | str,
    norm: str | None = None,
    *,
    eps: str | float = "eps",
    weight: str = "weight",
    bias: str = "bias",
    weight_offset: float = 0.0,
    channel_axis: int = -1,
    then: Iterable[str] = (),
) -> None:
    """Tell what a norm of your own computes, so that `accelerate` and `sync` take it, and `recalibrate` trusts it.

    Nothing is believed: `accelerate` compares the module with ours on random input, outputs and gradients, and leaves
    it where they differ.

    Args:
        kind: the class, or its qualified name ("package.module.Class"), which imports nothing. Subclasses without a
            `forward` of their own count too.
        norm: ``"batch"``, ``"instance"``, ``"group"`` for subclasses of torch.nn's; ``"layer"``, ``"rms"``, over the
            features of each position; ``"frozen"``, batch norm by `running_mean` and `running_var` that never move.
            None tries what there is.
        eps: name of its attribute, or the number, in units of x squared.
        weight, bias: names of gamma and beta; "" for none.
        weight_offset: gamma is this much more than the weight: 1 where the weight is learned about 0.
        channel_axis: where the features are, for layer and RMS norm: -1, or 1 for (N, C, H, W).
        then: names of modules that the output goes through, such as ("drop", "act").

    Raises:
        TypeError: `kind` is no module class and no name.
        ValueError: an unknown norm or axis.

    Example:
        >>> class ScaledNorm(torch.nn.Module):
        ...     def __init__(self, features):
        ...         super().__init__()
        ...         self.scale = torch.nn.Parameter(torch.zeros(features))
        ...     def forward(self, x):
        ...         return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.scale)
        >>> anynorm.register(ScaledNorm, "rms", eps=1e-6, weight="scale", weight_offset=1)
        >>> model = torch.nn.Sequential(ScaledNorm(4))
        >>> len(anynorm.accelerate(model).changed)
        1
    """
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        name = find_name(kind)
    elif isinstance(kind, str) and "." in kind:
        name = kind
    else:
        raise TypeError(
            f"register: kind must be a class of modules, or its qualified name; got {kind!r}; pass the class itself"
        )
    if norm is not None and norm not in NORMS:
        raise ValueError(f"register: norm must be one of {', '.join(NORMS)}; got {norm!r}; None tries what there is")
    if channel_axis not in (-1, 1):
        raise ValueError(f"register: channel_axis must be -1 or 1; got {channel_axis!r}; 1 is for (N, C, H, W)")
    adapter = None
    if norm is not None:
        adapter = Adapter(norm, eps, weight, bias, float(weight_offset), channel_axis, tuple(then))
    KNOWN.insert(0, (re.escape(name), () if adapter is None else (adapter,)))  # the latest word counts


def find_adapters(module: nn.Module, trust: tuple[type[nn.Module], ...] = ()) -> tuple[Adapter, ...] | None:
    """What may say how a module is computed, the likeliest first; None where nothing is known of its class."""
    kind = type(module)
    if isinstance(module, Norm) or kind in PAIRS or is_parametrized(module) or holds_norms(module):
        return None
    # Whose forward it is counts: a subclass that leaves it alone computes the same.
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    if find_base(kind) is not None and owner.__module__.startswith("torch.nn."):
        return tuple(guess(module))
    name = find_name(owner)
    for pattern, adapters in KNOWN:
        if re.fullmatch(pattern, name):
            return adapters or tuple(guess(module))
    return tuple(guess(module)) if isinstance(module, trust) else None


def holds_norms(module: nn.Module) -> bool:
    """Whether it is a container, whatever its name says."""
    return any(isinstance(child, (*PAIRS, Norm)) for child in module.modules() if child is not module)


def guess(module: nn.Module) -> Iterable[Adapter]:
    """What a norm may compute, by its base and its attributes."""
    base = find_base(type(module))
    if base is None and isinstance(getattr(module, "running_var", None), Tensor):
        yield from FROZEN_COPIES
    then = tuple(name for name, child in module.named_children() if child is not None)
    behind = [(), then] if then else [()]
    for names in behind:
        for norm, prefix in OF_TORCH.items():
            if base is not None and base.__name__.startswith(prefix):
                yield Adapter(norm, then=names)
        if base is not None and not issubclass(base, nn.LayerNorm | nn.RMSNorm):
            continue
        norms = ("layer", "rms") if base is None else (("layer",) if issubclass(base, nn.LayerNorm) else ("rms",))
        tensors = [name for name, _ in module.named_parameters(recurse=False)] if base is None else ["weight"]
        for eps in (name for name in EPS if hasattr(module, name)):
            for norm in norms:
                for weight in tensors[:1] or [""]:
                    for axis in (-1, 1):
                        bias = next((name for name in tensors[1:2]), "") if base is None else "bias"
                        yield Adapter(norm, eps, weight, bias, 0.0, axis, names)
                        if norm == "rms" and weight:
                            yield Adapter(norm, eps, weight, bias, 1.0, axis, names)


def find_name(kind: type) -> str:
    """The qualified name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def find_base(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The norm of torch.nn that a class is a subclass of."""
    return next((base for base in kind.__mro__ if base in PAIRS), None)


def find_class(module: nn.Module, adapter: Adapter, sync: bool = False) -> type[Any] | str:
    """The class that a module gets by an adapter; or why it cannot have one, in a sentence."""
    kind = type(module)
    base = find_base(kind)
    if adapter.norm in OF_TORCH:
        if base is None or not base.__name__.startswith(OF_TORCH[adapter.norm]):
            return f"it is no subclass of torch.nn's {adapter.norm} norms, whose state it would need"
        return make_adapted(kind, adapter, SyncBatchNorm if sync else PAIRS[base])
    if adapter.norm == "frozen":
        return make_adapted(kind, adapter, FrozenNorm)
    if adapter.norm == "layer" and issubclass(kind, nn.LayerNorm):
        return make_adapted(kind, adapter, layer.LayerNorm)
    return make_adapted(kind, adapter, FeatureNorm)


class Finder:
    """Finds the class that each module gets, and proves it once for all modules that differ in their numbers only."""

    trust: tuple[type[nn.Module], ...]
    sync: bool

    def __init__(self, trust: tuple[type[nn.Module], ...] = (), sync: bool = False) -> None:
        self.trust, self.sync = trust, sync
        self.known: dict[Any, tuple[Any, str]] = {}

    def find(self, module: nn.Module) -> tuple[Any, str] | None:
        """(class, what to know of half types), or (None, why none), or None where nothing is known."""
        adapters = find_adapters(module, self.trust)
        if adapters is None:
            return None
        key = (type(module), adapters, describe_state(module))
        if key not in self.known:
            self.known[key] = self.prove(module, adapters)
        return self.known[key]

    def prove(self, module: nn.Module, adapters: tuple[Adapter, ...]) -> tuple[Any, str]:
        """The first of the adapters that a proof confirms."""
        reasons = [find_signature_obstacle(type(module))]
        for adapter in () if reasons[0] else adapters:
            kind = find_class(module, adapter)
            if isinstance(kind, str):
                reasons.append(kind)
                continue
            if clash := find_clash(module, kind):
                reasons.append(clash)
                continue
            reason = find_difference(module, kind, adapter)
            if not reason:
                note = find_half_note(module, kind, adapter)
                return (find_class(module, adapter, sync=True) if self.sync else kind), note
            reasons.append(reason)
        reasons = [reason for reason in reasons if reason]
        telling = [reason for reason in reasons if not reason.startswith(NOT_COMPARED)]
        return None, (telling or reasons or ["nothing that ours compute fits it"])[0]


def find_clash(module: nn.Module, kind: type[Any]) -> str:
    """Whether a module has attributes of its own under names that ours need, in a sentence, or ""."""
    base: type = find_base(type(module)) or nn.Module
    clash = sorted(name for name in list_members(kind.recipe[2]) - {*dir(base)} if hasattr(module, name))
    return f"it has attributes that ours need for something else ({', '.join(clash)})" if clash else ""


def describe_state(module: nn.Module) -> tuple[Any, ...]:
    """What two modules of a class have in common where one proof is good for both.

    What cannot be compared, such as a tensor that is no buffer, or a configuration, is told apart by its identity.
    """
    plain = (bool, int, float, str, tuple, type(None))
    own = {name: value for name, value in vars(module).items() if name not in MODULE_ATTRIBUTES}
    attributes = [(name, repr(value) if isinstance(value, plain) else id(value)) for name, value in sorted(own.items())]
    tensors = [
        (name, tuple(t.shape))
        for name, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]
    children = [(name, type(child), describe_state(child)) for name, child in module.named_children()]
    return tuple(attributes), tuple(tensors), tuple(children)


def find_signature_obstacle(kind: type[nn.Module]) -> str:
    """Why a forward is more than a norm of one input, or ""."""
    names = list(inspect.signature(kind.forward).parameters)[1:]
    if len(names) != 1:
        return f"forward of {describe(kind)} takes more than its input ({', '.join(names[1:])})"
    return ""
