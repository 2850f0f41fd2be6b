"""Hooks on every module of the process while a context knows a model, and eager code instead of compiled code.

They are torch's hooks for all modules, not hooks of the model: so no copy, pickle or trace of a model has them. Every
module that is called meanwhile pays for a look-up, about a microsecond. Behind the context they go, at once or, where
activation checkpointing will compute layers again, with the graph that would.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn as nn
import torch.nn.modules.module as modules
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

CHECKPOINTED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # layers to be computed again, by their context
REGIONS: set[Any] = set()  # weak: the stretches of living graphs that will be computed again
LOCK = RLock()  # a graph may be collected at any place, also while this thread holds the lock
HANDLES: list[Any] = []
OPEN: list[int] = [0]  # contexts that know a model
STANCE: list[Any] = []  # what keeps compiled code from running: one while a context is open, None without a compiler
COMPILED = (
    "masked: a context that knows its model runs compiled code eagerly, so it must be entered outside; got a function "
    "from torch.compile around it; enter it around the call of that function"
)


def install_hooks(pre_hook: Callable[..., Any], hook: Callable[..., Any]) -> None:
    """Install the hooks, and let compiled code run eagerly, where a context that knows its model is entered.

    Compiled code does not look for hooks that came later, so it is not used until the context is left.
    """
    with LOCK:
        # Before anything is counted: this raises where the context is entered in compiled code.
        if not STANCE:
            STANCE.append(force_eager())
        OPEN[0] += 1
        if not HANDLES:
            HANDLES.append(register_module_forward_pre_hook(hide_from_compiler(pre_hook)))
            HANDLES.append(register_module_forward_hook(hide_from_compiler(hook), with_kwargs=True))


def force_eager() -> Any:
    """Let compiled functions run eagerly; None where no compiler was loaded."""
    if torch.compiler.is_compiling():
        raise RuntimeError(COMPILED)
    # Setting a stance imports the compiler, which takes seconds; without it there is no compiled code yet.
    if "torch._dynamo" not in sys.modules:
        return None
    try:
        return torch.compiler.set_stance("force_eager")
    except RuntimeError as error:
        raise RuntimeError(COMPILED) from error


def release_hooks() -> None:
    """Undo one `install_hooks` where its context is left; with the last one the hooks may go."""
    with LOCK:
        OPEN[0] -= 1
        if OPEN[0] == 0 and (stance := STANCE.pop()) is not None:
            stance.__exit__(None, None, None)
    remove_unused_hooks()


def remove_unused_hooks() -> None:
    """Remove the hooks, unless a context is open or a layer that had a mask may be computed again by checkpointing."""
    with LOCK:
        if OPEN[0] == 0 and not REGIONS:
            CHECKPOINTED.clear()
            while HANDLES:
                handle = HANDLES.pop()
                handle.remove()
                # torch leaves this entry, and torch.compile would warn of hooks for ever.
                getattr(modules, "_global_forward_hooks_with_kwargs", {}).pop(handle.id, None)


def expect_recomputation(layer: nn.Module, context: Any, regions: list[Any]) -> None:
    """Keep the hooks for a layer that had a mask in stretches of a forward that will be computed again."""
    with LOCK:
        if regions:
            CHECKPOINTED[layer] = context
        # Weak: where the graph is dropped without a backward, nothing else would say that the hooks may go.
        REGIONS.update(ref(region, drop_region) for region in regions)


def drop_region(region: Any) -> None:
    """Forget a stretch whose graph is gone: nothing of it is computed again."""
    with LOCK:
        REGIONS.discard(region)
    remove_unused_hooks()


def expect_no_recomputation() -> None:
    """Forget all stretches, where recomputation ended in an error."""
    REGIONS.clear()
    remove_unused_hooks()


def hide_from_compiler(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does nothing where code is being compiled."""

    def call(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling():
            return hook(*arguments)
        if OPEN[0]:  # compiled for the first time inside: what raises is run eagerly
            raise RuntimeError(COMPILED)
        return None

    return call
