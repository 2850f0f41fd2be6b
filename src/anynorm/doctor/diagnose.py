"""`diagnose`: what is wrong with the norms of a model, measured, and how it is mended."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn as nn

from ..errors import UserError
from ..randomness import restore_randomness, save_randomness
from ..surgery.operation import NotProved, Snapshot, check_model
from ..surgery.recalibration.norms import is_lazy
from ..surgery.report import SurgeryReport
from ..version import __version__
from .check import NEEDS, SEVERITIES, Check, Effect, Finding, find_checks
from .facts import Facts
from .inputs import Inputs
from .passes import keeping_modes, run_pass

SCHEMA = 1  # of `Diagnosis.to_dict`: a number more with every change that a reader must know of
WORSE = 1.02  # a repair may raise the loss by no more
CLOSE = 1e-4  # of the largest output: an exact repair moves no more


@dataclass
class Diagnosis:
    """What was found in a model.

    Attributes:
        findings: errors first, then warnings, then notes; within these by place in the model.
        layers: every norm's name and class, in the order of the model.
        checked: ids of the checks that ran.
        skipped: those that did not, by id, with the reason.
        measured: loss, accuracy and number of batches in both modes, where there were data.
    """

    findings: list[Finding]
    layers: dict[str, str]
    checked: list[str]
    skipped: dict[str, str]
    measured: dict[str, float | int | str] = field(default_factory=dict)

    @property
    def is_healthy(self) -> bool:
        """Whether there is neither an error nor a warning."""
        return all(finding.severity == "note" for finding in self.findings)

    def apply(self) -> list[Finding]:
        """Perform the repairs, errors first, each only if its finding is still there; and prove each.

        Returns:
            Those whose repair was performed; one that could not be proved is left, and the model is as before it.
        """
        done = []
        for finding in self.findings:
            if finding.repair is not None:
                try:
                    finding.effects = finding.apply()
                except NotProved:
                    continue
                done.append(finding)
        return done

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON; ``schema`` counts its versions."""
        return {
            "schema": SCHEMA,
            "anynorm": __version__,
            "torch": torch.__version__,
            "healthy": self.is_healthy,
            "layers": self.layers,
            "measured": self.measured,
            "findings": [
                {
                    **{
                        k: getattr(f, k)
                        for k in ("check", "title", "severity", "layer", "message", "evidence", "advice")
                    },
                    "repair": None if f.repair is None else {"code": f.repair.code, "exact": f.repair.is_exact},
                    "effects": [vars(effect) for effect in f.effects],
                }
                for f in self.findings
            ],
            "checked": self.checked,
            "skipped": self.skipped,
        }

    def to_json(self) -> str:
        """The same as text; NaN and infinities as strings, since JSON has none."""
        return json.dumps(make_finite(self.to_dict()), indent=2, allow_nan=False)

    def __str__(self) -> str:
        counts = Counter(finding.severity for finding in self.findings)
        said = ", ".join(f"{counts[each]} {each}{'s' * (counts[each] != 1)}" for each in SEVERITIES)
        lines = [f"{len(self.layers)} norms, {len(self.checked)} checks: {said}"]
        groups: dict[tuple[str, str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.severity, finding.check, finding.title), []).append(finding)
        for (severity, check, title), found in groups.items():
            places = f" ({len(found)} norms)" if len(found) > 1 else ""
            lines.append(f"{severity}: {title}{places} [{check}]")
            lines += [f"  {found[0].message}", f"  -> {found[0].advice}"]
            lines += [f"  {effect}" for effect in found[0].effects]
            if (repair := found[0].repair) is not None:
                lines += [f"  | {line}" for line in repair.code.splitlines()]
        return "\n".join(lines)


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
    with keeping_everything(given):
        facts = Facts(given)
        return examine(facts, chosen)


def examine(facts: Facts, chosen: Iterable[Check]) -> Diagnosis:
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
    return Diagnosis(findings, layers, checked, skipped, describe_measured(facts))


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


def repair(inputs: Inputs, finding: Finding) -> list[Effect]:
    """Perform a finding's repair and prove it, or put everything back; see `Finding.apply`."""
    assert finding.repair is not None
    check = find_checks()[finding.check]
    model = inputs.inside
    before, report = measure(inputs), SurgeryReport(model=model)
    snapshot, groups = Snapshot(model, values=True), copy_optimizer(inputs.optimizer)
    try:
        finding.repair.perform()
        after = measure(inputs)
        with keeping_everything(inputs):
            again = [each for each in check.run(Facts(inputs)) if each.layer == finding.layer]
        if again:
            raise NotProved(f"apply: a repair must remove what was found; {again[0].message} is still so", report)
        if finding.repair.is_exact and before["outputs"] is not None:
            off = compare(before["outputs"], after["outputs"])
            if off > CLOSE:
                raise NotProved(f"apply: it may not move outputs in evaluation; they moved by {off:.1g}", report)
        old, new = before["loss"], after["loss"]
        is_known = old is not None and new is not None and old == old and not finding.repair.needs_training
        if is_known and not new <= max(WORSE * old, old + 1e-3):
            raise NotProved(f"apply: a repair may not raise the loss in evaluation; {old:.4g} became {new:.4g}", report)
    except BaseException:
        snapshot.restore()
        restore_optimizer(inputs.optimizer, groups)
        raise
    found = list(finding.effects)
    for name, better in (("loss", "lower"), ("accuracy", "higher")):
        if before[name] is not None and after[name] is not None:
            found = [each for each in found if each.measure != name]
            found.append(Effect(name, before[name], after[name], better))  # type: ignore[arg-type] # a literal
    return found


def measure(inputs: Inputs) -> dict[str, Any]:
    """Loss, accuracy and the first batch's output, in evaluation."""
    with keeping_everything(inputs):
        found = run_pass(inputs, training=False, records=False)
    first = found.scores[0].output if found.scores else None
    return {"loss": found.loss, "accuracy": found.accuracy, "outputs": first}


def compare(one: torch.Tensor, other: torch.Tensor | None) -> float:
    """The largest difference as a share of the largest value."""
    if other is None or one.shape != other.shape:
        return float("inf")
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))


@contextmanager
def keeping_everything(inputs: Inputs) -> Iterator[None]:
    """Model and random generators are afterwards as before, also what a forward of the user's has changed."""
    states, snapshot = save_randomness(), Snapshot(inputs.inside, values=True)
    try:
        with keeping_modes(inputs.inside):
            yield
    finally:
        snapshot.restore()
        restore_randomness(states)


def copy_optimizer(optimizer: Any) -> Any:
    """An optimizer's groups and state, to put back."""
    if optimizer is None:
        return None
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    return groups, {parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()}


def restore_optimizer(optimizer: Any, kept: Any) -> None:
    """Put back what `copy_optimizer` returned."""
    if optimizer is not None:
        groups, state = kept
        optimizer.param_groups[:] = groups
        optimizer.state.clear()
        optimizer.state.update(state)


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


def make_finite(value: Any) -> Any:
    """Values with NaN and infinities as strings."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    if isinstance(value, Mapping):
        return {key: make_finite(each) for key, each in value.items()}
    return [make_finite(each) for each in value] if isinstance(value, (list, tuple)) else value
