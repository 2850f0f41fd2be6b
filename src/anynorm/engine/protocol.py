"""torch's own protocol for tensor subclasses and function modes, `__torch_function__`.

A subclass without a dispatch of its own (MONAI's MetaTensor, fastai's TensorImage) is ordinary memory under another
name. So each function offers its call first to whoever overrides functions, as torch's do. A subclass that leaves the
numbers to torch calls the function again with its protocol off, and makes what comes back one of its own; the kernels
serve that second call on the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import handle_torch_function, has_torch_function

from ..sources import Batch, Given, Merged, Renorm
from ..torch_private import as_plain_tensors, dispatch_keys
from .request import Request
from .watch import PLAIN_KEYS


def is_renamed_memory(t: Any) -> bool:
    """Whether a tensor of some subclass lies in memory as it reads; those with a dispatch of their own do not."""
    if type(t) is Tensor or type(t) is Parameter or not isinstance(t, Tensor):
        return False
    return dispatch_keys(t).raw_repr() in PLAIN_KEYS


def read_plain(value: Any) -> Any:
    """The same memory as a Tensor, through which gradients flow; within tuples and requests, too."""
    if type(value) is tuple:
        return tuple(map(read_plain, value))
    if isinstance(value, (Request, Batch, Given, Merged, Renorm)):
        return type(value)(*map(read_plain, value))
    return value.as_subclass(Tensor) if is_renamed_memory(value) else value


def find_tensors(value: Any) -> list[Tensor]:
    """All tensors in a value, within tuples and requests, too."""
    if isinstance(value, tuple) and not isinstance(value, PackedSequence):
        return [t for part in value for t in find_tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def hand_over(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What the protocol makes of function(*arguments, **options), or None where it has no say.

    A subclass that knows torch.nn.functional's norm and not ours is asked for that, where it can mean the same.
    """
    if torch.compiler.is_compiling():
        return None
    tensors = find_tensors((*arguments, *options.values()))
    if has_torch_function(tensors):
        try:
            return handle_torch_function(function, tensors, *arguments, **options)
        except TypeError as error:
            theirs = getattr(F, function.__name__, None) if function.__name__.endswith("_norm") else None
            is_refused = str(error).startswith("no implementation found")
            if theirs is None or not is_refused or any(v is not None for v in options.values()):
                raise
            return theirs(*arguments)
    if not any(is_renamed_memory(t) for t in tensors):
        return None
    return function(*map(read_plain, arguments), **{name: read_plain(v) for name, v in options.items()})


def look_at(x: Any) -> Any:
    """x to ask for its sizes, unheard by a subclass that counts what it is asked."""
    if torch.compiler.is_compiling() or not is_renamed_memory(x):
        return x
    with as_plain_tensors():
        return x.detach().as_subclass(Tensor)
