"""Does anything watch the operations, or is a tensor plain memory that kernels may read?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..sources import BATCH
from ..torch_private import (
    DeviceContext,
    count_dispatch_modes,
    count_function_modes,
    count_transforms,
    dispatch_keys,
    find_dispatch_modes,
    find_forward_level,
    find_function_modes,
    is_tracing,
)
from .kernels import READS_TENSORS, compiled
from .request import Request

# Dispatch keys of an ordinary tensor on the CPU, outside and inside inference mode. All else has others: other devices
# and layouts, subclasses, nested tensors, signs, conjugation or zeros that are only noted, tensors under a transform.
with torch.inference_mode():
    PLAIN_KEYS = {dispatch_keys(torch.empty(0, dtype=torch.float32, device="cpu")).raw_repr()}
PLAIN_KEYS.add(dispatch_keys(torch.empty(0, dtype=torch.float32, device="cpu")).raw_repr())


HASHABLE = (int, tuple, torch.Size)


def is_watched() -> bool:
    """Whether something follows the operations: tracing, a transform, a mode, forward-mode derivatives."""
    return bool(
        torch.compiler.is_compiling()
        or is_tracing()
        or count_transforms()
        or find_forward_level() >= 0
        or count_dispatch_modes()
        or (count_function_modes() and not only_default_device())
    )


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing watches the operations and every tensor lies in memory as it reads.

    The kernels take addresses, so this is an allow-list: what is not known to be harmless is refused.
    """
    if is_watched():
        return False
    if READS_TENSORS and compiled.describe(*tensors) is not None:  # else it is not sure of one of them
        return True
    return all(
        t is None or ((type(t) is Tensor or type(t) is Parameter) and dispatch_keys(t).raw_repr() in PLAIN_KEYS)
        for t in tensors
    )


def find_key(
    function: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    request: Request,
) -> tuple[Any, ...] | None:
    """All that the checks of a call look at, where kernels may serve it; else None.

    A call whose key is in `paths.PLANS` needs no checks: the same ones have passed.
    """
    if is_watched():
        return None
    source, eps, activation, mask, _, sizes = request
    kinds: Any = None
    if sizes is not None:  # 7.0 and True equal sizes that pass, and are refused.
        kinds = (*map(type, sizes),) if type(sizes) is tuple else type(sizes)
        if type(sizes) not in HASHABLE:
            sizes = repr(sizes)
    if READS_TENSORS:
        found = compiled.describe(x, weight, bias, residual, mask, source[0], source[1])
        if found is not None:  # else it is not sure of one of them
            return function, type(source), eps, activation, sizes, kinds, found
    key: list[Any] = [function, type(source), eps, activation, sizes, kinds]
    tensors = (x, weight, bias) if residual is None and mask is None else (x, weight, bias, residual, mask, None)
    if source is not BATCH:
        tensors += source[:2]
    for t in tensors:
        if t is None:
            key.append(None)
            continue
        kind = type(t)
        if (kind is not Tensor and kind is not Parameter) or dispatch_keys(t).raw_repr() not in PLAIN_KEYS:
            return None
        key.append(t.shape)
        key.append(t.dtype)
    key.append(x.stride())
    return tuple(key)


def only_default_device() -> bool:
    """Whether the function modes in force merely choose where new tensors live, as torch.set_default_device does."""
    return all(type(mode) is DeviceContext for mode in find_function_modes())


def is_observed(*tensors: Tensor | None) -> bool:
    """Whether all that watches plain memory are somebody's dispatch modes, as FlopCounterMode; they see one operation.

    Modes of torch's own machinery (fake tensors, proxies) have a key.
    """
    if torch.compiler.is_compiling():
        return False
    modes = find_dispatch_modes()
    if not modes or is_tracing() or count_transforms():
        return False
    if find_forward_level() >= 0 or any(getattr(mode, "_mode_key", None) is not None for mode in modes):
        return False
    known = (t for t in tensors if t is not None)
    return all(type(t) in (Tensor, Parameter) and dispatch_keys(t).raw_repr() in PLAIN_KEYS for t in known)


def has_memory(*tensors: Tensor) -> bool:
    """Whether addresses can be compared: ordinary tensors, outside compilers and transforms."""
    if torch.compiler.is_compiling() or count_transforms():
        return False
    return all(type(t) in (Tensor, Parameter) and t.layout == torch.strided and not t.is_meta for t in tensors)
