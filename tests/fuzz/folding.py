"""Networks whose norms are folded, accelerated or frozen compute what they did: in both precisions, for other sizes."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import anynorm
from anynorm.surgery.fold.norms import is_any_norm
from fuzz.webs import Web, build, make_input

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}  # of the largest output
DONE: Counter[Any] = Counter()


def check_fold(web: Web) -> None:
    """fold, with and without an example, before and after accelerate, in both precisions."""
    model = build(web)
    check_freeze(copy.deepcopy(model).double(), web)
    norms = [name for name, module in model.named_modules() if is_any_norm(module)]
    for dtype, is_ours, has_example in ((torch.float64, False, True), (torch.float32, True, False)):
        before = copy.deepcopy(model).to(dtype)
        if is_ours:
            before = anynorm.accelerate(before, fuse=web.seed % 3 == 0).model
            check_same(run(before, web, dtype), run(copy.deepcopy(model).to(dtype), web, dtype), dtype, "accelerated")
        after = copy.deepcopy(before)
        report = anynorm.fold(after, example=make_input(web).to(dtype) if has_example else None)
        told = Counter(entry.name for entry in (*report.changed, *report.left))
        if told != Counter(norms):
            raise AssertionError(f"the report tells of {dict(told)}, and the norms are {norms}")
        check_same(run(after, web, dtype), run(before, web, dtype), dtype, f"folded, {report}")
        check_alone(after, report)
        DONE["norms"] += len(norms)
        DONE["folded", has_example] += len(report.changed)
    DONE["networks"] += 1


def check_freeze(model: nn.Module, web: Web) -> None:
    """Frozen it computes in training what it did in evaluation, nothing moves, and it comes back as it was."""
    want, state = run(model, web, torch.float64), {name: t.clone() for name, t in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    report = anynorm.freeze(model)
    if report.left:
        raise AssertionError(f"left unfrozen: {report}")
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    check_same(run(model, web, torch.float64), want, torch.float64, "frozen")
    if not all(torch.equal(t, state[name]) for name, t in model.state_dict().items()):
        raise AssertionError("something moved in a frozen model")
    anynorm.unfreeze(model)
    if {name: type(module) for name, module in model.named_modules()} != kinds:
        raise AssertionError("unfrozen, a class is not as it was")
    DONE["frozen"] += len(report.changed)


def run(model: nn.Module, web: Web, dtype: torch.dtype) -> list[Tensor]:
    """Outputs for the input that the network was built for, and for more samples and positions where it takes them."""
    found = []
    with torch.no_grad():
        for extra in (0, 1):
            try:
                found.append(model(make_input(web, extra).to(dtype)))
            except (RuntimeError, ValueError):
                if not extra:
                    raise
    return found


def check_same(got: list[Tensor], want: list[Tensor], dtype: torch.dtype, what: str) -> None:
    if len(got) != len(want):
        raise AssertionError(f"{what}: it runs with sizes with which it did not, or no more with others")
    for one, other in zip(got, want, strict=True):
        scale, error = float(other.abs().max()), float((one - other).abs().max())
        if one.shape != other.shape or not error <= TOLERANCES[dtype] * scale:
            raise AssertionError(f"{what}: off by {error:.3g}, where values are up to {scale:.3g}")


def check_alone(model: nn.Module, report: anynorm.SurgeryReport) -> None:
    """Nothing of this library is left, or the report says so."""
    ours = [name for name, module in model.named_modules() if "anynorm" in type(module).__module__]
    if ours and "still holds" not in report.note:
        raise AssertionError(f"{ours} are classes of anynorm's, and the report does not say so")
