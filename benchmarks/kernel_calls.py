"""The compiled kernels without module and autograd: into the same memory again and again, or into new memory.

A module's time is theirs, that of memory (new less same), and that of the call (the module less new). No product code
is timed here but the kernels: they are called by addresses, with what a module would give them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from anynorm.apps.timing.cases import Case, needs_grad
from anynorm.engine import addresses, kernels
from anynorm.engine.memory import ready
from anynorm.engine.walks import Plan, compiled
from anynorm.family import FAMILY
from anynorm.functional.rms import find_rms_eps

Compute = Callable[[], list[Tensor]]


def make_kernel_call(case: Case, mode: str, module: nn.Module, drawn: tuple[Tensor, Tensor]) -> KernelCall | None:
    """The kernels of a case in a mode; None where none serves it.

    Args:
        module: anynorm's layer, in training unless the mode is "evaluation"; its running averages move.
        drawn: input and gradient.
    """
    x, g = drawn
    given = case.norm == "batch" and mode == "evaluation"
    plan = kernels.find_plan(x, FAMILY[case.norm].pool(x, find_sizes(case)), int(given))
    return plan and KernelCall(plan, module, x, g if needs_grad(mode) else None)


def find_sizes(case: Case) -> tuple[tuple[str, Any], ...]:
    """The sizes that a pattern cannot say: features of layer and RMS norm, groups of group norm."""
    if case.norm in ("layer", "rms"):
        return (("d", case.arguments),)
    return (("g", case.arguments[0]),) if case.norm == "group" else ()


class KernelCall:
    """A forward pass, and the backward pass where there is a gradient; called, it makes new memory for its results."""

    def __init__(self, plan: Plan, module: Any, x: Tensor, g: Tensor | None) -> None:
        gamma, beta = ready("weight", module.weight, plan), ready("bias", getattr(module, "bias", None), plan)
        self.plan, self.x, self.g = plan, x, g
        self.parameters = [name for name, t in (("dgamma", gamma), ("dbeta", beta)) if t is not None]
        given, moved = find_running(module, plan)
        self.keeps = g is not None and not given
        # Tensors whose addresses are bound below must live as long as those.
        self.held = gamma, beta, getattr(module, "running_mean", None), getattr(module, "running_var", None), given
        common: dict[str, Any] = {"threads": torch.get_num_threads(), "eps": find_rms_eps(module.eps, x)}
        common |= {"x": x.data_ptr(), "gamma": addresses.address(gamma)}
        common |= {name: t.data_ptr() for name, t in given.items()}
        beta_address = addresses.address(beta)
        self.forward = partial(compiled.forward, plan.compiled, **common, **moved, beta=beta_address)
        self.backward = partial(compiled.backward, plan.compiled, **common, grad=addresses.address(g))

    def make_results(self) -> tuple[list[Tensor], dict[str, int], dict[str, int]]:
        """New memory for all that is computed, and where it is: arguments of forward and backward."""
        plan = self.plan
        y = torch.empty_like(self.x, memory_format=plan.memory_format)
        forward, backward = {"y": y.data_ptr()}, {}
        results = [y]
        if self.keeps:
            statistics = addresses.make_statistics(plan)
            start = statistics.data_ptr()
            backward = {"mean": start, "m2": start + 8 * plan.pools} if plan.centred else {"m2": start}
            forward |= backward
            results.append(statistics)
        if self.g is not None:
            dx = torch.empty_like(self.x, memory_format=plan.memory_format)
            gradients = [torch.empty(plan.channels, dtype=plan.parameter) for _ in self.parameters]
            backward["dx"] = dx.data_ptr()
            for name, t in zip(self.parameters, gradients, strict=True):
                backward[name] = t.data_ptr()
            results = [dx, *gradients, *results]
        return results, forward, backward

    def bind(self) -> Compute:
        """The same into memory that is made once."""
        results, forward, backward = self.make_results()
        calls = [partial(self.forward, **forward)]
        calls += [partial(self.backward, **backward)] if backward else []

        def run() -> list[Tensor]:
            for call in calls:
                call()
            return self.choose(results)

        return run

    def __call__(self) -> list[Tensor]:
        results, forward, backward = self.make_results()
        self.forward(**forward)
        if backward:
            self.backward(**backward)
        return self.choose(results)

    def choose(self, results: list[Tensor]) -> list[Tensor]:
        """What a module's call returns: y, or the gradients of x, gamma and beta."""
        return results[:1] if self.g is None else results[: 1 + len(self.parameters)]


def find_running(module: Any, plan: Plan) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Statistics that are given; and the running averages that the kernels move, by their addresses."""
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if mean is None:
        return {}, {}
    if plan.layout.statistics:
        return {"mean": ready("mean", mean, plan), "var": ready("variance", var, plan)}, {}
    if not module.training or not addresses.can_move(plan, mean, var, module.momentum):
        return {}, {}
    return {}, {"running_mean": mean.data_ptr(), "running_var": var.data_ptr(), "momentum": module.momentum}
