"""Checks a network on one batch with every norm before time is spent on it."""

from __future__ import annotations

import torch
from torch import nn

from anynorm.errors import UserError

from ..models import BUILT_IN, NotBuilt, NotForThisData, build
from ..norms import NORMS, CannotNormalize
from ..task import Task, check_functions, check_optimizer
from ..user_code import describe
from .plan import Cell, Plan
from .train import parse_batch


def find_impossible(plan: Plan, task: Task) -> dict[Cell, str]:
    """Cells that cannot exist with their reasons; a network that cannot run with any norm raises a UserError."""
    reasons: dict[Cell, str] = {}
    for model in plan.models:
        faults: dict[Cell, str] = {}
        use = Use()
        for norm in plan.norms:
            for batch, fault in try_norm(plan, task, model, norm, use).items():
                faults[model, batch, norm] = fault
        if model not in BUILT_IN:
            # With no norm at all only the network itself can be at fault.
            plain = try_norm(plan, task, model, "none", use)
            if plain:
                raise UserError(
                    f"compare --model: {model!r} {next(iter(plain.values()))}; try it on one batch by hand."
                )
            check_use(model, use, len(plan.norms))
        reasons |= faults
    return reasons


class Use:
    """What networks did with `norm`: how many modules it made, and how many of those a forward pass ran."""

    def __init__(self) -> None:
        self.made: int = 0
        self.run: int = 0

    def watch(self, module: nn.Module) -> nn.Module:
        """Count a module that was made, and its calls."""
        self.made += 1
        module.register_forward_hook(self.count)
        return module

    def __deepcopy__(self, memo: object) -> Use:
        """Itself: a network of copies, as nn.TransformerEncoder makes of a layer, runs what norm returned."""
        return self

    def count(self, *_: object) -> None:
        """Count a call."""
        self.run += 1


def check_use(model: str, use: Use, norms: int) -> None:
    """Raise where a network is the same under every norm: a leader among equals would be a lie."""
    if norms < 2 or use.run:
        return
    what = "never calls norm" if not use.made else "calls norm, but its network never runs what norm returned"
    raise UserError(
        f"compare --model: {model!r} {what}, so every norm would train the same network; put norm(num_features, dims) "
        "where the network normalizes."
    )


def try_norm(plan: Plan, task: Task, model: str, norm: str, use: Use) -> dict[str, str]:
    """What goes wrong, by batch size, when the network is built with a norm and trained on one batch's forward pass."""
    faults = {}
    for batch in plan.batches:
        fault = None
        for size in parse_batch(batch):
            fault = fault or try_batch(task, model, norm, size, use)
        if fault:
            faults[batch] = fault
    return faults


def try_batch(task: Task, model: str, norm: str, size: int, use: Use) -> str | None:
    """Why this network cannot take a batch of this size; None where it can."""
    asked: list[int] = []

    def factory(num_features: int, dims: int) -> nn.Module:
        asked.append(dims)
        return use.watch(NORMS[norm](num_features, dims))

    example, data = task.example(size), task.data
    if model in BUILT_IN and (data.holds_tokens or data.lengths):
        what = "token ids" if data.holds_tokens else "padded sequences with lengths"
        return f"{what} need a network of your own (--model module:factory); the {model} takes samples of numbers"
    torch.manual_seed(0)
    try:
        network = build(model, factory, data.sample_shape, data.classes, task.example()).train()
        if norm == "batch" and size == 1 and 0 in asked:
            return (
                "batch norm on a dense layer has one value in each group at batch 1, "
                "and one value minus its own mean is always 0"
            )
        output = network(*example)
    except (CannotNormalize, NotForThisData) as problem:
        return str(problem)
    except NotBuilt as problem:
        return f"cannot be built with norm {norm} ({problem}){suggest_tokens(task, problem)}"
    # The network and its factory may be the user's, which may raise anything.
    except Exception as problem:
        return (
            f"fails on a batch of shape {tuple(example[0].shape)} with norm {norm} ({describe(problem)})"
            f"{suggest_tokens(task, problem)}"
        )
    fault = find_output_fault(task, output, size)
    if fault is None:
        check_functions(task, output, task.part("train")[1][:size])
        check_optimizer(task, network.parameters())
    return fault


def suggest_tokens(task: Task, problem: Exception) -> str:
    """A hint where an embedding was given numbers."""
    return "; give --tokens, if x holds token ids" if "'indices'" in str(problem) and not task.data.holds_tokens else ""


def find_output_fault(task: Task, output: object, size: int) -> str | None:
    """Why outputs of this kind cannot be trained or judged; None where they can."""
    shape, wanted = tuple(getattr(output, "shape", ())), (size, task.data.classes)
    if not isinstance(output, torch.Tensor):
        return f"gives a {type(output).__name__} where one tensor of outputs is needed"
    own = task.loss and task.metric
    if shape == wanted or (own and shape[:1] == (size,)) or (task.data.kind == "values" and (*shape, 1) == wanted):
        return None
    return f"gives outputs of shape {shape} for a batch of {size} where the {task.data.kind} need {wanted}"
