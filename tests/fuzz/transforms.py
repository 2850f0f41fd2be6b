"""torch.func and forward mode: what they compute beside the kernels agrees with the formula and with itself."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.func import jvp, vjp, vmap

from fuzz.call import compare, find_function, find_truth, make_inputs
from fuzz.cases import Case
from fuzz.layouts import draw


def check_transforms(case: Case) -> None:
    """vjp has the values of the oracle; <g, J v> = <J^T g, v>; vmap over three inputs is three calls."""
    t = make_inputs(case)
    if not case.given:
        t["mean"] = t["var"] = None
    names = [name for name in ("x", "weight", "bias", "residual") if t[name] is not None]
    function = find_function(case, t, [t["mean"], t["var"]])

    def f(*leaves: torch.Tensor) -> torch.Tensor:
        return function(**{**dict.fromkeys(("weight", "bias", "residual")), **dict(zip(names, leaves))})

    leaves = [t[name] for name in names]
    y, pull = vjp(f, *leaves)
    truth, found = find_truth(replace(case, path="watched"), t), pull(t["g"])
    for name, value in {"y": y, **{f"d{name}": v for name, v in zip(names, found)}}.items():
        compare(value, *truth[name], f"{case.norm}: {name} by vjp")
    if case.mask or case.dtype != torch.float64:
        return
    tangents = [draw(case.gradient, case.seed + i, tuple(v.shape), v.dtype) for i, v in enumerate(leaves)]
    _, pushed = jvp(f, tuple(leaves), tuple(tangents))
    terms = [pushed * t["g"], *[-a * b for a, b in zip(found, tangents)]]
    total, size = sum(v.sum() for v in terms), sum(v.abs().sum() for v in terms)
    if not abs(total) <= 1e-9 * size:
        raise AssertionError(f"{case.norm}: <g, Jv> - <J'g, v> is {total:.3g}, of terms that sum to {size:.3g}")


def check_vmap(case: Case) -> None:
    """Over three inputs it is three calls."""
    cases = [replace(case, seed=case.seed + i) for i in range(3)]
    inputs = [make_inputs(c) for c in cases]
    t = {**inputs[0], **({} if case.given else {"mean": None, "var": None})}
    function = find_function(case, t, [t["mean"], t["var"]])
    if t["residual"] is None:
        y = vmap(lambda x: function(x, t["weight"], t["bias"], None))(torch.stack([i["x"] for i in inputs]))
    else:
        both = [torch.stack([i[name] for i in inputs]) for name in ("x", "residual")]
        y = vmap(lambda x, residual: function(x, t["weight"], t["bias"], residual))(*both)
    for c, one, got in zip(cases, inputs, y):
        compare(got, *find_truth(c, {**t, "x": one["x"], "residual": one["residual"]})["y"], f"{case.norm}: y by vmap")
