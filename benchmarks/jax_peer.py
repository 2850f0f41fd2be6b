"""The same norms in JAX: the formula as flax writes it, jitted, and with its gradients as one jitted program.

Statistics are float32 and in one pass, mean(x^2) - mean^2, which is flax's default and the faster of its two ways.
Arrays lie in memory as the torch tensors do: channels_last becomes an array whose last axis is the channel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from anynorm.apps.timing.cases import Case, needs_grad

os.environ.setdefault("NPROC", str(torch.get_num_threads()))  # the size of XLA's thread pools, read at the import

import jax
import jax.numpy as jnp

MOMENTUM = 0.1


def to_jax(tensor: Tensor, last: bool = False) -> Any:
    """A JAX array with the same values; in the order of memory where channels come last."""
    order = (0, *range(2, tensor.dim()), 1)
    tensor = (tensor.detach().permute(order) if last else tensor.detach()).contiguous()
    return jnp.asarray(tensor.float().numpy(), dtype=str(tensor.dtype).removeprefix("torch."))


def find_view(case: Case) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The shape to normalize in, the axes to pool, and the shape in which gamma meets it."""
    n, rest = case.shape[0], case.shape[1:]
    if case.norm in ("layer", "rms"):
        return case.shape, (len(case.shape) - 1,), case.shape[-1:]
    c, places = rest[0], rest[1:]
    pools = case.arguments[0] if case.norm == "group" else c
    split = (pools, c // pools) if case.norm == "group" else (c,)
    if case.channels_last:
        view, gamma = (n, *places, *split), split
        positions = tuple(range(1, 1 + len(places)))
        inner = (len(view) - 1,) if case.norm == "group" else ()
    else:
        view, gamma = (n, *split, *places), (*split, *(1 for _ in places))
        positions = tuple(range(1 + len(split), len(view)))
        inner = (2,) if case.norm == "group" else ()
    samples = (0,) if case.norm == "batch" else ()
    return view, (*samples, *inner, *positions), gamma


def make_formula(case: Case, mode: str, eps: float) -> Callable[..., Any]:
    """y and the new running averages from x, gamma, beta and the running averages."""
    view, axes, shape = find_view(case)
    given = mode == "evaluation" and case.norm == "batch"

    def formula(x: Any, gamma: Any, beta: Any, running: Any) -> Any:
        wide = x.reshape(view).astype(jnp.float32)
        if given:
            mean, var = (statistic.reshape(shape) for statistic in running)
        else:
            mean = 0.0 if case.norm == "rms" else wide.mean(axes, keepdims=True)
            var = jnp.maximum((wide * wide).mean(axes, keepdims=True) - mean * mean, 0.0)
        scale = jax.lax.rsqrt(var + eps) * gamma.reshape(shape).astype(jnp.float32)
        y = (wide - mean) * scale
        y = y if beta is None else y + beta.reshape(shape).astype(jnp.float32)
        if running is not None and not given:
            count = x.size / mean.size
            fresh = mean.reshape(-1), var.reshape(-1) * (count / (count - 1))
            running = tuple((1 - MOMENTUM) * old + MOMENTUM * new for old, new in zip(running, fresh, strict=True))
        return y.astype(x.dtype).reshape(x.shape), running

    return formula


def make_jax_call(case: Case, mode: str, x: Tensor, g: Tensor) -> Callable[[], Any]:
    """The call that is timed, until its results are there."""
    module = case.make(nn)
    eps = torch.finfo(case.dtype).eps if module.eps is None else module.eps
    formula = make_formula(case, mode, eps)  # type: ignore[arg-type]
    jx, jg = to_jax(x, case.channels_last), to_jax(g, case.channels_last)
    bias = getattr(module, "bias", None)
    gamma, beta = to_jax(module.weight), None if bias is None else to_jax(bias)  # type: ignore[arg-type]
    running = None
    if case.norm == "batch":
        running = tuple(to_jax(buffer.float()) for buffer in (module.running_mean, module.running_var))

    def both(x: Any, g: Any, gamma: Any, beta: Any, running: Any) -> Any:
        y, pull, running = jax.vjp(lambda *leaves: formula(*leaves, running), x, gamma, beta, has_aux=True)
        return pull(g), y, running

    if needs_grad(mode):
        step = jax.jit(both)
        return lambda: jax.block_until_ready(step(jx, jg, gamma, beta, running))
    forward = jax.jit(formula)
    return lambda: jax.block_until_ready(forward(jx, gamma, beta, running))


def read_result(case: Case, result: Any) -> list[Tensor]:
    """y, or dx and the gradients of gamma and beta, as torch tensors in torch's order of axes."""
    gradients = isinstance(result[0], tuple)
    first, *rest = (array for array in (result[0] if gradients else result[:1]) if array is not None)
    main = torch.from_numpy(np.asarray(first, dtype=np.float32).copy())
    if case.channels_last:
        main = main.movedim(-1, 1)
    return [main, *(torch.from_numpy(np.asarray(array, dtype=np.float32).copy()) for array in rest)]
