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
from torch._C import _dispatch_keys
from torch._C._functorch import get_dynamic_layer_stack_depth, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack, _len_torch_function_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from . import kernels, library, plain
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


# Dispatch keys of an ordinary tensor on the CPU, outside and inside inference mode. All else has others: other devices
# and layouts, subclasses, nested tensors, signs, conjugation or zeros that are only noted, tensors under a transform.
with torch.inference_mode():
    PLAIN_KEYS = {_dispatch_keys(torch.empty(0, device="cpu")).raw_repr()}
PLAIN_KEYS.add(_dispatch_keys(torch.empty(0, device="cpu")).raw_repr())


def is_watched() -> bool:
    """Whether something follows the operations: tracing, a transform, a mode, forward-mode derivatives."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or get_dynamic_layer_stack_depth()
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack()
        or (_len_torch_function_stack() and not only_default_device())
    )


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing watches the operations and every tensor lies in memory as it reads.

    The kernels take addresses, so this is an allow-list: what is not known to be harmless is refused.
    """
    if is_watched():
        return False
    return all(
        t is None or ((type(t) is Tensor or type(t) is Parameter) and _dispatch_keys(t).raw_repr() in PLAIN_KEYS)
        for t in tensors
    )


# What was checked before, by all that the checks look at, and how it is served.
RECIPES: dict[tuple[Any, ...], tuple[Pooling, kernels.Plan]] = {}
RECIPES_KEPT = 4096


def find_key(function: str, options: tuple[Any, ...], x: Tensor, *others: Tensor | None) -> tuple[Any, ...] | None:
    """All that a function's checks look at, where kernels may serve; else None.

    A call whose key is in `RECIPES` needs no checks: the same ones have passed.
    """
    if is_watched():
        return None
    key: list[Any] = [function, options]
    for t in (x, *others):
        if t is None:
            key.append(None)
            continue
        kind = type(t)
        if (kind is not Tensor and kind is not Parameter) or _dispatch_keys(t).raw_repr() not in PLAIN_KEYS:
            return None
        key.append(t.shape)
        key.append(t.dtype)
    key.append(x.stride())
    return tuple(key)


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
        key: from `find_key`, to remember that the checks have passed.

    Returns:
        y with the shape and dtype of x, channels_last where x is.
    """
    if not is_plain(x, weight, bias, residual, *(given or ()), *(running or ())[:2]):
        return compose(x, pooling, weight, bias, eps, given, activation, residual, running)
    arranged = kernels.arrange(x)
    if key is not None and arranged is not x:
        key = None
    x = arranged
    walk = kernels.find_walk(x, pooling, 0 if given is None else 1)
    if walk is None and (activation is not None or residual is not None or x.numel() == 0):
        return compose(x, pooling, weight, bias, eps, given, activation, residual, running)
    if walk is None:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
            return NormalizeByBlocks.apply(x, weight, bias, pooling, eps, given, running)
        return forward_by_blocks(x, pooling, weight, bias, eps, given, running)[0]
    if key is not None:
        if len(RECIPES) >= RECIPES_KEPT:
            RECIPES.clear()
        RECIPES[key] = pooling, walk
    return run((pooling, walk), x, weight, bias, eps, given, activation, residual, running)


def run(
    recipe: tuple[Pooling, kernels.Plan],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    given: tuple[Tensor, Tensor] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    running: Running | None = None,
) -> Tensor:
    """By the kernels, with autograd where a gradient is wanted; everything was checked."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return apply(x, weight, bias, residual, recipe, eps, given, activation, running)
    return forward_walk(recipe, x, weight, bias, eps, given, activation, residual, running, False)[0]


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
    # Exported graphs are read by other tools, and must not depend on sizes.
    if given is None and torch.compiler.is_compiling() and not torch.compiler.is_exporting() and library.serves(x):
        y, moments = library.normalize(x, pooling, weight, bias, eps, activation, residual)
        move_running(running, moments, pooling, x)
        return y
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
    recipe: tuple[Pooling, kernels.Plan],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    given: tuple[Tensor, Tensor] | None,
    activation: str | None,
    residual: Tensor | None,
    running: Running | None,
    keep: bool,
) -> tuple[Tensor, kernels.Statistics | None]:
    """By the kernels; and mean and m2, or the given mean and variance, where they are to be kept."""
    pooling, walk = recipe
    moved: Any = None
    statistics: kernels.Statistics | None = None
    if given is not None:
        statistics = mean, var = kernels.ready_statistics(given, walk, x)
        if keep and mean is given[0]:  # What is kept for backward must not change when the buffers do.
            statistics = mean.clone(), var.clone()
    else:
        if running is not None and kernels.can_move(walk, x, *running):
            moved = running
        if keep or (running is not None and moved is None):
            statistics = kernels.make_statistics(walk)
    y = kernels.forward(x, walk, weight, bias, eps, statistics, activation, residual, moved)
    if moved is not None:
        increment_version(moved)
    elif running is not None and isinstance(statistics, Tensor):
        move_running(running, kernels.open_statistics(statistics, walk), pooling, x)
    return y, statistics


