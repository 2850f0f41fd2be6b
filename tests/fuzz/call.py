"""What the library answers to a case, forward and backward, and what is true."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import anynorm
from fuzz.cases import HALF, RUNNING, Case, find_mask
from fuzz.families import normal
from fuzz.layouts import draw
from fuzz.oracle import Bounded, Question, answer

Inputs = dict[str, Tensor | None]


def make_inputs(case: Case) -> Inputs:
    """x, gradient, parameters, buffers, residual and mask; padding holds NaN where it must not matter."""
    rng = np.random.default_rng(case.seed + 1)
    features = case.shape[-case.size :] if case.norm in ("layer", "rms") else case.shape[1:2]
    dtype = torch.float32 if case.wide else case.dtype
    tensors: Inputs = {
        "x": draw(case.data, case.seed, case.shape, case.dtype, case.layout),
        "g": draw(case.gradient, case.seed + 2, case.shape, case.dtype, case.layout if case.seed % 2 else ""),
        "residual": draw(normal, case.seed + 3, case.shape, case.dtype) if case.residual else None,
        "mask": find_mask(case),
        **dict.fromkeys(("weight", "bias", "mean", "var")),
    }
    if case.affine != "none":
        tensors["weight"] = torch.from_numpy(1 + case.spread * rng.standard_normal(features)).to(dtype)
    if case.affine == "both" and case.norm != "rms":
        tensors["bias"] = torch.from_numpy(case.spread * rng.standard_normal(features)).to(dtype)
    if case.norm in RUNNING:
        tensors["mean"] = torch.from_numpy(rng.standard_normal(features)).to(dtype)
        tensors["var"] = torch.from_numpy(rng.random(features) + 0.5).to(dtype)
    if tensors["mask"] is not None:
        padding = ~open_mask(case, tensors["mask"]).expand(case.shape)
        if case.layout != "expanded":
            tensors["x"][padding] = float("nan")
        if case.residual:
            tensors["residual"][padding] = float("nan")
    return tensors


def open_mask(case: Case, mask: Tensor) -> Tensor:
    """With size 1 where x has channels or features."""
    if case.norm in ("layer", "rms"):
        return mask.view(*mask.shape, *[1] * case.size)
    return mask.unsqueeze(1)


def find_function(case: Case, t: Inputs, buffers: list[Any]) -> Callable[..., Tensor]:
    """The norm as a function of x, weight, bias and residual."""
    functions, more = anynorm.functional, {"activation": case.activation, "mask": t["mask"]}

    def call(x: Tensor, weight: Any, bias: Any, residual: Any) -> Tensor:
        options = {"residual": residual, **more}
        if case.norm in ("layer", "rms"):
            given = (weight, bias) if case.norm == "layer" else (weight,)
            function = functions.layer_norm if case.norm == "layer" else functions.rms_norm
            return function(x, case.shape[-case.size :], *given, case.eps, **options)
        if case.norm == "group":
            return functions.group_norm(x, case.size, weight, bias, case.eps, **options)
        if case.norm == "ghost":
            options["ghost_size"] = case.size
        name = {"ghost": "ghost_batch_norm", "renorm": "batch_renorm"}.get(case.norm, f"{case.norm}_norm")
        how = weight, bias, not case.given, case.momentum, case.eps
        return getattr(functions, name)(x, *buffers, *how, **options)

    return call


class Watch(TorchDispatchMode):
    """Sees every operation, as torch's counters and loggers do, and changes nothing."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return function(*arguments, **(options or {}))


@contextmanager
def along(path: str) -> Iterator[None]:
    """Have the kernels serve, as an operation where a mode watches, or the formula as without compiled kernels."""
    from anynorm.engine import kernels, paths

    if path == "kernels":
        yield
    elif path == "watched":
        with Watch():
            yield
    else:
        paths.PLANS.clear()
        with mock.patch.object(kernels, "find_plan", return_value=None):
            yield


