"""Which path serves a tensor.

Three paths, in order of preference:

- block by block on the CPU, for plain eager tensors (`watch.is_plain`): compiled, or `plain` where there is no kernel;
- torch's own operation, on other devices and in exported graphs, where torch has it (`prefers_torch`);
- `plain.compose`, the formula in differentiable operations, for everything else.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_dynamic_layer_stack_depth

from .. import statistics
from ..pooling import Pooling
from ..sources import move_running, read_running
from ..statistics import Moments
from . import kernels, library, plain, protocol, transforms
from .gradients import NormalizeByBlocks, Recipe, Running, apply, forward_by_blocks, forward_walk
from .watch import is_observed, is_plain


class exact:
    """Choose between exactness and torch's own operations on devices other than the CPU.

    On the CPU results are always exact. Elsewhere torch's own operation is called where it has one, because a norm
    written in torch operations is several times slower there; ``exact(True)`` forces the library's own formula.

    Args:
        on: True forces the formula, False (the default at start) prefers torch's operation.

    Example:
        >>> import anynorm
        >>> with anynorm.exact(True):
        ...     pass
    """

    forced = False

    def __init__(self, on: bool) -> None:
        self.on, self.before = bool(on), exact.forced
        exact.forced = self.on

    def __enter__(self) -> None:
        exact.forced = self.on

    def __exit__(self, *exception: object) -> None:
        exact.forced = self.before


def prefers_torch(x: Tensor) -> bool:
    """Whether torch's own operation should serve: in exported graphs, which other tools read, and off the CPU."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return True
    return x.device.type != "cpu" and not exact.forced


# What was checked before, by all that the checks look at, and how it is served.
RECIPES: dict[tuple[Any, ...], Recipe] = {}
RECIPES_KEPT = 4096


def describe_environment() -> dict[str, str]:
    """Versions, and which path serves plain CPU tensors; what `anynorm env` prints."""
    return {
        "anynorm": version("anynorm"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        **kernels.describe(),
    }


def normalize(
    x: Tensor,
    pooling: Pooling,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    given: tuple[Tensor, Tensor] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    running: Running | None = None,
    mask: Tensor | None = None,
    key: tuple[Any, ...] | None = None,
) -> Tensor:
    """The formula on whichever path serves x.

    Args:
        x: any shape that `pooling` was found for; floating point.
        weight, bias: gamma and beta, flat or shaped as their axes.
        eps: in units of x squared.
        given: a mean and a variance for each channel to use as constants; None takes them from x.
        activation: a name in `activations.ACTIVATIONS`, applied last.
        residual: shape and dtype of x, added before the activation.
        running: averages that x moves, in place.
        mask: float32, 1 at positions that count and 0 at padding, contiguous, in the axes of x with size 1 for
            channels. Padding enters no statistic; its outputs are 0 and it receives no gradient.
        key: from `watch.find_key`, to remember that the checks have passed.

    Returns:
        y with the shape and dtype of x, channels_last where x is.
    """
    if not is_plain(x, weight, bias, residual, mask, *(given or ()), *(running or ())[:2]):
        given_all = (x, pooling, weight, bias, eps, given, activation, residual, running, mask)
        found = protocol.hand_over(normalize, given_all, {})
        if found is not None:
            return found
        return compose(x, pooling, weight, bias, eps, given, activation, residual, running, mask)
    arranged = kernels.arrange(x)
    if key is not None and arranged is not x:
        key = None
    x = arranged
    walk = kernels.find_walk(x, pooling, 0 if given is None else 1, mask is not None)
    is_bare = activation is None and residual is None and mask is None
    if walk is None and not is_bare and not x.is_contiguous():  # A copy costs less than the formula in float64.
        flat = x.contiguous()
        walk = kernels.find_walk(flat, pooling, 0 if given is None else 1, mask is not None)
        if walk is not None:
            y = run((pooling, walk), flat, weight, bias, eps, given, activation, residual, running, mask)
            return plain.lay_out(y, plain.find_memory_format(x))
    if walk is None and (not is_bare or x.numel() == 0):
        return compose(x, pooling, weight, bias, eps, given, activation, residual, running, mask)
    if walk is None:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
            return NormalizeByBlocks.apply(x, weight, bias, pooling, eps, given, running)
        return forward_by_blocks(x, pooling, weight, bias, eps, given, running)[0]
    if key is not None:
        if len(RECIPES) >= RECIPES_KEPT:
            RECIPES.clear()
        RECIPES[key] = pooling, walk
    return run((pooling, walk), x, weight, bias, eps, given, activation, residual, running, mask)


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
    wide, counted = plain.widen(x, pooling, mask)
    return statistics.find_moments(wide, pooling, wide.dtype == x.dtype, counted)


def run(
    recipe: Recipe,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    given: tuple[Tensor, Tensor] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    running: Running | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """By the kernels, with autograd where a gradient is wanted; everything was checked."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return apply(x, weight, bias, residual, recipe, eps, given, activation, running, mask)
    return forward_walk(recipe, x, weight, bias, eps, given, activation, residual, running, mask, False)[0]


def compose(
    x: Tensor,
    pooling: Pooling,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    given: tuple[Tensor, Tensor] | None,
    activation: str | None,
    residual: Tensor | None,
    running: Running | None,
    mask: Tensor | None,
) -> Tensor:
    """The formula in differentiable operations, laid out as torch's result would be."""
    # Exported graphs are read by other tools, and must not depend on sizes.
    in_graph = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if (
        given is None
        and mask is None
        and ((in_graph and library.serves(x)) or (is_observed(x, weight, bias, residual) and not kernels.OFF))
    ):
        y, moments = library.normalize(x, pooling, weight, bias, eps, activation, residual)
        move_running(running, moments, pooling, x)
        return y
    if given is None and running is None and mask is None and transforms.serves(x):
        return transforms.normalize(x, pooling, weight, bias, eps, activation, residual)
    if x.dtype is torch.float64 and torch.is_grad_enabled() and not in_graph and x.is_inference():
        x = x.clone()  # A narrower one is made wide, which is a copy.
    known = None if given is None else read_running(*given, pooling, pooling.open(x))
    y, moments = plain.compose(x, pooling, weight, bias, eps, known, activation, residual, mask)
    if get_dynamic_layer_stack_depth() == 0:  # inside vmap a tensor cannot tell its layout
        y = plain.lay_out(y, plain.find_memory_format(x))
    move_running(running, moments, pooling, x)
    return y