def increment_version(running: Running) -> None:
    """Let autograd hear of buffers that were written through their addresses."""
    if not running[0].is_inference():
        torch._C._increment_version(running[:2])


class Normalize(torch.autograd.Function):
    """By the kernels. Keeps x, the statistics and, behind an activation, beta and the residual, and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, recipe: Any, eps: float, *rest: Any
    ) -> Tensor:
        given, activation, running = rest
        y, statistics = forward_walk(recipe, x, weight, bias, eps, given, activation, residual, running, True)
        known = statistics if type(statistics) is tuple else (statistics,)
        if activation is None:  # Beta may change before backward, as in torch, and the residual need not be kept.
            ctx.save_for_backward(x, weight, *known)
        else:
            ctx.save_for_backward(x, weight, *known, bias, residual)
        ctx.how = recipe, eps, activation, given is not None, None if bias is None else (bias.shape, bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        recipe, eps, activation, is_given, bias_like = ctx.how
        x, weight, statistics, *kept = ctx.saved_tensors
        if is_given:
            statistics = statistics, kept.pop(0)
        bias, residual = kept or (None, None)
        if torch.is_grad_enabled() or not is_plain(g) or is_legacy_batchedtensor(g):
            given = statistics if is_given else None
            return backward_differentiable(ctx, recipe[0], g, (x, weight, bias, residual), given)
        needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        dresidual = None
        if needs_residual and activation is None:
            dresidual, needs_residual = g, False
        needs = needs_x, needs_weight, needs_bias, needs_residual
        dx, dweight, dbias, found = kernels.backward(
            g, x, recipe[1], weight, bias, statistics, eps, needs, activation, residual
        )
        if dweight is not None:
            dweight = like(dweight, weight.shape, weight.dtype)
        if dbias is not None:
            dbias = like(dbias, *bias_like)
        return dx, dweight, dbias, dresidual if found is None else found, None, None, None, None, None


# What Normalize.apply does once it has found that no transform is active, which `find_key` and `is_plain` know.
apply = super(torch.autograd.Function, Normalize).apply


class NormalizeByBlocks(torch.autograd.Function):
    """In torch operations, block by block. Keeps x and the statistics and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, pooling: Pooling, eps: float, *rest: Any) -> Tensor:
        given, running = rest
        y, moments = forward_by_blocks(x, pooling, weight, bias, eps, given, running)
        ctx.save_for_backward(x, weight, moments.mean, moments.m2)
        bias_like = None if bias is None else (bias.shape, bias.dtype)
        ctx.how = pooling, eps, None, given is not None, bias_like, moments.count
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight, mean, m2 = ctx.saved_tensors
        pooling, eps, _, is_given, bias_like, count = ctx.how
        if torch.is_grad_enabled() or not is_plain(g) or is_legacy_batchedtensor(g):
            given = (mean, m2) if is_given else None
            dx, dweight, dbias, *_ = backward_differentiable(ctx, pooling, g, (x, weight, None), given)
            return dx, dweight, dbias, None, None, None, None
        moments = Moments(count, mean, m2)
        needs = ctx.needs_input_grad[:3]
        dx, dgamma, dbeta = plain.backward(g, x, pooling, weight, moments, eps, given=is_given, needs=needs)
        dweight = like(dgamma, weight.shape, weight.dtype) if needs[1] and dgamma is not None else None
        dbias = like(dbeta, *bias_like) if needs[2] and dbeta is not None else None
        return dx, dweight, dbias, None, None, None, None


def like(t: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A parameter's gradient, shaped and typed as the parameter."""
    t = t if t.shape == shape else t.reshape(shape)
    return t if t.dtype is dtype else t.to(dtype)


def backward_differentiable(
    ctx: Any, pooling: Pooling, g: Tensor, inputs: tuple[Tensor | None, ...], given: tuple[Tensor, Tensor] | None
) -> tuple[Any, ...]:
    """The gradients as a graph of their own, for ``create_graph=True``, and for batched gradients.

    Args:
        inputs: x, gamma, beta and maybe a residual; what was not kept is None.
    """
    _, eps, activation, _, bias_like, *_ = ctx.how
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views cut the outer graph off: where gamma depends on x (or x on gamma) that path is autograd's to count, and
        # hooks on the saved tensors must not run here.
        x, weight, bias, *more = (t if t is None else t.view_as(t) for t in inputs)
        if bias is None and bias_like is not None:
            bias = torch.zeros(bias_like[0], dtype=bias_like[1], requires_grad=True)
        residual = more[0] if more else None
        assert x is not None
        known = None if given is None else read_running(*given, pooling, pooling.open(x))
        y, _ = plain.compose(x, pooling, weight, bias, eps, known, activation, residual)
    leaves = (x, weight, bias, residual)[: len(inputs)]
    needed = ctx.needs_input_grad[: len(inputs)]
    wanted = [t for t, need in zip(leaves, needed, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=create_graph) if wanted else ())
    gradients = [next(found) if need and t is not None else None for t, need in zip(leaves, needed, strict=True)]
    if more and needed[3] and residual is None:  # without an activation it was not kept, and its gradient is y's
        gradients[3] = g
    return (*gradients, None, None, None, None, None)
