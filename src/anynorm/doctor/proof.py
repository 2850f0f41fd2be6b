"""A repair performed and proved: what was found is gone, nothing else is worse; or everything is as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from ..randomness import restore_randomness, save_randomness
from ..surgery.differences import measure
from ..surgery.operation import NotProved, Snapshot
from ..surgery.report import SurgeryReport
from .check import Effect, Finding, find_checks
from .facts import Facts
from .inputs import Inputs
from .passes import keeping_modes, run_pass

WORSE = 1.02  # a repair may raise the loss by no more
FALLEN = 0.02  # nor lower the accuracy by more
CLOSE = 1e-4  # of the largest output: an exact repair moves no more
MEASURES: tuple[tuple[str, Literal["lower", "higher"]], ...] = (("loss", "lower"), ("accuracy", "higher"))


def repair(inputs: Inputs, finding: Finding) -> list[Effect]:
    """Perform a finding's repair and prove it, or put everything back; see `Finding.apply`."""
    assert finding.repair is not None
    check = find_checks()[finding.check]
    model = inputs.inside
    before, report = run(inputs), SurgeryReport(model=model)
    snapshot, groups = Snapshot(model, values=True), copy_optimizer(inputs.optimizer)
    try:
        finding.repair.perform()
        after = run(inputs)
        if after["problem"] and not before["problem"]:
            raise NotProved(f"apply: the model must take the batches as before; it raises {after['problem']}", report)
        with keeping_everything(inputs):
            again = [each for each in check.run(Facts(inputs)) if each.layer == finding.layer]
        if again:
            raise NotProved(f"apply: a repair must remove what was found; {again[0].message} is still so", report)
        if finding.repair.is_exact and before["outputs"] is not None:
            off = measure(before["outputs"], after["outputs"]).relative
            if not off <= CLOSE:
                raise NotProved(f"apply: it may not move outputs in evaluation; they moved by {off:.1g}", report)
        old, new = before["loss"], after["loss"]
        is_known = old is not None and new is not None and old == old and not finding.repair.needs_training
        if is_known and not new <= max(WORSE * old, old + 1e-3):
            raise NotProved(f"apply: a repair may not raise the loss in evaluation; {old:.4g} became {new:.4g}", report)
        one, other = before["accuracy"], after["accuracy"]
        if None not in (one, other) and not finding.repair.needs_training and other < one - FALLEN:
            raise NotProved(f"apply: a repair may not lower the accuracy; {one:.3g} became {other:.3g}", report)
    except BaseException:
        snapshot.restore()
        restore_optimizer(inputs.optimizer, groups)
        raise
    found = list(finding.effects)
    for name, better in MEASURES:
        if before[name] is not None and after[name] is not None:
            found = [each for each in found if each.measure != name]
            found.append(Effect(name, before[name], after[name], better))
    return found


def run(inputs: Inputs) -> dict[str, Any]:
    """Loss, accuracy and the first batch's output in evaluation, and what the model raises, "" for nothing."""
    with keeping_everything(inputs):
        found = run_pass(inputs, training=False, records=False)
    first = found.scores[0].output if found.scores else None
    return {"loss": found.loss, "accuracy": found.accuracy, "outputs": first, "problem": found.problem}


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
