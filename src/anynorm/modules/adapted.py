"""Somebody else's norm, computed by ours: the same object, of a class that is both theirs and ours.

`anynorm.accelerate` gives a module such a class where an adapter says which formula the module computes, and a proof
has shown it. An instance still is one of the other class, with its attributes, methods and state; `forward` is ours.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.fx import Proxy

from ..engine.request import Request
from ..functional.batch import BATCH_NORM
from ..functional.layer import LAYER_NORM
from ..functional.rms import RMS_NORM, find_rms_eps
from ..padding.context import CONTEXTS, may_be_masked
from ..padding.masks import find_mask
from ..sources import BATCH, Given
from ..statistics import blank
from .norm import Norm, drop_none, record_call


class Adapter(NamedTuple):
    """What a norm of somebody else computes, and where it keeps what that needs.

    Attributes:
        norm: ``"batch"``, ``"instance"``, ``"group"``: as the class of torch.nn that it is a subclass of; ``"layer"``,
            ``"rms"``: over the features of each position; ``"frozen"``: batch norm by statistics that never move.
        eps: name of the attribute, or the number.
        weight, bias: names of the attributes; "" where there is none.
        weight_offset: gamma is this much more than the weight (1 where the weight is learned about 0).
        channel_axis: of layer and RMS norm, where the features are: -1, or 1 for (N, C, H, W).
        then: names of modules that the output goes through.
        unless: names of attributes; where one is true, the class computes something else.
    """

    norm: str
    eps: str | float = "eps"
    weight: str = "weight"
    bias: str = "bias"
    weight_offset: float = 0.0
    channel_axis: int = -1
    then: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()

    def describe(self) -> str:
        """What it gets, in a few words."""
        words = {"batch": "batch norm", "instance": "instance norm", "group": "group norm", "layer": "layer norm"}
        name = {**words, "rms": "RMS norm", "frozen": "batch norm, frozen"}[self.norm]
        axis = " over channels" if self.channel_axis == 1 else ""
        offset = f", gamma = weight + {self.weight_offset:g}" if self.weight_offset else ""
        return f"{name}{axis}{offset}{', then ' if self.then else ''}{' and '.join(self.then)}"


class Adapted(nn.Module):
    """`forward` of all adapted norms; the class beside it has `normalize`.

    Attributes:
        adapter: what is computed.
        original: the class that the module had.
        same_dtype: name of the tensor whose dtype the input must have, since theirs promotes in its own way; or "".
        recipe: what the class is made of.
        fused_activation: what is applied in the norm's own pass instead of the modules in `then`; None for none.
    """

    adapter: ClassVar[Adapter]
    original: ClassVar[type[nn.Module]]
    same_dtype: ClassVar[str]
    recipe: ClassVar[tuple[Any, ...]]
    fused_activation: str | None = None
    find_mask: Callable[..., Tensor | None]
    normalize: Callable[..., Any]

    def forward(self, *given: Any, mask: Tensor | None = None, lengths: Any = None, **named: Any) -> Any:
        """What the module's own class computes; `mask` and `lengths` as for `anynorm.BatchNorm2d`."""
        if len(given) != 1 or named:
            if len(given) + len(named) != 1:
                raise TypeError(f"{type(self).__name__}: forward takes one input; got {len(given) + len(named)}")
            given = tuple(named.values())
        (x,) = given
        if isinstance(x, Proxy):
            return record_call(self, x, **drop_none(mask=mask, lengths=lengths))
        if mask is None and lengths is None and CONTEXTS.was_opened and may_be_masked():
            mask = self.find_mask(x)
        if mask is None and lengths is None and not self.serves(x):
            return self.original.forward(self, x)
        moved = self.adapter.channel_axis == 1
        y = self.normalize(x.movedim(1, -1) if moved else x, None, self.fused_activation, mask, lengths)
        y = y.movedim(-1, 1) if moved else y
        if self.fused_activation is None:
            for name in self.adapter.then:
                module = getattr(self, name, None)
                y = y if module is None else module(y)
        if self.adapter.then and not (mask is None and lengths is None):
            found = find_mask(type(self).__name__, x, self.find_channel_axes(x), mask, lengths)
            return y if found is None else blank(y, found > 0)
        return y

    def serves(self, x: Any) -> bool:
        """Whether ours computes what theirs does for such an input; else their own forward runs."""
        adapter = self.adapter
        if adapter.unless and any(getattr(self, name, False) for name in adapter.unless):
            return False
        if self.same_dtype:
            tensor = read(self, self.same_dtype)
            if tensor is not None and (not isinstance(x, Tensor) or x.dtype != tensor.dtype):
                return False
        if adapter.channel_axis == 1 or adapter.norm == "frozen":
            return isinstance(x, Tensor) and x.dim() == 4
        return True

    def find_channel_axes(self, input: Tensor) -> tuple[int, ...]:
        """Axes of the input that a mask has not."""
        if self.adapter.channel_axis == 1:
            return (1,)
        axes: tuple[int, ...] = super().find_channel_axes(input)  # type: ignore[misc] # of the class beside it
        return axes

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A class that was made at run time cannot be found again by its name; it is made again of the same parts.
        find_state = getattr(self, "__getstate__", None)  # every object has it since Python 3.11
        return restore, self.recipe, vars(self).copy() if find_state is None else find_state()


