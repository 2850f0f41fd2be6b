"""What `anynorm doctor --fix` does: one repair after the other, each proved, and what is left then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from anynorm.doctor.call import in_one_line
from anynorm.doctor.check import Check, Finding, find_checks
from anynorm.doctor.diagnose import Diagnosis, examine, keeping_everything
from anynorm.doctor.facts import Facts
from anynorm.doctor.inputs import Inputs
from anynorm.surgery.operation import NotProved


@dataclass
class Repairs:
    """What became of the findings that have a repair.

    Attributes:
        done: with what was measured before and after.
        refused: those that could not be proved, with the reason; the model is as it was before them.
        gone: those that an earlier repair removed, too.
        remaining: what all checks find now.
    """

    done: list[Finding] = field(default_factory=list)
    refused: list[tuple[Finding, str]] = field(default_factory=list)
    gone: list[Finding] = field(default_factory=list)
    remaining: Diagnosis | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "done": [name_place(each) for each in self.done],
            "refused": [{**name_place(each), "reason": reason} for each, reason in self.refused],
            "gone": [name_place(each) for each in self.gone],
            "remaining": [] if self.remaining is None else self.remaining.to_dict()["findings"],
        }


def name_place(finding: Finding) -> dict[str, str]:
    """Which finding it is."""
    return {"check": finding.check, "layer": finding.layer}


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


def perform_repairs(inputs: Inputs, diagnosis: Diagnosis, checks: Sequence[Check]) -> Repairs:
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
