"""Errors meant to be read by people: one sentence each, with the likely repair."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from .torch_private import count_dispatch_modes


class UserError(ValueError):
    """What was asked cannot be done; the message is one sentence that says why and what to do instead."""


class PatternError(UserError):
    """A pattern that does not describe its tensor; the message shows the pattern, the shape and the repair."""


class SyncError(RuntimeError):
    """Ranks could not merge their statistics.

    Attributes:
        layer: the layer at which it was seen.
        ranks: global ranks that differ or are missing; empty where nobody could say.
    """

    layer: str
    ranks: tuple[int, ...]

    def __init__(self, message: str, layer: str = "", ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.layer, self.ranks = layer, ranks


def check_axes(x: Tensor, axes: tuple[int, ...]) -> None:
    if x.dim() not in axes:
        raise ValueError(
            f"expected {' or '.join(f'{a}D' for a in axes)} input (got {x.dim()}D input); "
            f"got shape {tuple(x.shape)}; use the norm of the right dimension or unsqueeze"
        )


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # torch has norms of no other, float8 included


def check_floating(function: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: input must be a tensor; got {type(x).__name__}; call torch.as_tensor first")
    if x.dtype not in FLOATS:
        raise NotImplementedError(
            f"{function}: input must be float16, bfloat16, float32 or float64; got {x.dtype}; call x.float() first"
        )


def check_parameter_dtypes(function: str, x: Tensor, **parameters: Tensor | None) -> None:
    """As in torch: parameters and buffers have the dtype of x, or float32 where x is of a half type."""
    for name, parameter in parameters.items():
        if parameter is None or parameter.dtype == x.dtype:
            continue
        if parameter.dtype != torch.float32 or x.dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError(
                f"{function}: {name} must have the dtype of the input, or float32 where the input is of a half type; "
                f"got {name} {parameter.dtype}, input {x.dtype}; convert one of them with .to(dtype)"
            )


def check_floating_averages(function: str, **averages: Tensor | None) -> None:
    """torch's instance norm takes averages of any dtype, and cuts them to whole or real numbers in silence."""
    for name, average in averages.items():
        if average is not None and not average.is_floating_point():
            raise RuntimeError(
                f"{function}: {name} must be floating point; got {average.dtype}; convert it with .float()"
            )


def check_channels(function: str, channels: int, **parameters: Tensor | None) -> None:
    for name, parameter in parameters.items():
        if parameter is not None and parameter.numel() != channels:
            raise RuntimeError(
                f"{function}: {name} must have one element per channel; got {parameter.numel()} elements, input with "
                f"channels={channels}; build the norm for {channels} channels or move the channels to axis 1"
            )
        if parameter is not None and parameter.dim() != 1 and not takes_shaped(function, name):
            raise RuntimeError(
                f"{function}: {name} must have one axis, of channels; got {tuple(parameter.shape)}; pass "
                f"{name}.flatten()"
            )


def takes_shaped(function: str, name: str) -> bool:
    """Whether torch takes a parameter of other axes, too, as gamma and beta of its batch norm."""
    return name in ("weight", "bias") and function not in ("group_norm", "instance_norm")


def check_normalized_shape(
    function: str, x: Tensor, normalized_shape: Sequence[int], **parameters: Tensor | None
) -> tuple[int, ...]:
    if not isinstance(normalized_shape, Sequence) or isinstance(normalized_shape, str):
        raise TypeError(
            f"{function}: normalized_shape must be a sequence of sizes; got {normalized_shape!r}; "
            f"pass ({normalized_shape},)"
        )
    shape = tuple(normalized_shape)
    if not shape:
        raise RuntimeError(
            f"{function}: normalized_shape must name at least one axis; got (); pass the last axes' sizes"
        )
    if any(isinstance(size, (float, bool)) for size in shape):
        raise TypeError(f"{function}: normalized_shape must be whole numbers; got {shape}; pass ints")
    if x.dim() < len(shape) and function == "rms_norm":
        raise ValueError(
            f"{function}: input must have the axes of normalized_shape; got input {tuple(x.shape)}, normalized_shape "
            f"{shape}; name fewer axes"
        )
    if tuple(x.shape[-len(shape) :]) != shape:
        raise RuntimeError(
            f"{function}: the input's last axes must be normalized_shape; got input {tuple(x.shape)}, "
            f"normalized_shape {shape}; try normalized_shape={tuple(x.shape[-len(shape) :])}"
        )
    for name, parameter in parameters.items():
        if parameter is not None and tuple(parameter.shape) != shape:
            raise RuntimeError(
                f"{function}: {name} must have the shape normalized_shape; got {name} {tuple(parameter.shape)}, "
                f"normalized_shape {shape}; build the norm for {shape}"
            )
    return shape


