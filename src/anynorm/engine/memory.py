"""Is the memory that kernels are to touch what their plan was made for?

Kernels take addresses, so everything is looked at where it is touched: device, dtype, size, layout, and that the
storage is still there. Between forward and backward a tensor can become another: hooks on saved tensors promise values,
shape, dtype and device but no strides (`torch.autograd.graph.save_on_cpu`), `x.data` can be exchanged, and FSDP frees
storages. Another layout is rearranged; anything else is refused, as torch.nn refuses it.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from .walks import Plan

CPU = torch.device("cpu")
Like = tuple[tuple[int, ...], torch.dtype]
REPAIR = "keep .data and storages until backward, and let hooks on saved tensors give back what they were given"


def find_like(t: Tensor | None) -> Like | None:
    """What a tensor must still be in backward."""
    return None if t is None else (t.shape, t.dtype)


def check_like(name: str, t: Tensor | None, like: Like | None) -> None:
    """Refuse a tensor that came back for backward as another."""
    if t is not None and like is not None and (t.dtype is not like[1] or t.shape != like[0] or not t.is_cpu):
        wanted = f"{tuple(like[0])} {like[1]} on the CPU"
        raise RuntimeError(f"norm: {name} must be {wanted}, as in forward; got {show(t)}; {REPAIR}")


def arrange(name: str, t: Tensor, plan: Plan) -> Tensor:
    """A tensor of the input's sizes as the plan walks it: rearranged where it is laid out otherwise."""
    if t.stride() == plan.strides and t.dtype is plan.dtype and t.shape == plan.sizes:
        return t
    check_like(name, t, (plan.sizes, plan.dtype))
    check_storage(name, t)
    return torch.empty_strided(plan.sizes, plan.strides, dtype=plan.dtype, device=CPU).copy_(t)


@overload
def ready(name: str, t: Tensor, plan: Plan, size: int = 0) -> Tensor: ...
@overload
def ready(name: str, t: None, plan: Plan, size: int = 0) -> None: ...
@overload
def ready(name: str, t: Tensor | None, plan: Plan, size: int = 0) -> Tensor | None: ...
def ready(name: str, t: Tensor | None, plan: Plan, size: int = 0) -> Tensor | None:
    """A parameter as the kernels read it, contiguous and in the dtype of the computation; `size` is else one of each
    channel."""
    if t is None:
        return None
    size = size or plan.channels
    if t.numel() != size:
        raise RuntimeError(f"norm: {name} must have {size} elements; got {show(t)}; pass one for each channel")
    if t.dtype is plan.parameter and t.is_contiguous():
        return t
    check_storage(name, t)
    return t.to(plan.parameter).contiguous()


def recover(name: str, t: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """Statistics that were saved for backward, of `size` elements, as they were but for their layout."""
    if t.dtype is not dtype or t.numel() != size or not t.is_cpu:
        check_like(name, t, ((size,), dtype))
    return t.contiguous()


def find_address(name: str, t: Tensor | None, size: int) -> int:
    """Where a contiguous tensor begins whose storage holds `size` bytes from there; 0 for none."""
    if t is None:
        return 0
    if t.untyped_storage().nbytes() < size or t.storage_offset() or not t.is_cpu:
        check_storage(name, t, size)
    return t.data_ptr()


def check_storage(name: str, t: Tensor | None, size: int | None = None) -> None:
    """Refuse other devices, and storages that were freed or cut, as FSDP does: memory behind them is another's.

    Args:
        size: bytes from the first element that must be there; None for those to the end of the last.
    """
    if t is None:
        return
    if size is None:
        size = (1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))) * t.itemsize
    held = t.untyped_storage().nbytes()
    if not t.is_cpu or held < size + t.storage_offset() * t.itemsize:
        raise RuntimeError(
            f"norm: {name} must lie in {size} bytes of the CPU's memory; got {show(t)} at element "
            f"{t.storage_offset()} of a storage of {held} bytes; {REPAIR}"
        )


def show(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype} on {t.device}"
