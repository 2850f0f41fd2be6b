"""Which path serves a tensor.

Three paths, in order of preference:

- the kernels, for plain eager tensors on the CPU (`watch.is_plain`);
- torch's own operation, on other devices and in exported graphs, where torch has it (`prefers_torch`);
- `plain.compose`, the formula in differentiable operations, for everything else.
"""

from __future__ import annotations

import platform
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .. import statistics
from ..pooling import Pooling
from ..sources import Given, Merged, move_running
from ..statistics import Moments
from ..torch_private import count_transforms, is_exporting, is_recording
from ..version import __version__
from . import kernels, library, memory, merged, plain, protocol, transforms
from .gradients import apply
from .request import Request
from .walks import Plan
from .watch import is_observed, is_plain

EXACT: ContextVar[bool] = ContextVar("anynorm.exact", default=False)


class exact:
    """Choose between exactness and torch's own operations on devices other than the CPU.

    On the CPU results are always exact. Elsewhere torch's own operation is called where it has one, because a norm
    written in torch operations is several times slower there; ``exact(True)`` forces the library's own formula. It
    holds from the call on, in this thread and asynchronous task; as a context manager until the end of the block. A
    compiled graph keeps what held when it was traced.

    Args:
        on: True forces the formula, False (the default at start) prefers torch's operation.

    Example:
        >>> import anynorm
        >>> with anynorm.exact(True):
        ...     pass
    """

    on: bool
    before: bool

    def __init__(self, on: bool) -> None:
        self.on, self.before = bool(on), EXACT.get()
        EXACT.set(self.on)

    def __enter__(self) -> None:
        EXACT.set(self.on)

    def __exit__(self, *exception: object) -> None:
        EXACT.set(self.before)


def is_exact() -> bool:
    """Whether the formula is forced, here and now."""
    return EXACT.get()


# What torch.compiler.assume_constant_result does, without loading the compiler: it cannot trace a context variable.
is_exact._dynamo_marked_constant = True  # type: ignore[attr-defined] # torch's mark, of no type


def prefers_torch(x: Tensor) -> bool:
    """Whether torch's own operation should serve: in exported graphs, which other tools read, and off the CPU."""
    if is_recording():
        return True
    return x.device.type != "cpu" and not is_exact()


# What was checked before, by all that the checks look at, and the plan that serves it.
PLANS: dict[tuple[Any, ...], Plan] = {}
PLANS_KEPT = 4096


def remember(key: tuple[Any, ...], plan: Plan) -> None:
    """A call with this key needs no checks any more."""
    if len(PLANS) >= PLANS_KEPT:
        PLANS.clear()
    PLANS[key] = plan


def describe_environment() -> dict[str, str]:
    """Versions, and which path serves plain CPU tensors; what `anynorm env` prints."""
    return {
        "anynorm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        **kernels.describe(),
    }


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    request: Request,
    pooling: Pooling,
    *,
    key: tuple[Any, ...] | None = None,
) -> Tensor:
    """The formula on whichever path serves x.

    Args:
        x: any shape that `pooling` was found for; floating point.
        weight, bias: gamma and beta, flat or shaped as their axes.
        residual: shape and dtype of x, added before the activation.
        request: its source is `Batch`, `Given` or `Merged`.
        key: from `watch.find_key`, to remember that the checks have passed.

    Returns:
        y with the shape and dtype of x, channels_last where x is.
    """
    source, _, _, mask, *_ = request
    if type(source) is Merged:
        return merged.normalize(x, weight, bias, residual, request, pooling)
    if not is_plain(x, weight, bias, residual, mask, source[0], source[1]):
        found = protocol.hand_over(normalize, (x, weight, bias, residual, request, pooling), {})
        return compose(x, weight, bias, residual, request, pooling) if found is None else found
    arranged, plan = kernels.arrange_for(x, pooling, int(type(source) is Given), mask is not None)
    if plan is None:
        for name, t in (("input", x), ("weight", weight), ("bias", bias), *zip(source._fields[:2], source[:2])):
            memory.check_storage(name, t)
        return compose(arranged, weight, bias, residual, request, pooling)
    if key is not None and arranged is x:
        remember(key, plan)
    y, memory_format = run(arranged, weight, bias, residual, request, plan), plain.find_memory_format(x)
    return y if plan.memory_format == memory_format else plain.lay_out(y, memory_format)


def run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, request: Request, plan: Plan
) -> Tensor:
    """By the kernels, with autograd where a gradient is wanted; everything was checked."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return apply(x, weight, bias, residual, request, plan)
    return kernels.forward(x, weight, bias, residual, request, plan)[0]


def find_moments(x: Tensor, pooling: Pooling, mask: Tensor | None = None) -> Moments:
    """Count, mean and m2 of x alone, in float64 where the device has it, without a gradient.

    Args:
        mask: as in `normalize`.
    """
    x = x.detach()
    if is_plain(x, mask) and x.numel():
        found = kernels.find_moments(x, pooling, mask)
        if found is not None:
            return found
    view, counted = plain.open_counted(x, pooling, mask)
    return statistics.find_moments(statistics.centre(view, pooling, counted))


def compose(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, request: Request, pooling: Pooling
) -> Tensor:
    """The formula in differentiable operations, laid out as torch's result would be."""
    source, _, _, mask, *_ = request
    # Exported graphs are read by other tools, and must not depend on sizes.
    in_graph = torch.compiler.is_compiling() and not is_exporting()
    if type(source) is not Given:
        if (in_graph and library.serves(x)) or (is_observed(x, weight, bias, residual, mask) and not kernels.OFF):
            y, moments = library.normalize(x, weight, bias, residual, request, pooling)
            if x.numel():
                move_running(source, moments, pooling)
            return y
        if source.running_mean is None and mask is None and transforms.serves(x):
            return transforms.normalize(x, weight, bias, residual, request, pooling)
    if torch.is_grad_enabled() and not in_graph and x.is_inference():
        x = x.clone()
    y, moments = plain.compose(x, weight, bias, residual, request, pooling)
    if count_transforms() == 0:  # inside vmap a tensor cannot tell its layout
        y = plain.lay_out(y, plain.find_memory_format(x))
    if type(source) is not Given and x.numel():
        move_running(source, moments, pooling)
    return y