def call(case: Case, tensors: Inputs | None = None) -> dict[str, Tensor]:
    """y, the gradients of all that takes one, and the averages behind."""
    t = tensors or make_inputs(case)
    buffers = [None if t[name] is None else t[name].clone() for name in ("mean", "var")]
    leaves = {name: t[name] for name in ("x", "weight", "bias", "residual")}
    leaves = {name: None if leaf is None else leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with along(case.path):
            y = find_function(case, t, buffers)(**leaves)
            wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
            gradients = torch.autograd.grad(y, list(wanted.values()), t["g"])
    finally:
        torch.set_num_threads(threads)
    found = {"y": y.detach(), **{f"d{name}": g for name, g in zip(wanted, gradients)}}
    if buffers[0] is not None:
        found |= {"running_mean": buffers[0], "running_var": buffers[1]}
    return found


def find_truth(case: Case, t: Inputs) -> dict[str, Bounded]:
    """What `call` should give, and within what."""
    view, axes, features = list(case.shape), case.axes, [1] * len(case.shape)
    for axis in range(len(case.shape) - case.size, len(case.shape)) if case.norm in ("layer", "rms") else (1,):
        features[axis] = case.shape[axis]
    if case.norm == "group":
        view[1:2] = features[1:2] = [case.size, case.shape[1] // case.size]
        axes = tuple(range(2, len(view)))

    def wide(name: str, shape: list[int], default: float = 0.0) -> np.ndarray:
        return np.full([1] * len(shape), default) if t[name] is None else t[name].double().numpy().reshape(shape)

    counted = np.ones([1] * len(view), dtype=bool)
    if t["mask"] is not None:
        counted = open_mask(case, t["mask"]).expand(case.shape).numpy().reshape(view)
    counted = np.broadcast_to(counted, view)
    averages = tuple(np.broadcast_to(wide(name, features), features) for name in ("mean", "var"))
    gamma = np.broadcast_to(wide("weight", features, 1.0), features)
    beta, residual = np.broadcast_to(wide("bias", features), features), np.where(counted, wide("residual", view), 0)
    q = Question(
        np.where(counted, wide("x", view), 0), wide("g", view), axes, gamma, beta, residual, counted, case.eps,
        tolerance=find_tolerance(case),
        narrow=case.dtype != torch.float64,
        centred=case.norm != "rms",
        activation=case.activation,
        given=averages if case.given else None,
        averages=averages if case.norm == "renorm" and not case.given else None,
        limits=(3.0, 5.0),
        sums=4e-8 if case.path == "kernels" else 1e-6,  # the formula sums in the precision of x
    )  # fmt: skip
    if case.given or case.norm not in RUNNING:
        return join([answer(q)])
    return join([move(case, part, averages) for part in cut(case, q)])


def find_tolerance(case: Case) -> float:
    """What is promised. Off the kernels sums of float64 are torch's: 1.04e-13 was found for 5,000 equal values."""
    if case.dtype != torch.float64:
        return 1e-6
    return 2e-13 if case.path == "plain" else 1e-13


def cut(case: Case, q: Question) -> list[Question]:
    """One question, or one for each ghost; a last one of a single value joins the one before."""
    n = case.shape[0]
    starts = list(range(0, n, case.size)) if case.norm == "ghost" else [0]
    if len(starts) > 1 and (n - starts[-1]) * prod(case.shape[2:]) == 1:
        starts.pop()
    names, ends = ("x", "g", "residual", "counted"), [*starts[1:], n]
    return [
        replace(q, **{name: getattr(q, name)[a:b] for name in names if len(getattr(q, name)) > 1})
        for a, b in zip(starts, ends)
    ]


def move(case: Case, q: Question, averages: Any) -> dict[str, Bounded]:
    """The answer, with what the averages move by."""
    found = answer(q)
    count = np.sum(q.counted, axis=q.axes, keepdims=True)
    for name in ("mean", "var"):
        value, off = found.pop(name)
        if case.norm == "instance":  # over the samples of which something counts
            n = np.maximum((count > 0).sum(0, keepdims=True), 1)
            value, off = (np.where(count > 0, t, 0).sum(0, keepdims=True) / n for t in (value, off))
        found[f"new_{name}"] = np.broadcast_to(value, averages[0].shape), np.broadcast_to(off, averages[0].shape)
    found["counts"] = np.array(count.sum() > 0), np.array(0)
    return found


def join(parts: list[dict[str, Bounded]]) -> dict[str, Bounded]:
    """Ghosts side by side, gradients of parameters summed, averages moved by one after the other."""
    found = {}
    for name in ("y", "dx", "dresidual"):
        found[name] = tuple(np.concatenate([part[name][i] for part in parts]) for i in (0, 1))
    for name, told in (("dgamma", "dweight"), ("dbeta", "dbias")):
        found[told] = tuple(sum(part[name][i] for part in parts) for i in (0, 1))
    return found | {"parts": parts}


def follow(case: Case, old: np.ndarray, name: str, parts: list[dict[str, Bounded]]) -> Bounded:
    """A running average behind all parts, each of which may round it."""
    value, off, m = old, 0 * old, case.momentum
    rounding = 1e-13 if case.dtype == torch.float64 else 1e-6
    if case.dtype in HALF and not case.wide and len(parts) > 1:
        rounding = torch.finfo(case.dtype).eps
    for part in parts:
        if part["counts"][0]:
            new, new_off = (t.reshape(old.shape) for t in part[f"new_{name}"])
            off = (1 - m) * off + m * new_off + rounding * np.abs(value)
            value = (1 - m) * value + m * new
    return value, off


def compare(got: Tensor, true: np.ndarray, off: np.ndarray, what: str) -> None:
    """|got - true| <= off and one rounding to the dtype; beyond its range Inf is right, or NaN, a sum of such."""
    info = torch.finfo(got.dtype)
    rounding = info.eps * (1 if got.dtype in HALF else 0.5)
    value = got.detach().double().numpy().reshape(true.shape)
    off = off + rounding * np.abs(true) + 2 * info.smallest_normal * info.eps
    beyond = (np.abs(true) + off > info.max) & (np.abs(value) >= info.max * (1 - 1e-6))
    beyond &= (value * true > 0) | (off > info.max)
    beyond |= (np.abs(true) - off > info.max) & np.isnan(value)
    error = np.where(beyond, 0, np.abs(value - true))
    wrong = ~(error <= off)
    if wrong.any():
        worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error - off)), error.shape)
        worst = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{what}{list(worst)} is {value[worst]:.9g}, true {true[worst]:.9g}: off by {error[worst]:.3g}, "
            f"allowed {off[worst]:.3g}; wrong in {wrong.sum()} of {wrong.size}"
        )


def check_values(case: Case) -> None:
    """Everything that the call gives, against the formula in float64."""
    t = make_inputs(case)
    truth, got = find_truth(case, t), call(case, t)
    parts = truth.pop("parts")
    for name, value in got.items():
        if name.startswith("running"):
            old = t[name[8:]].double().numpy()
            true = (old, 0 * old) if case.given else follow(case, old, name[8:], parts)
        else:
            true = truth[name]
        compare(value, *true, f"{case.norm}: {name}")
