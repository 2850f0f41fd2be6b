"""What did a call read the first time? Activation checkpointing computes it again, when running averages have moved.

A call is found by what computes it again, not by its input: two calls may have one batch. Each stretch of a forward
that is checkpointed is a region, an object that is the same in forward and in backward: what torch's checkpoint without
reentry calls a frame, and with all others the context of an autograd function. In a region a layer's calls come again
in the order in which they came first.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ..padding.masks import describe
from ..torch_private import find_backward, not_compiled

COMPOSABLE = "torch.distributed._composable.checkpoint_activation"
CONTRACT = "torch.distributed._composable.contract"

# Weak keys: what is kept lives as long as the graph that owns the region, and nobody has to clear it.
# FIRST_READS: for each region what each layer's calls in it read, in order.
FIRST_READS: WeakKeyDictionary[Any, WeakKeyDictionary[nn.Module, list[Any]]] = WeakKeyDictionary()
# REPLAYED: for each region which recomputation is under way, and how many of each layer's calls came again in it.
REPLAYED: WeakKeyDictionary[Any, tuple[Any, WeakKeyDictionary[nn.Module, int]]] = WeakKeyDictionary()


def read_or_replay(layer: nn.Module, current: Any) -> Any:
    """`current`, what a call in training reads; where the call is computed again, what it read the first time.

    Costs a walk over the stack, some microseconds, and within a region a copy of what is read.

    Args:
        layer: whose call it is.
        current: a tuple of tensors and numbers, or None.

    Raises:
        RuntimeError: the call is within backward, and its first run was not seen.
    """
    if torch.compiler.is_compiling():  # A graph cannot follow the stack; it reads what is there.
        return current
    inside, recomputed, run = find_regions()
    if recomputed is not None:
        read = replay_next(layer, recomputed, run)
    elif find_backward() != -1:
        raise make_unseen_call_error(layer)
    elif current and inside:
        # Copies, because the averages move in place before backward; without a region nobody comes back to them.
        read = tuple(t.detach().clone() if isinstance(t, Tensor) else t for t in current)
    else:
        read = current
    # A call that is computed again may lie in regions within the recomputed one, which are new and come again later.
    for region in inside:
        FIRST_READS.setdefault(region, WeakKeyDictionary()).setdefault(layer, []).append(read)
    return read


def replay_next(layer: nn.Module, region: Any, run: Any) -> Any:
    """What the layer's next call in this recomputation of a region read the first time; moves on to the one behind.

    Args:
        run: which recomputation it is; a graph that is kept is computed again at each backward, from the first call on.

    Raises:
        RuntimeError: the region has no such call.
    """
    replayed = REPLAYED.get(region)
    if replayed is None or replayed[0] != run:
        REPLAYED[region] = replayed = run, WeakKeyDictionary()
    place = replayed[1].get(layer, 0)
    replayed[1][layer] = place + 1
    reads = FIRST_READS[region].get(layer, ()) if region in FIRST_READS else ()
    if place >= len(reads):
        raise make_unseen_call_error(layer)
    return reads[place]


def make_unseen_call_error(layer: nn.Module) -> RuntimeError:
    """The error for a call in backward that was not seen in forward: what the averages were then, nobody knows."""
    return RuntimeError(
        f"{describe(layer)}: a call within backward must read the running averages of the call that it computes again; "
        "got one that was not seen in forward; checkpoint with torch.utils.checkpoint, or leave this layer out of it"
    )


def find_regions() -> tuple[list[Any], Any, Any]:
    """`walk_stack`, which a loaded compiler must not trace: it cannot follow the stack."""
    return (walk_stack_uncompiled if "torch._dynamo" in sys.modules else walk_stack)()


def walk_stack() -> tuple[list[Any], Any, Any]:
    """The regions that this call lies in for the first time, the one that is computed again, and which time that is.

    Regions are taken from the stack, from the innermost on: what lies outside a recomputation was seen by it. torch has
    no interface that tells; the names of functions and of their variables here are those of torch 2.8 to 2.15, and
    tests/modules/test_recomputation.py fails where they change.
    """
    inside: list[Any] = []
    frame: Any = sys._getframe(3)  # Not this function, `find_regions` or its caller.
    while frame is not None:
        # Names first: they are cheap, and `f_locals` copies a frame's variables.
        name = frame.f_code.co_name
        # checkpoint hands on to a function of its own since torch 2.15.
        if name == "checkpoint" or name == "_checkpoint_impl" or name == "unpack_hook":
            if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
                known = frame.f_locals
                if name == "unpack_hook":  # Without reentry a saved tensor's hook computes its frame again.
                    return inside, known.get("frame"), (find_backward(), id(frame))
                started = getattr(known.get("gen"), "gi_frame", None)
                region = None if started is None else started.f_locals.get("new_frame")
                if region is not None:
                    inside.append(region)
        elif name == "_call_impl" and COMPOSABLE in sys.modules:
            region = find_composable_region(frame.f_locals.get("self"))
            if region is not None:
                inside.append(region)
        elif name == "forward" or name == "backward":  # With reentry: an autograd function, its context first.
            first = frame.f_code.co_varnames[:1]
            region = None if first in ((), ("self",)) else frame.f_locals.get(first[0])
            if isinstance(region, BackwardCFunction):
                if name == "backward":
                    return inside, region, (find_backward(), id(frame))
                inside.append(region)
        frame = frame.f_back
    return inside, None, None


walk_stack_uncompiled = not_compiled(walk_stack)  # loads the compiler where it is called


def find_composable_region(module: Any) -> Any:
    """The region that torch.distributed's composable checkpoint has opened around a module, by a hook of the module.

    It has no function on the stack. Hooks on saved tensors that are in force do not tell: where a forward raised, torch
    may leave them behind.
    """
    if not isinstance(module, nn.Module) or sys.modules[CONTRACT].STATE_KEY not in vars(module):
        return None
    state = sys.modules[COMPOSABLE].checkpoint.state(module)  # writes on a module that has none
    started = getattr(getattr(state, "_ac_generator", None), "gi_frame", None)
    return None if started is None else started.f_locals.get("new_frame")
