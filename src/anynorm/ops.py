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
from .sources import read_running, update_running
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
    """Whether nothing watches the operations and every tensor lies in memory as it reads.

    No tracing, no transform, no mode, no subclass, no dual number; strided, on the CPU, no sign or zeros that are only
    noted. The kernels take addresses, so what is not known to be harmless is refused here.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if get_dynamic_layer_stack_depth() or forward_ad._current_level >= 0:
        return False
    if _len_torch_dispatch_stack() or (_len_torch_function_stack() and not only_default_device()):
        return False
    for t in tensors:
        if t is None:
            continue
        if type(t) is not Tensor and type(t) is not Parameter:
            return False
        if not t.is_cpu or t.layout is not torch.strided or t.is_neg() or t._is_zerotensor():
            return False
    return True


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


Running = tuple[Tensor, Tensor, float | Tensor]  # running mean and variance, and the weight of the new value


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

    Returns:
        y with the shape and dtype of x, channels_last where x is.
    """
    if not is_plain(x, weight, bias, residual, *(given or ()), *(running or ())[:2]):
        return compose(x, pooling, weight, bias, eps, given, activation, residual, running)
    x = kernels.arrange(x)
    walk = kernels.find_walk(x, pooling, 0 if given is None else 1)
    if walk is None and (activation is not None or residual is not None or x.numel() == 0):
        return compose(x, pooling, weight, bias, eps, given, activation, residual, running)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
        function: Any = NormalizeByBlocks if walk is None else Normalize
        return function.apply(x, weight, bias, residual, pooling, walk, eps, given, activation, running)
    if walk is None:
        return forward_by_blocks(x, pooling, weight, bias, eps, given, running)[0]
    return forward_walk(x, pooling, walk, weight, bias, eps, given, activation, residual, running, False)[0]


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
) -> Tensor:
    """The formula in differentiable operations, laid out as torch's result would be."""
    known = None if given is None else read_running(*given, pooling, pooling.open(x))
    y, moments = plain.compose(x, pooling, weight, bias, eps, known, activation, residual)
    if get_dynamic_layer_stack_depth() == 0:  # inside vmap a tensor cannot tell its layout
        y = y.contiguous(memory_format=plain.find_memory_format(x))
    move_running(running, moments, pooling, x)
    return y


def move_running(running: Running | None, moments: Moments, pooling: Pooling, x: Tensor) -> None:
    """Move running averages by the moments of x, where there are any."""
    if running is not None and x.numel():
        mean, var, momentum = running
        update_running(mean, var, moments, pooling.samples, momentum)


def forward_by_blocks(
    x: Tensor,
    pooling: Pooling,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    given: tuple[Tensor, Tensor] | None,
    running: Running | None,
) -> tuple[Tensor, Moments]:
    """In torch operations, block by block, for what no kernel walks."""
    if given is not None:  # What is kept for backward must not change when the buffers do.
        known = read_running(*given, pooling, pooling.open(x)).clone()
        return plain.forward_given(x, pooling, weight, bias, eps, known), known
    y, moments = plain.forward(x, pooling, weight, bias, eps)
    move_running(running, moments, pooling, x)
    return y, moments


def forward_walk(
    x: Tensor,
    pooling: Pooling,
    walk: kernels.Plan,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    given: tuple[Tensor, Tensor] | None,
    activation: str | None,
    residual: Tensor | None,
    running: Running | None,
    keep: bool,
) -> tuple[Tensor, tuple[Tensor | None, Tensor] | None]:
    """By the kernels; and mean and m2, or the given mean and variance, where they are to be kept."""
    moved: Any = None
    statistics: tuple[Tensor | None, Tensor] | None
    if given is not None:
        statistics = kernels.ready_statistics(given, walk, x)
        if keep and statistics[0] is given[0]:  # What is kept for backward must not change when the buffers do.
            statistics = (given[0].clone(), given[1].clone())
    else:
        if running is not None and kernels.can_move(walk, x, *running):
            moved = running
        statistics = kernels.make_statistics(walk) if keep or (running is not None and moved is None) else None
    options: Any = {"statistics": statistics, "activation": activation, "residual": residual, "running": moved}
    y = kernels.forward(x, walk, weight, bias, eps, **options)
    if moved is not None:
        for buffer in moved[:2]:
            if not buffer.is_inference():  # written through its address, which autograd must hear of
                torch.autograd.graph.increment_version(buffer)
    elif running is not None and statistics is not None:
        mean, m2 = statistics
        move_running(running, Moments(walk.count, mean, m2), pooling, x)
    return y, statistics


