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

COMPOSABLE = "torch.distributed._composable.checkpoint_activation"
CONTRACT = "torch.distributed._composable.contract"

# For each region what each layer's calls in it read, as long as the graph lives; and how many of them came again.
READ: WeakKeyDictionary[Any, WeakKeyDictionary[nn.Module, list[Any]]] = WeakKeyDictionary()
AGAIN: WeakKeyDictionary[Any, tuple[Any, WeakKeyDictionary[nn.Module, int]]] = WeakKeyDictionary()


def recall(layer: nn.Module, now: Any) -> Any:
    """`now`, what a call in training reads; where the call is computed again, what it read the first time.

    Costs a walk over the stack, some microseconds, and within a region a copy of what is read.

    Args:
        layer: whose call it is.
        now: a tuple of tensors and numbers, or None.

    Raises:
        RuntimeError: a forward within backward that nobody knows.
    """
    if torch.compiler.is_compiling():
        return now
    inside, again, run = find_regions()
    if again is not None:
        found = find_first(layer, again, run)
    elif torch._C._current_graph_task_id() != -1:
        raise find_stranger(layer)
    else:
        found = now and tuple(t.detach().clone() if isinstance(t, Tensor) else t for t in now) if inside else now
    for region in inside:
        READ.setdefault(region, WeakKeyDictionary()).setdefault(layer, []).append(found)
    return found


def find_first(layer: nn.Module, region: Any, run: Any) -> Any:
    """What the call read that comes next in this recomputation of a region."""
    known = AGAIN.get(region)
    if known is None or known[0] != run:
        AGAIN[region] = known = run, WeakKeyDictionary()
    place = known[1].get(layer, 0)
    known[1][layer] = place + 1
    calls = READ[region].get(layer, ()) if region in READ else ()
    if place >= len(calls):
        raise find_stranger(layer)
    return calls[place]


def find_stranger(layer: nn.Module) -> RuntimeError:
    """A forward within backward whose first run was not seen: the averages have moved, and nobody knows from where."""
    return RuntimeError(
        f"{describe(layer)}: a call within backward must read the running averages of the call that it computes again; "
        "got one that was not seen in forward; checkpoint with torch.utils.checkpoint, or leave this layer out of it"
    )


def find_regions() -> tuple[list[Any], Any, Any]:
    """`walk_stack`, which a loaded compiler must not trace: it cannot follow the stack."""
    return (walk_stack_uncompiled if "torch._dynamo" in sys.modules else walk_stack)()


def walk_stack() -> tuple[list[Any], Any, Any]:
    """The regions that this call lies in for the first time, the one that is computed again, and which time that is.

    Regions are taken from the stack, from the innermost on: what lies outside a recomputation was seen by it.
    """
    inside: list[Any] = []
    frame: Any = sys._getframe(3)
    while frame is not None:
        name = frame.f_code.co_name
        if name == "checkpoint" or name == "unpack_hook":
            if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
                known = frame.f_locals
                if name == "unpack_hook":
                    return inside, known.get("frame"), (torch._C._current_graph_task_id(), id(frame))
                started = getattr(known.get("gen"), "gi_frame", None)
                region = None if started is None else started.f_locals.get("new_frame")
                if region is not None:
                    inside.append(region)
        elif name == "_call_impl" and COMPOSABLE in sys.modules:
            region = find_composable_region(frame.f_locals.get("self"))
            if region is not None:
                inside.append(region)
        elif name == "forward" or name == "backward":
            first = frame.f_code.co_varnames[:1]
            region = None if first in ((), ("self",)) else frame.f_locals.get(first[0])
            if isinstance(region, BackwardCFunction):
                if name == "backward":
                    return inside, region, (torch._C._current_graph_task_id(), id(frame))
                inside.append(region)
        frame = frame.f_back
    return inside, None, None


walk_stack_uncompiled = torch._disable_dynamo(walk_stack)  # loads the compiler where it is called


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
