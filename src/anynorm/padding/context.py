"""The context that hands a mask to the layers inside a model: `anynorm.masked`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextvars import ContextVar, Token
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
from torch import Tensor

from ..modules.recomputation import find_regions
from ..torch_private import find_backward, not_compiled
from . import hooks
from .masks import check_zeros_and_ones, describe
from .parts import ModelParts, name_modules
from .registry import ROOT, MaskRegistry, SizedMask

if TYPE_CHECKING:
    from .model import MaskedModel

MaskArgument = Tensor | Sequence[Tensor] | None
CURRENT: ContextVar[masked | None] = ContextVar("anynorm.masked", default=None)
LAST_CONTEXT: WeakKeyDictionary[nn.Module, masked] = WeakKeyDictionary()  # that a layer was called in
LOCK = Lock()  # contexts are entered and left by any thread


class Contexts:
    """How many contexts are entered in the process, and whether any ever was.

    Attributes of an object: torch's compiler, as late as 2.8, takes those of a class for constants.
    """

    def __init__(self) -> None:
        self.opened: int = 0
        self.was_opened: bool = False

    def count(self, step: int) -> None:
        """Add to the number of contexts that are entered."""
        with LOCK:
            self.opened += step
            self.was_opened = True


CONTEXTS = Contexts()


class masked:
    """Hand a mask to every norm that is called inside, for models that have no argument for one.

    Without `model` norms, `anynorm.LSTM` and `anynorm.GRU` take the mask that fits the positions of their input; where
    strided layers shorten the positions, give the shorter masks too (`shorten` computes them). With `model` the
    shorter masks are found, and the layers between the norms do not see padding either: what a convolution, a pooling
    or a recurrent layer of torch.nn makes of a sample is in evaluation what it makes of the sample alone, to rounding.

    The context belongs to the thread and to the asynchronous task that entered it. When activation checkpointing
    computes a layer again outside the context, or inside another, that is an error: call backward inside the context.

    Args:
        masks: (N, positions...), True or 1 at real positions. (N, L) serves maps (N, C, F, L) and (N, C, L, F), too.
            Or, with `model`, one dict: the name of a submodule, or the submodule, to its mask, to several, or to None
            where it has no padding; "" is the whole model. The most specific name counts.
        model: the model that is called inside, whose layers are then known by name.

    Raises:
        TypeError: arguments of other types.
        ValueError: at the layer, where no mask fits, where several do that differ, where a norm of torch's would count
            the padding, or where the layer is one that no mask can be followed through.

    Warns:
        UserWarning: at the end, where no layer took a mask; with `model`, which norms, attention, and layers that are
            not torch's and have "conv" or "pool" in their class's name, ran and were not told.

    Note:
        Functions are not seen: of `x.mean(-1)`, `F.pad` and attention the context knows nothing. With `model` code from
        torch.compile runs eagerly inside, in every thread.

    Example:
        >>> norm, x = anynorm.BatchNorm1d(1), torch.tensor([[[1.0, 3.0, 77.0]]])
        >>> with anynorm.masked(torch.tensor([[True, True, False]])):
        ...     norm(x).detach()
        tensor([[[-1.0000,  1.0000,  0.0000]]])
        >>> net = torch.nn.Sequential(torch.nn.Conv1d(1, 4, 3, stride=2, padding=1), anynorm.BatchNorm1d(4)).eval()
        >>> with anynorm.masked(anynorm.mask_of([5, 2], 5), model=net):
        ...     net(torch.randn(2, 1, 5)).shape
        torch.Size([2, 4, 3])
    """

    def __init__(self, *masks: Any, model: nn.Module | None = None) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(
                f"masked: model must be a torch.nn.Module; got {type(model).__name__}; pass the model itself"
            )
        given = read_masks(masks, model)
        self._masks = MaskRegistry(given, follow=model is not None)
        self._model: MaskedModel | None = None
        if model is not None:
            from .model import MaskedModel  # with the first model that needs it: a tenth of the import of the package

            self._model = MaskedModel(ModelParts(model, list(given), self._masks))
        self._tokens: list[Token[masked | None]] = []
        self._was_used = False

    def __enter__(self) -> masked:
        if self._model is not None:
            hooks.install_hooks(pre_hook, hook)
        # After what may raise, so that a context that was not entered is not counted.
        CONTEXTS.count(1)
        self._tokens.append(CURRENT.set(self))
        return self

    def __exit__(self, kind: Any, *exception: object) -> None:
        CONTEXTS.count(-1)
        CURRENT.reset(self._tokens.pop())
        if self._model is not None:
            hooks.release_hooks()
        if kind is None and not self._tokens:
            self._warn()

    def _warn(self) -> None:
        """Warn of layers that took no mask; once for all calls inside."""
        was_used, self._was_used = self._was_used, False
        unmasked: list[str] = []
        if self._model is not None:
            unmasked = [f"{name} ({kind})" for name, kind in self._model.unmasked.kinds.items()]
            self._model.unmasked.kinds.clear()
        if unmasked:
            from .unmasked import list_first

            warnings.warn(
                f"masked: layers inside took no mask and compute on the padding as well; got "
                f"{list_first(unmasked)}; anynorm.accelerate(model) turns torch's norms into ours, not subclasses of "
                "them; pass key_padding_mask=~mask to attention, and the mask to layers of your own",
                stacklevel=3,
            )
        elif not was_used:
            warnings.warn(
                "masked: no layer inside took a mask; got norms of torch's, norms that were given masks of their own, "
                "or none; call anynorm.accelerate(model) before, and pass model=model to have them named",
                stacklevel=3,
            )

    def find_mask(self, layer: nn.Module, positions: Sequence[int], x: Any) -> Tensor | None:
        """The mask for an input, None where it has no positions and no mask is about samples alone."""
        if self._model is not None and self._model.has_layer(layer):
            found = self._model.find_mask(layer, tuple(positions), x)
        else:
            found = self._masks.find(describe(layer), frozenset({ROOT}), tuple(positions), x)
        self._was_used = self._was_used or found is not None
        return found

    def has_layer(self, layer: nn.Module) -> bool:
        """Whether a layer is one of the model's."""
        return self._model is not None and self._model.has_layer(layer)


