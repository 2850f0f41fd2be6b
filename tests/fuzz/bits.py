"""What may not move a bit of a result: calling again, threads, padding, batch mates, constants; one check for each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from fused_specimens import apply_torch
from fuzz.call import call, find_function, make_inputs, open_mask
from fuzz.cases import Case
from fuzz.families import Array
from fuzz.layouts import draw, lay_out


def check_repeats(case: Case) -> None:
    """The first, the second and the third call, and one with another number of threads, give the same bits."""
    t = make_inputs(case)
    first = call(case, t)
    for told, other in (("second", case), ("third", case), ("another", replace(case, threads=3 - case.threads))):
        for name, value in call(other, t).items():
            check_same(first[name], value, f"{case.norm}: {name} of the first call and of {told}")


def check_same(a: Tensor, b: Tensor, what: str) -> None:
    """To the bit; NaN equals NaN."""
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    if differ.any():
        largest = (a.double() - b.double())[differ].abs().max()
        raise AssertionError(f"{what} differ in {int(differ.sum())} of {differ.numel()} places, by up to {largest:.3g}")


def check_padding(case: Case) -> None:
    """More padding behind moves no bit of y at a real position, nor of the running averages."""
    t = make_inputs(case)
    mask = t["mask"]
    extra = 1 + case.seed % 60
    axis = 2 if case.norm not in ("layer", "rms") else 1
    longer = {**t, "mask": pad(mask, axis - (axis == 2), extra, False)}
    for name in ("x", "g", "residual"):
        longer[name] = None if t[name] is None else lay_out(pad(t[name], axis, extra, float("nan")), case.layout)
    shape = list(case.shape)
    shape[axis] += extra
    short, long = run(case, t), run(replace(case, shape=tuple(shape)), longer)
    check_same(
        short["y"], long["y"].narrow(axis, 0, case.shape[axis]), f"{case.norm}: y, and y with {extra} more padding,"
    )
    for name in ("running_mean", "running_var"):
        if name in short:
            check_same(short[name], long[name], f"{case.norm}: {name}, and with {extra} more padding,")


def pad(t: Tensor, axis: int, extra: int, value: float) -> Tensor:
    shape = list(t.shape)
    shape[axis] = extra
    return torch.cat([t, t.new_full(shape, value)], axis)


def run(case: Case, t: dict) -> dict[str, Tensor]:
    """Forward alone."""
    buffers = [None if t[name] is None else t[name].clone() for name in ("mean", "var")]
    y = find_function(case, t, buffers)(t["x"], t["weight"], t["bias"], t["residual"])
    return {"y": y} | ({} if buffers[0] is None else {"running_mean": buffers[0], "running_var": buffers[1]})


def check_mates(case: Case) -> None:
    """Where a sample has statistics of its own, or given ones, no other sample moves a bit of its result."""
    t = make_inputs(case)
    one, i = call(case, t), case.seed % case.shape[0]
    others = {**t, "x": t["x"].clone(memory_format=torch.preserve_format)}
    rest = [j for j in range(case.shape[0]) if j != i]
    others["x"][rest] = draw(case.gradient, case.seed + 9, (len(rest), *case.shape[1:]), case.dtype)
    if t["mask"] is not None:
        others["mask"] = t["mask"].clone()
        others["mask"][rest] = torch.rand(others["mask"][rest].shape) < 0.5
        others["x"][~open_mask(case, others["mask"]).expand(case.shape)] = float("nan")
    two = call(case, others)
    for name in ("y", "dx", "dresidual"):
        if name in one:
            check_same(one[name][i], two[name][i], f"{case.norm}: {name} of sample {i} in other company")


def check_constant(case: Case) -> None:
    """A constant gives exactly beta, and the variance of a constant is 0."""
    t = make_inputs(replace(case, affine="both"))
    y = call(case, t)["y"]
    beta = torch.zeros(()) if t["bias"] is None else t["bias"]
    if case.norm not in ("layer", "rms"):
        beta = beta.view(-1, *[1] * (len(case.shape) - 2))
    want = beta.to(case.dtype).expand(case.shape)
    if t["mask"] is not None:
        want = torch.where(open_mask(case, t["mask"]), want, 0)
    check_same(y, want.to(y.dtype), f"{case.norm}: y of a constant, and beta,")


def check_fused(case: Case) -> None:
    """In evaluation fused is norm, then sum, then activation: NaN, Inf and -Inf stand in the same places."""
    t = make_inputs(case)
    t["x"] = draw(spoilt, case.seed, case.shape, case.dtype, case.layout)
    fused, bare = call(case, t), replace(case, activation=None, residual=False)
    x, residual = (None if t[name] is None else t[name].detach().requires_grad_() for name in ("x", "residual"))
    plain = {**t, "residual": None}
    y = find_function(bare, plain, [t["mean"], t["var"]])(x, t["weight"], t["bias"], None)
    y = y if residual is None else y + residual
    y = apply_torch(case.activation, y)
    leaves = [x] if residual is None else [x, residual]
    want = dict(zip(("y", "dx", "dresidual"), (y.detach(), *torch.autograd.grad(y, leaves, t["g"]))))
    for name, apart in want.items():
        kinds = [torch.where(v.isnan(), 2.0, v.isinf() * v.sign().nan_to_num()) for v in (apart, fused[name])]
        if not torch.equal(*kinds):
            at = tuple((kinds[0] != kinds[1]).nonzero()[0].tolist())
            raise AssertionError(
                f"{case.norm}: {name}{list(at)} is {fused[name][at]:g} fused, {apart[at]:g} apart; x is {t['x'][at]:g}"
            )


def spoilt(rng: Generator, shape: tuple[int, ...]) -> Array:
    """Ordinary numbers with Inf, -Inf and NaN among them."""
    values = rng.standard_normal(shape)
    for value in (np.inf, -np.inf, np.nan):
        values.flat[rng.integers(0, values.size, 1 + values.size // 50)] = value
    return values
