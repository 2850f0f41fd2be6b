"""How gradients flow, and which path serves a tensor.

Three paths, in order of preference:

- block by block on the CPU, for plain eager tensors (`is_plain`): compiled, or `plain` where there is no kernel;
- torch's own operation, on other devices and in exported graphs, where torch has it (`prefers_torch`);
- `plain.compose`, the formula in differentiable operations, for everything else.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_dynamic_layer_stack_depth, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack, _len_torch_function_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from . import kernels, plain
from .pooling import Pooling
from .statistics import Moments


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


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing watches the operations: no tracing, no transform, no mode, no subclass, no dual number."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if get_dynamic_layer_stack_depth() or forward_ad._current_level >= 0:
        return False
    if _len_torch_dispatch_stack() or (_len_torch_function_stack() and not only_default_device()):
        return False
    return all(
        t is None or (type(t) in (Tensor, Parameter) and t.device.type == "cpu" and t.layout == torch.strided)
        for t in tensors
    )


def describe_environment() -> dict[str, str]:
    """Versions, and which path serves plain CPU tensors; what `anynorm env` prints."""
    return {
        "anynorm": version("anynorm"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        **kernels.describe(),
    }


def only_default_device() -> bool:
    """Whether the function modes in force merely choose where new tensors live, as torch.set_default_device does."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def has_memory(*tensors: Tensor) -> bool:
    """Whether addresses can be compared: ordinary tensors, outside compilers and transforms."""
    if torch.compiler.is_compiling() or get_dynamic_layer_stack_depth():
        return False
    return all(type(t) in (Tensor, Parameter) and t.layout == torch.strided and not t.is_meta for t in tensors)


def normalize(
    x: Tensor,
    pooling: Pooling,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    given: Moments | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """The formula on whichever path serves x.

    Args:
        x: any shape that `pooling` was found for; floating point.
        weight, bias: gamma and beta, flat or shaped as their axes.
        eps: in units of x squared.
        given: statistics to use as constants; None takes them from x.
        activation: a name in `activations.ACTIVATIONS`, applied last.
        residual: shape and dtype of x, added before the activation.

    Returns:
        y with the shape and dtype of x, channels_last where x is, and the moments it used.
    """
    fused = activation is not None or residual is not None
    if fused or not is_plain(x, weight, bias) or x.numel() == 0:
        y, moments = plain.compose(x, pooling, weight, bias, eps, given, activation, residual)
        if get_dynamic_layer_stack_depth() == 0:  # inside vmap a tensor cannot tell its layout
            y = y.contiguous(memory_format=plain.find_memory_format(x))
        return y, moments
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        if given is not None:  # What is saved for backward must not change when the buffers do.
            given = given.clone()
        y, mean, m2 = Normalize.apply(x, weight, bias, pooling, eps, given)
        return y, Moments(pooling.count(pooling.open(x)), mean, m2)
    if given is not None:
        return kernels.forward_given(x, pooling, weight, bias, eps, given), given
    return kernels.forward(x, pooling, weight, bias, eps)


class Normalize(torch.autograd.Function):
    """Keeps x and the statistics for backward; a second derivative goes through `plain.compose`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        pooling: Pooling,
        eps: float,
        given: Moments | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        if given is None:
            y, moments = kernels.forward(x, pooling, weight, bias, eps)
        else:
            y, moments = kernels.forward_given(x, pooling, weight, bias, eps, given), given
        ctx.save_for_backward(x, weight, moments.mean, moments.m2)
        # Of beta only the shape is needed, so that changing it before backward is no error, as in torch.
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.pooling, ctx.eps, ctx.count, ctx.given = pooling, eps, moments.count, given is not None
        ctx.mark_non_differentiable(*(t for t in (moments.mean, moments.m2) if t is not None))
        return y, moments.mean, moments.m2

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
        x, weight, mean, m2 = ctx.saved_tensors
        moments = Moments(ctx.count, mean, m2)
        if torch.is_grad_enabled() or not is_plain(g) or is_legacy_batchedtensor(g):
            return (*Normalize.backward_differentiable(ctx, g, x, weight, moments), None, None, None)
        dx, dgamma, dbeta = kernels.backward(
            g, x, ctx.pooling, weight, moments, ctx.eps, given=ctx.given, needs=ctx.needs_input_grad
        )
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dweight = dgamma.reshape(weight.shape).to(weight.dtype) if needs_weight and dgamma is not None else None
        dbias = dbeta.reshape(ctx.bias[0]).to(ctx.bias[1]) if needs_bias and dbeta is not None else None
        return dx, dweight, dbias, None, None, None

    @staticmethod
    def backward_differentiable(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, moments: Moments
    ) -> list[Tensor | None]:
        """The gradients as a graph of their own, for ``create_graph=True``, and for batched gradients."""
        create_graph = torch.is_grad_enabled()
        bias = None if ctx.bias is None else torch.zeros(ctx.bias[0], dtype=ctx.bias[1], requires_grad=True)
        with torch.enable_grad():
            # Views cut the outer graph off: where gamma depends on x (or x on gamma) that path is autograd's to count,
            # and hooks on the saved tensors must not run here.
            x, weight = x.view_as(x), weight if weight is None else weight.view_as(weight)
            y, _ = plain.compose(x, ctx.pooling, weight, bias, ctx.eps, moments if ctx.given else None)
        needed = ctx.needs_input_grad[:3]
        wanted = [t for t, need in zip((x, weight, bias), needed, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(y, wanted, g, create_graph=create_graph))
        return [next(found) if need else None for need in needed]
