"""What `diagnose` returns: what was found, and what became of its repairs; in words, and as plain values."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..version import __version__
from .check import SEVERITIES, Finding

SCHEMA = 1  # of `Diagnosis.to_dict`: a number more with every change that a reader must know of


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
    perform: Callable[[Diagnosis], Repairs] | None = field(default=None, repr=False, compare=False)

    @property
    def is_healthy(self) -> bool:
        """Whether there is neither an error nor a warning."""
        return all(finding.severity == "note" for finding in self.findings)

    def apply(self) -> Repairs:
        """Perform every repair whose finding is still there when its turn comes, errors first, and prove each.

        Returns:
            What became of each. Where one could not be proved, the model is as before it.
        """
        assert self.perform is not None
        return self.perform(self)

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


def make_finite(value: Any) -> Any:
    """Values with NaN and infinities as strings."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    if isinstance(value, Mapping):
        return {key: make_finite(each) for key, each in value.items()}
    return [make_finite(each) for each in value] if isinstance(value, (list, tuple)) else value
