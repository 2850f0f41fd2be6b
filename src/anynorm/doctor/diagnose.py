"""`diagnose`: what is wrong with the norms of a model, measured, and how it is mended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn as nn

from ..errors import UserError
from ..randomness import restore_randomness, save_randomness
from ..surgery.operation import NotProved, check_model
from ..surgery.recalibration.norms import is_lazy
from .call import in_one_line
from .check import NEEDS, SEVERITIES, Check, Finding, find_checks
from .diagnosis import Diagnosis, Repairs
from .facts import Facts
from .inputs import Inputs
from .proof import keeping_everything, repair


def diagnose(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    batches: int = 16,
    checks: Iterable[str] | None = None,
) -> Diagnosis:
    """Look for what is wrong with the norms of a model, name the layer, measure the effect, and offer a repair.

    Args:
        model: any module. It is left exactly as it was: mode, parameters, buffers, hooks, random state.
        loader: batches as the model is trained with; with a second element, the targets, losses are measured. What an
            iterator gives is gone.
        optimizer: the training's, whose groups and counts are looked at.
        loss_fn: of (outputs, targets), the mean over a batch. Without it cross entropy where outputs are scores of
            classes, or the ``loss`` of the outputs.
        forward_fn: called as ``forward_fn(model, batch)``, returns the outputs; else the model is called as by
            `anynorm.recalibrate`.
        batches: the most to take from the loader; they are kept in memory.
        checks: ids of checks to run; None for all that these arguments allow.

    Returns:
        A `Diagnosis`; printed, it says what was found. ``finding.apply()`` performs a repair and proves it.

    Raises:
        TypeError: `model` is not a module, `loader` cannot be iterated, or another argument is of no use.
        ValueError: an unknown check; a loader that gives nothing; a lazy module that has seen no input.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8, momentum=0.99))
        >>> print(anynorm.diagnose(model, checks=["momentum-inverted"]))
        1 norms, 1 checks: 1 error, 0 warnings, 0 notes
        error: momentum has the meaning of another framework [momentum-inverted]
          1 (BatchNorm1d): momentum 0.99 gives the newest batch 99 % of the running averages
          -> in torch momentum is the share of the new batch: 0.01 is what Keras and Flax call 0.99
          | model.get_submodule('1').momentum = 0.01
        >>> model[1].momentum
        0.99
    """
    check_model("diagnose", model)
    chosen = choose_checks(checks)
    check_arguments(model, loader, optimizer, {"loss_fn": loss_fn, "forward_fn": forward_fn})
    given = Inputs(model, take(loader, batches), loader, optimizer, loss_fn, forward_fn)
    return look(given, chosen)


def examine(facts: Facts, chosen: Sequence[Check]) -> Diagnosis:
    """Run checks on what is known of a model."""
    findings: list[Finding] = []
    checked, skipped = [], {}
    has = {"model": True, "optimizer": facts.inputs.optimizer is not None, "data": facts.has_data}
    for check in chosen:
        if not has[check.needs]:
            skipped[check.id] = f"it needs {'the optimizer' if check.needs == 'optimizer' else 'a loader'}"
            continue
        findings += check.run(facts)
        checked.append(check.id)
    order = {norm.name: place for place, norm in enumerate(facts.norms)}
    findings.sort(key=lambda f: (SEVERITIES.index(f.severity), order.get(f.layer, len(order))))
    for finding in findings:
        finding.apply_to = lambda finding: repair(facts.inputs, finding)
    layers = {norm.name: type(norm.module).__name__ for norm in facts.norms}
    perform = partial(perform_repairs, facts.inputs, chosen)
    return Diagnosis(findings, layers, checked, skipped, describe_measured(facts), perform)


def describe_measured(facts: Facts) -> dict[str, float | int | str]:
    """Losses and accuracies of the passes that checks have asked for."""
    found: dict[str, float | int | str] = {}
    if facts.has_data:
        found["batches"] = len(facts.inputs.batches)
        for mode in ("evaluation", "training"):
            if mode in vars(facts):
                run = getattr(facts, mode)
                each = {"loss": run.loss, "accuracy": run.accuracy, "problem": run.problem or None}
                found |= {f"{mode} {name}": value for name, value in each.items() if value is not None}
    return found


def take(loader: Any, most: int) -> list[Any]:
    """Up to so many batches; the loader's draws from random generators are undone."""
    if loader is None:
        return []
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(
            f"diagnose: loader must give batches one by one; got {type(loader).__name__}; pass a DataLoader, or a list"
        )
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise UserError(f"diagnose: batches must be a whole number of 1 or more; got {most!r}; 16 is the default")
    states = save_randomness()
    try:
        found = list(islice(loader, most))
    finally:
        restore_randomness(states)
    if not found:
        raise UserError("diagnose: the loader must give at least 1 batch; got none; is it an iterator at its end?")
    return found