def check_groups(function: str, x: Tensor, groups: int) -> None:
    if x.dim() < 2:
        kind = ValueError if function == "instance_norm" else RuntimeError
        raise kind(f"{function}: input must have axes (N, C, ...); got {x.dim()} axes; add one with unsqueeze")
    if isinstance(groups, (bool, float)):  # 2.0 equals 2, and would be taken where 2 was remembered
        raise TypeError(f"{function}: groups must be a whole number; got {groups!r}; pass int({groups})")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        fitting = [str(g) for g in range(1, channels + 1) if channels % g == 0 and g <= max(groups, 1)] or ["1"]
        proposal = fitting[0] if len(fitting) == 1 else f"{', '.join(fitting[:-1])} or {fitting[-1]}"
        raise RuntimeError(
            f"{function}: channels must be divisible by groups; got channels={channels}, groups={groups}; "
            f"try {proposal}"
        )


def check_batch_norm(x: Tensor, training: bool, eps: float, **running: Tensor | None) -> None:
    if x.dim() < 2:
        raise IndexError(f"batch_norm: input must have axes (N, C, ...); got {x.dim()} axes; add one with unsqueeze")
    if eps < 0 or (training and eps == 0):
        rule = "positive" if training else "non-negative"
        raise ValueError(f"batch_norm: eps must be {rule}; got {eps}; the default is 1e-5")
    missing = [name for name, buffer in running.items() if buffer is None]
    if len(missing) == 1 and training:
        raise ValueError(
            "batch_norm: running_mean and running_var are given together or not at all; "
            f"got {missing[0]}=None; pass both"
        )
    if missing and not training and x.numel():
        raise RuntimeError(
            f"batch_norm: evaluation needs running statistics; got {missing[0]}=None; pass it, or training=True"
        )


def check_more_than_one(function: str, count: int, what: str, x: Tensor, repair: str) -> None:
    if count == 1:
        raise ValueError(
            f"{function}: statistics need more than 1 value per {what}, or every output is beta; "
            f"got input {tuple(x.shape)}; {repair}"
        )


def check_more_than_one_counted(function: str, mask: Tensor, x: Tensor, repair: str) -> None:
    """The same for positions that count. None at all is fine: nothing is normalized and nothing moves."""
    if int(mask.sum()) == 1:
        raise ValueError(
            f"{function}: statistics need more than 1 real position, or every output is beta; "
            f"got 1 in an input {tuple(x.shape)}; {repair}"
        )


def check_no_overlap(function: str, x: Tensor, running_mean: Tensor, running_var: Tensor) -> None:
    """torch updates buffers that share memory with each other or the input, and corrupts both."""
    named = {"the input": x, "running_mean": running_mean, "running_var": running_var}
    for name, other in (
        ("running_mean", "running_var"),
        ("running_mean", "the input"),
        ("running_var", "the input"),
    ):
        if share_memory(named[name], named[other]):
            raise ValueError(
                f"{function}: {name} and {other} must not share memory, the update of one would corrupt the other; "
                f"got overlapping tensors; pass {name}.clone()"
            )


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have an element in common; interleaved ones have not."""
    if a.device != b.device or not a.numel() or not b.numel():
        return False
    ranges = []
    for t in (a, b):
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        ranges.append((t.data_ptr(), t.data_ptr() + last * t.element_size()))
    if ranges[0][0] > ranges[1][1] or ranges[1][0] > ranges[0][1]:
        return False
    return bool(torch.isin(find_addresses(a), find_addresses(b)).any())


def find_addresses(t: Tensor) -> Tensor:
    """The address of every element."""
    addresses = torch.tensor([t.data_ptr()], dtype=torch.int64, device="cpu")
    for size, stride in zip(t.shape, t.stride(), strict=True):
        addresses = (addresses[:, None] + torch.arange(size, device="cpu") * (stride * t.element_size())).flatten()
    return addresses


def warn_of_one_value(function: str, count: int, what: str, x: Tensor, output: str) -> bool:
    """Whether there is one value, which torch says nothing of (pytorch#19250)."""
    if count == 1 and not torch.compiler.is_compiling():
        warnings.warn(
            f"{function}: one value per {what} in an input {tuple(x.shape)}, so every output is {output}; "
            "pool more values",
            stacklevel=6,
        )
    return count == 1


def has_values(value: Any) -> TypeGuard[Tensor]:
    """Whether a checkpoint's entry can be looked at: neither on the meta device nor fake."""
    return type(value) in (Tensor, Parameter) and not value.is_meta and not count_dispatch_modes()


def check_state(state: dict[str, Any], prefix: str, suffix: str = "") -> Iterator[str]:
    """What is wrong with the norm's entries of a checkpoint; torch loads all of it without a word."""
    for name in (f"{name}{suffix}" for name in ("weight", "bias", "running_mean", "running_var")):
        value = state.get(prefix + name)
        if isinstance(value, Tensor) and value.is_complex():
            yield f"{prefix}{name} must be real; got {value.dtype}, whose imaginary part would be lost; save a real one"
    var = state.get(f"{prefix}running_var{suffix}")
    if has_values(var) and not var.is_complex() and bool((var < 0).any()):
        yield (
            f"{prefix}running_var{suffix} must not be negative; got {float(var.min()):.6g}; it was computed by a "
            "formula that cancels: estimate the statistics again from data"
        )
    counter = state.get(f"{prefix}num_batches_tracked{suffix}")
    if has_values(counter) and (counter.numel() != 1 or counter.is_complex()):
        yield f"{prefix}num_batches_tracked{suffix} must be one whole number; got {counter.tolist()}; set it to 0"