class Normalize(torch.autograd.Function):
    """By the kernels. Keeps x, the statistics and, behind an activation, beta and the residual, and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, pooling: Any, walk: Any, *rest: Any) -> Tensor:
        eps, given, activation, running = rest
        y, statistics = forward_walk(
            x, pooling, walk, weight, bias, eps, given, activation, residual, running, True
        )
        # Without an activation beta may change before backward, as in torch, and the residual need not be kept.
        kept = (bias, residual) if activation is not None else (None, None)
        ctx.save_for_backward(x, weight, *kept, *statistics)
        ctx.how = pooling, walk, eps, activation, given is not None
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight, bias, residual, mean, m2 = ctx.saved_tensors
        pooling, walk, eps, activation, is_given = ctx.how
        if torch.is_grad_enabled() or not is_plain(g) or is_legacy_batchedtensor(g):
            given = (mean, m2) if is_given else None
            return backward_differentiable(ctx, g, x, weight, bias, residual, given)
        needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        dresidual = None
        if needs_residual and activation is None:
            dresidual, needs_residual = g, False
        needs = needs_x, needs_weight, needs_bias, needs_residual
        options: Any = {"activation": activation, "residual": residual, "needs": needs}
        dx, dweight, dbias, found = kernels.backward(g, x, walk, weight, bias, (mean, m2), eps, **options)
        if dweight is not None:
            dweight = like(dweight, weight.shape, weight.dtype)
        if dbias is not None:
            dbias = like(dbias, *ctx.bias)
        return dx, dweight, dbias, dresidual if found is None else found, None, None, None, None, None, None


class NormalizeByBlocks(torch.autograd.Function):
    """In torch operations, block by block. Keeps x and the statistics and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, _: None, pooling: Any, walk: None, *rest: Any) -> Tensor:
        eps, given, activation, running = rest
        y, moments = forward_by_blocks(x, pooling, weight, bias, eps, given, running)
        ctx.save_for_backward(x, weight, moments.mean, moments.m2)
        ctx.how = pooling, None, eps, activation, given is not None
        ctx.count = moments.count
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight, mean, m2 = ctx.saved_tensors
        pooling, _, eps, _, is_given = ctx.how
        if torch.is_grad_enabled() or not is_plain(g) or is_legacy_batchedtensor(g):
            return backward_differentiable(ctx, g, x, weight, None, None, (mean, m2) if is_given else None)
        moments = Moments(ctx.count, mean, m2)
        needs = ctx.needs_input_grad[:3]
        dx, dgamma, dbeta = plain.backward(g, x, pooling, weight, moments, eps, given=is_given, needs=needs)
        dweight = like(dgamma, weight.shape, weight.dtype) if needs[1] and dgamma is not None else None
        dbias = like(dbeta, *ctx.bias) if needs[2] and dbeta is not None else None
        return dx, dweight, dbias, None, None, None, None, None, None, None


def like(t: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A parameter's gradient, shaped and typed as the parameter."""
    t = t if t.shape == shape else t.reshape(shape)
    return t if t.dtype is dtype else t.to(dtype)


def backward_differentiable(
    ctx: Any,
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given: tuple[Tensor, Tensor] | None,
) -> tuple[Any, ...]:
    """The gradients as a graph of their own, for ``create_graph=True``, and for batched gradients."""
    pooling, _, eps, activation, _ = ctx.how
    create_graph = torch.is_grad_enabled()
    if bias is None and ctx.bias is not None:
        bias = torch.zeros(ctx.bias[0], dtype=ctx.bias[1], requires_grad=True)
    with torch.enable_grad():
        # Views cut the outer graph off: where gamma depends on x (or x on gamma) that path is autograd's to count, and
        # hooks on the saved tensors must not run here.
        x, weight, bias, residual = (t if t is None else t.view_as(t) for t in (x, weight, bias, residual))  # type: ignore[assignment]
        known = None if given is None else read_running(*given, pooling, pooling.open(x))
        y, _ = plain.compose(x, pooling, weight, bias, eps, known, activation, residual)
    needed = ctx.needs_input_grad[:4]
    inputs = (x, weight, bias, residual)
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=create_graph) if wanted else ())
    gradients = [next(found) if need and t is not None else None for t, need in zip(inputs, needed, strict=True)]
    if needed[3] and residual is None:  # without an activation it was not kept, and its gradient is y's
        gradients[3] = g
    return (*gradients, None, None, None, None, None, None)
