"""Everything of a model, an optimizer and the random generators that `diagnose` must leave alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor


class State:
    """What is there now; `check` fails where something is not so any more."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.objects, self.values = look(model), copy_values(model)
        self.steps = None if optimizer is None else describe(optimizer.state_dict())
        self.groups = find_groups(optimizer)
        self.chance = find_chance()

    def check(self) -> None:
        """Compare with now."""
        assert look(self.model) == self.objects
        for name, now in copy_values(self.model).items():
            assert torch.equal(now.nan_to_num(12.5), self.values[name].nan_to_num(12.5)), name
        if self.optimizer is not None:
            assert describe(self.optimizer.state_dict()) == self.steps
            assert find_groups(self.optimizer) == self.groups
        assert find_chance() == self.chance


def find_groups(optimizer: torch.optim.Optimizer | None) -> list[list[int]]:
    """The identities of parameters, group by group."""
    return [] if optimizer is None else [list(map(id, group["params"])) for group in optimizer.param_groups]


def look(model: nn.Module) -> dict[str, Any]:
    """Classes, modes, attributes, parts and hooks of all modules, by identity."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = (id(module), type(module), {key: mark(value) for key, value in vars(module).items()})
    for name, p in model.named_parameters(remove_duplicate=False):
        found[f"{name} as a parameter"] = (p.requires_grad, id(p.grad), p.dtype)
    return found


def mark(value: Any) -> Any:
    """What tells a value from another one."""
    if isinstance(value, dict):
        return [(key, id(each)) for key, each in value.items()]
    if isinstance(value, (bool, int, float, str, type(None))):
        return repr(value)
    return id(value)


def copy_values(model: nn.Module) -> dict[str, Tensor]:
    """Of parameters, gradients and buffers."""
    found = {}
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if not nn.parameter.is_lazy(t) and not t.is_meta:
            found[name] = t.detach().clone()
            if t.grad is not None:
                found[f"gradient of {name}"] = t.grad.clone()
    return found


def describe(value: Any) -> Any:
    """Nested values, with tensors as lists."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: describe(each) for key, each in value.items()}
    return [describe(each) for each in value] if isinstance(value, (list, tuple)) else value


def find_chance() -> Any:
    """The states of the random generators."""
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002 # the generator that may be moved