class FeatureNorm(Norm):
    """Layer or RMS norm of a class that is no subclass of torch's, read through the adapter."""

    adapter: ClassVar[Adapter]

    def normalize(
        self, input: Any, residual: Any = None, activation: Any = None, mask: Any = None, lengths: Any = None
    ) -> Any:
        adapter = self.adapter
        eps = getattr(self, adapter.eps) if isinstance(adapter.eps, str) else adapter.eps
        weight = read(self, adapter.weight)
        shape = self.find_shape(input)
        if weight is not None and adapter.weight_offset:
            # In float32 also beside half types: 1 + w in bfloat16 would lose what was learned.
            weight = adapter.weight_offset + (weight if weight.dtype == torch.float64 else weight.float())
        if adapter.norm == "rms":
            request = Request(BATCH, find_rms_eps(eps, input), activation, mask, lengths, shape)
            return RMS_NORM.normalize(input, weight, None, residual, request)
        request = Request(BATCH, eps, activation, mask, lengths, shape)
        return LAYER_NORM.normalize(input, weight, read(self, adapter.bias), residual, request)

    def find_shape(self, input: Tensor) -> tuple[int, ...]:
        """Sizes of the axes that share statistics."""
        weight = read(self, self.adapter.weight)
        return tuple(input.shape[-1:] if weight is None else weight.shape)

    def find_channel_axes(self, input: Tensor) -> tuple[int, ...]:
        return tuple(range(input.dim() - len(self.find_shape(input)), input.dim()))


class FrozenNorm(Norm):
    """Batch norm by statistics that never move, read through the adapter."""

    adapter: ClassVar[Adapter]

    def normalize(
        self, input: Any, residual: Any = None, activation: Any = None, mask: Any = None, lengths: Any = None
    ) -> Any:
        adapter: Any = self.adapter
        eps = getattr(self, adapter.eps) if isinstance(adapter.eps, str) else adapter.eps
        given = Given(self.running_mean, self.running_var)  # type: ignore[arg-type] # the proof has called it
        request = Request(given, eps, activation, mask, lengths)
        return BATCH_NORM.normalize(input, read(self, adapter.weight), read(self, adapter.bias), residual, request)


def read(module: nn.Module, name: str) -> Any:
    """A parameter, buffer or attribute; None where there is none of this name."""
    return getattr(module, name, None) if name else None


CLASSES: dict[tuple[Any, ...], type[Any]] = {}  # one for the same parts, so that types compare


def make_adapted(original: type[nn.Module], adapter: Adapter, beside: type[nn.Module]) -> type[Any]:
    """The class of an adapted norm.

    Args:
        original: theirs.
        adapter: what it computes.
        beside: the class of ours with `normalize`.
    """
    recipe = (original, adapter, beside)
    if recipe in CLASSES:
        return CLASSES[recipe]
    same_dtype = ""
    if beside is FrozenNorm:
        same_dtype = "running_mean"
    elif beside is FeatureNorm and not adapter.weight_offset:
        same_dtype = adapter.weight
    members: dict[str, Any] = {name: getattr(original, name) for name in find_overrides(original, beside)}
    members |= {"adapter": adapter, "original": original, "same_dtype": same_dtype, "recipe": recipe}
    members |= {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    CLASSES[recipe] = types.new_class(
        original.__name__, (Adapted, beside, original), {}, lambda own: own.update(members)
    )
    return CLASSES[recipe]


def list_members(beside: type[nn.Module]) -> set[str]:
    """What the classes of ours that an adapted norm gets define, but for what Python itself calls."""
    ours = (kind for kind in (Adapted, *beside.__mro__) if kind.__module__.startswith("anynorm."))
    return {name for kind in ours for name in vars(kind) if not name.startswith("__")}


def find_overrides(original: type[nn.Module], beside: type[nn.Module]) -> set[str]:
    """Methods of torch.nn that both theirs and ours override: theirs count, as `_check_input_dim` does."""
    theirs = (kind for kind in original.__mro__ if not kind.__module__.startswith("torch.") and kind is not object)
    known = {name for kind in theirs for name in vars(kind)} & list_members(beside)
    return known - {"forward", "_load_from_state_dict"}  # the latter calls theirs


def restore(original: type[nn.Module], adapter: tuple[Any, ...], beside: type[nn.Module]) -> nn.Module:
    """An empty instance, which pickle and copy fill."""
    kind = make_adapted(original, Adapter(*adapter), beside)
    module: nn.Module = object.__new__(kind)
    return module