def read_masks(masks: tuple[Any, ...], model: nn.Module | None) -> dict[str, list[SizedMask] | None]:
    """The masks of each part of the model, by its name."""
    parts: dict[Any, MaskArgument] = {ROOT: masks}
    if len(masks) == 1 and isinstance(masks[0], dict):
        if model is None:
            raise TypeError("masked: masks for each part need the model; got a dict alone; pass model=model as well")
        parts = {find_part_name(part, model): given for part, given in masks[0].items()}
    return {part: None if given is None else read_masks_of_part(given) for part, given in parts.items()}


def read_masks_of_part(given: Any) -> list[SizedMask]:
    """The masks that were given for one part, bool.

    Raises:
        TypeError: none, or something that is no tensor.
        ValueError: values that are neither 0 nor 1.
    """
    several = list(given) if isinstance(given, (tuple, list)) else [given]
    if not several or any(not isinstance(mask, Tensor) for mask in several):
        got = ", ".join(type(mask).__name__ for mask in several) or "nothing"
        raise TypeError(f"masked: one or more masks are needed; got {got}; pass mask_of(lengths, size)")
    for mask in several:
        if mask.dtype != torch.bool:
            check_zeros_and_ones("masked", mask)
    return [SizedMask(mask.bool()) for mask in several]


def find_part_name(part: Any, model: nn.Module) -> str:
    """The name of a submodule, or of the module that is given for it."""
    names = {name: module for name, module in name_modules(model)}
    if isinstance(part, nn.Module):
        name = next((name for name, module in names.items() if module is part), None)
    else:
        name = part if part in names else None
    if name is None:
        got = type(part).__name__ if isinstance(part, nn.Module) else repr(part)
        raise ValueError(
            f"masked: parts must be submodules of the model; got {got}; pass a name of model.named_modules() or the "
            "module"
        )
    return name


def may_be_masked() -> bool:
    """Whether a norm must look for a context: one is open, or one may have been left before backward."""
    # An attribute first: it is all that a process costs that never had a context. The compiler is asked before the
    # weak dictionary, which it cannot trace.
    return CONTEXTS.opened > 0 or (CONTEXTS.was_opened and not torch.compiler.is_compiling() and len(LAST_CONTEXT) > 0)


@not_compiled  # whole: a compiler that breaks its graph within runs the rest of it wrongly, as that of torch 2.8 does
def find_current(layer: nn.Module, positions: Sequence[int], x: Any) -> Tensor | None:
    """The mask that the context has for a layer's input."""
    context = CURRENT.get() if CONTEXTS.opened else None
    check_recomputation(layer, context)
    if context is None:
        LAST_CONTEXT.pop(layer, None)
        return None
    LAST_CONTEXT[layer] = context
    return context.find_mask(layer, positions, x)


def check_recomputation(layer: nn.Module, context: masked | None) -> None:
    """Activation checkpointing must compute a layer again with the mask that it had."""
    # Private to torch, and the only sign that this call runs within backward; -1 says it does not.
    if find_backward() == -1:
        return
    if LAST_CONTEXT.get(layer, hooks.CHECKPOINTED.get(layer)) is not context:
        hooks.expect_no_recomputation()
        word = "norm" if hasattr(layer, "find_channel_axes") else "layer"
        raise RuntimeError(
            f"{describe(layer)}: activation checkpointing computes this {word} again outside the anynorm.masked "
            "context of its forward, or inside one that forward had not; the mask would be another; call backward "
            "where forward was called"
        )


# ---- what torch calls before and after every module, while a context knows a model -----------------------------------


def pre_hook(layer: nn.Module, args: Any) -> Any:
    """Blank the padding of a layer's input."""
    context = CURRENT.get() if CONTEXTS.opened else None
    if context is None or not context.has_layer(layer):
        if layer in hooks.CHECKPOINTED:
            # Its forward had a mask. Called within backward it is computed again, and raises; else the entry is stale.
            check_recomputation(layer, None)
            hooks.CHECKPOINTED.pop(layer, None)
        return None
    assert context._model is not None
    changed = context._model.prepare_input(layer, args)
    if changed is not None:
        check_recomputation(layer, context)
        hooks.expect_recomputation(layer, context, find_regions()[0])
        context._was_used = True
    return changed


def hook(layer: nn.Module, args: Any, named: Any, output: Any) -> Any:
    """Follow the mask to a layer's output."""
    context = CURRENT.get() if CONTEXTS.opened else None
    if context is None or not context.has_layer(layer):
        return None
    assert context._model is not None
    return context._model.finish_output(layer, args, named, output)