def check_arguments(model: nn.Module, loader: Any, optimizer: Any, functions: Mapping[str, Any]) -> None:
    """Refuse what cannot be used."""
    if optimizer is not None and not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")):
        raise TypeError(
            f"diagnose: optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}; pass the "
            "training's, or leave it out"
        )
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(
                f"diagnose: {name} must be a function; got {type(function).__name__}; see help(anynorm.diagnose)"
            )
    lazy = [name for name, module in model.named_modules() if is_lazy(module)]
    if lazy and loader is not None:
        raise UserError(
            f"diagnose: lazy modules must have seen an input; got {lazy[0] or 'the model'}, which has not; run one "
            "batch first, or leave loader out"
        )


def choose_checks(wanted: Iterable[str] | None) -> list[Check]:
    """Checks by id, those that need least first."""
    known = find_checks()
    if wanted is not None:
        if not isinstance(wanted, Iterable):
            raise TypeError(
                f"diagnose: checks must be ids of checks; got {type(wanted).__name__}; anynorm doctor --list shows them"
            )
        wanted = [wanted] if isinstance(wanted, str) else list(wanted)
        for name in wanted:
            if name not in known:
                raise UserError(f"diagnose: checks must be known; got {name!r}; anynorm doctor --list shows them")
    chosen = [known[name] for name in (known if wanted is None else dict.fromkeys(wanted))]
    return sorted(chosen, key=lambda check: NEEDS.index(check.needs))


def look(inputs: Inputs, checks: Sequence[Check]) -> Diagnosis:
    """What checks find in the model as it is now, on the same batches; without those, where it refuses them."""
    with keeping_everything(inputs):
        facts = Facts(inputs)
        needing = [check for check in checks if check.needs == "data"] if facts.has_data else []
        if not needing or not facts.evaluation.problem:
            return examine(facts, checks)
        diagnosis = examine(facts, [check for check in checks if check not in needing])
        diagnosis.skipped |= {check.id: "the model refuses a batch" for check in needing}
        return diagnosis


def perform_repairs(inputs: Inputs, checks: Sequence[Check], diagnosis: Diagnosis) -> Repairs:
    """Perform every repair whose finding is still there when its turn comes; errors come first.

    Repairs act on modules that an earlier one may have replaced, and use numbers that it may have changed: after each,
    a check is asked again.
    """
    repairs = Repairs()
    seen: dict[str, Diagnosis] = {}  # by check, since the last repair
    for finding in diagnosis.findings:
        if finding.repair is None:
            continue
        now: Finding | None = finding
        if repairs.done:
            if finding.check not in seen:
                seen[finding.check] = look(inputs, [find_checks()[finding.check]])
            now = next((each for each in seen[finding.check].findings if each.layer == finding.layer), None)
        if now is None:
            repairs.gone.append(finding)
            continue
        try:
            finding.effects = now.apply()
        except NotProved as problem:
            repairs.refused.append((finding, str(problem).removeprefix("apply: ")))
        except Exception as problem:  # of the user's model, or of an operation that refuses it; all is as before
            repairs.refused.append((finding, in_one_line(problem)))
        else:
            repairs.done.append(finding)
            seen.clear()
    repairs.remaining = look(inputs, checks) if repairs.done else diagnosis
    return repairs
