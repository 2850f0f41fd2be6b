"""The recommendation that the finished runs of a study support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ..intervals import Interval
from .findings import NEGLIGIBLE, Findings


@dataclass(frozen=True)
class Choice:
    """The answer for one network at one batch size.

    `leader` has the best mean validation score over the seeds that all norms here have; `differences` are the
    leader's gains in test score over the other norm. Chosen on one set and judged on another, the leader is not
    flattered by the choice. `missing` norms have no full run yet, though they can exist here; `proven` norms are
    clearly better than none. `learned` says whether the leader is clearly better than guessing, `same` that all norms
    gave the same numbers, and `negligible` which difference is no reason to prefer a norm.
    """

    model: str
    batch: str
    leader: str
    differences: dict[str, Interval]
    seeds: int
    missing: tuple[str, ...]
    proven: tuple[str, ...] = ()
    learned: bool = True
    same: bool = False
    negligible: float = NEGLIGIBLE

    @property
    def judged(self) -> bool:
        """Whether every norm that can exist here was compared with a leader that learned, over three seeds or more."""
        return self.compared and self.learned and not self.same

    @property
    def compared(self) -> bool:
        """Whether every norm that can exist here has been compared with the leader over three seeds or more."""
        return not self.missing and bool(self.differences) and not self.with_verdict("not judged")

    @property
    def clear(self) -> bool:
        """Whether a norm is clearly worse than the leader, or clearly better than none."""
        return bool(self.with_verdict("higher") or self.proven)

    def with_verdict(self, *verdicts: str) -> list[str]:
        """Norms whose difference to the leader has one of these verdicts."""
        return [norm for norm, interval in self.differences.items() if interval.verdict in verdicts]

    @property
    def equals(self) -> list[str]:
        """Norms that are not clearly worse than the leader."""
        return self.with_verdict("no clear difference", "lower")

    def find_answers(self, *, prove: bool) -> list[str]:
        """Norms that may answer: the leader, and those not clearly worse and less than `negligible` behind it.

        No clear difference alone may only mean that the interval is wide. None is no answer where a norm is proven;
        with `prove` proven norms alone answer where there are any, if need be one that is further behind.
        """
        near = [self.leader, *(norm for norm in self.equals if self.differences[norm].mean < self.negligible)]
        near = [norm for norm in near if norm != "none" or not self.proven]
        for norms in (near, self.equals) if prove else ():
            if found := [norm for norm in norms if norm in self.proven]:
                return found
        return near


def choose(findings: Findings, model: str, batch: str) -> Choice | None:
    """The leading norm of a network at a batch size and its differences to the others; None without final runs."""
    cells = {norm: (model, batch, norm) for norm in findings.norms(model, batch)}
    if not cells:
        return None
    common = set.intersection(*(set(findings.finals[cell]) for cell in cells.values()))
    if not common:
        return None
    validation = {norm: findings.values(cell, "validation_score") for norm, cell in cells.items()}
    best = max if findings.metric.higher else min
    leader = best(cells, key=lambda norm: fmean(validation[norm][seed] for seed in common))
    differences = {}
    for norm, cell in cells.items():
        interval = findings.compare(cells[leader], cell, len(cells))
        if norm != leader and interval is not None:
            differences[norm] = interval
    possible = [norm for norm in findings.plan.norms if (model, batch, norm) in findings.rates]
    missing = [norm for norm in possible if norm not in cells and (model, batch, norm) not in findings.failures]
    gains = {norm: findings.compare(cell, cells["none"], len(cells)) for norm, cell in cells.items() if "none" in cells}
    proven = [norm for norm, gain in gains.items() if gain is not None and gain.verdict == "higher"]
    tests = [findings.values(cell) for cell in cells.values()]
    same = len(cells) > 1 and all(found == some[0] for some in (tests, [*validation.values()]) for found in some)
    return Choice(
        model, batch, leader, differences, len(common), tuple(missing), tuple(proven),
        findings.has_learned(cells[leader]), same, findings.negligible(cells[leader]),
    )  # fmt: skip


def choose_all(findings: Findings) -> list[Choice]:
    """Choices for every network and batch size that has final runs."""
    plan = findings.plan
    pairs = [(model, batch) for model in plan.models for batch in plan.batches]
    return [choice for pair in pairs if (choice := choose(findings, *pair)) is not None]


def find_common(choices: Sequence[Choice]) -> list[str]:
    """Norms that lead or are not clearly worse in every one of these choices."""
    return sorted(set.intersection(*({choice.leader, *choice.equals} for choice in choices)))


def cover(choices: Sequence[Choice]) -> dict[str, list[str]]:
    """As few norms as possible for all these batch sizes: each norm with the batch sizes that it is the answer for.

    Where no leader is clearly better than none, a norm that is must answer.
    """
    prove = "none" in find_common(choices)
    open_batches = {choice.batch: choice.find_answers(prove=prove) for choice in choices}
    leaders = {choice.batch: choice.leader for choice in choices}
    answers: dict[str, list[str]] = {}
    while open_batches:
        # The norm that answers most; among equals the one that leads most often.
        norms = {
            norm: [b for b, fit in open_batches.items() if norm in fit] for fit in open_batches.values() for norm in fit
        }
        leads = {norm: sum(leaders[b] == norm for b in batches) for norm, batches in norms.items()}
        best = max(norms, key=lambda norm: (len(norms[norm]), leads[norm]))
        answers[best] = norms[best]
        for batch in norms[best]:
            del open_batches[batch]
    return answers
