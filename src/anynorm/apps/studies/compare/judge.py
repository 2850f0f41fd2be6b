"""What the finished runs of a study say, and the recommendation that they support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..intervals import Interval, compare_pair, find_interval
from .plan import Cell, Find, Plan
from .train import parse_batch

# A rate works where its short run reaches this share of the best validation accuracy of any norm.
WORKING_SHARE = 0.75
# A difference of less, in points, is no reason to prefer a norm.
NEGLIGIBLE = 1.0
# A leader has learned something where its interval lies above guessing by this many standard errors of the test set.
ABOVE_GUESSING = 3.0


class Findings:
    """What the finished runs of a study say; accuracies are in percent, differences in points.

    Args:
        plan: what was asked.
        find: gives the record of a run, or None while it is unfinished.
        sizes: numbers of training, validation and test samples.
        guessing: test accuracy, in percent, of always answering with the most frequent class.
    """

    def __init__(self, plan: Plan, find: Find, sizes: Sequence[int], guessing: float = 0.0) -> None:
        self.plan, self.find, self.guessing = plan, find, guessing
        _, self.validation_samples, self.test_samples = sizes
        self.rates: dict[Cell, float | None] = {cell: plan.find_rate(cell, find) for cell in plan.cells}
        self.finals: dict[Cell, dict[int, dict[str, Any]]] = {}
        self.failures: dict[Cell, str] = {}
        for cell, rate in self.rates.items():
            runs = [] if rate is None else [plan.final_run(cell, rate, seed) for seed in range(plan.seeds)]
            found = {run.seed: record for run in runs if (record := find(run)) is not None}
            self.finals[cell] = {seed: r for seed, r in found.items() if r["status"] != "failed"}
            reasons = [r["reason"] for r in [*found.values(), *self.searched(cell)] if r["status"] == "failed"]
            if reasons:
                self.failures[cell] = reasons[0]

    def searched(self, cell: Cell) -> list[dict[str, Any]]:
        """Finished records of the first look at a cell's rates, smallest rate first."""
        if not self.plan.rungs(cell[1]):
            return []
        runs = self.plan.search_runs(cell, 0, self.find) or []
        records = [record for run in runs if (record := self.find(run)) is not None]
        return sorted(records, key=lambda record: record["rate"])

    def values(self, cell: Cell, name: str = "test_accuracy") -> dict[int, float]:
        """A number of the final runs in percent, by seed."""
        return {seed: 100 * record[name] for seed, record in self.finals.get(cell, {}).items()}

    def interval(self, cell: Cell) -> Interval | None:
        """Test accuracy of a cell in percent."""
        return find_interval(list(self.values(cell).values()))

    def compare(self, first: Cell, second: Cell) -> Interval | None:
        """Test accuracy of the first cell less that of the second, in points."""
        return compare_pair(self.values(first), self.values(second), self.test_samples)

    def has_learned(self, cell: Cell) -> bool:
        """Whether a cell's accuracy is clearly better than guessing; a single seed is judged nowhere."""
        interval, share = self.interval(cell), self.guessing / 100
        error = 100 * (share * (1 - share) / self.test_samples) ** 0.5
        return interval is None or interval.low is None or interval.low > self.guessing + ABOVE_GUESSING * error

    def norms(self, model: str, batch: str) -> list[str]:
        """Norms with at least one final run here."""
        return [norm for norm in self.plan.norms if self.finals.get((model, batch, norm))]

    def working_rates(self, cell: Cell) -> tuple[list[float], list[float]] | None:
        """(rates that work, rates tried) in the first look; None while it is unfinished."""
        model, batch, _ = cell
        best = max(
            (
                record.get("validation_accuracy") or 0.0
                for norm in self.plan.norms
                for record in self.searched((model, batch, norm))
            ),
            default=0.0,
        )
        records = self.searched(cell)
        if len(records) < len(self.plan.rates) or not records:
            return None
        least = WORKING_SHARE * best
        works = [
            r["rate"] for r in records if r["status"] == "finished" and (r.get("validation_accuracy") or 0.0) >= least
        ]
        return works, [r["rate"] for r in records]

    def batch_effect(self, model: str, norm: str) -> Interval | None:
        """Test accuracy at the smallest batch size less that at the largest, in points."""
        sizes = plain_sizes(self.plan)
        if len(sizes) < 2:
            return None
        return self.compare((model, sizes[-1], norm), (model, sizes[0], norm))

    def mode_effect(self, cell: Cell, measure: str = "accuracy") -> Interval | None:
        """Evaluation mode less training mode on the same validation images: points, or units of loss."""
        # Both modes see whole batches only.
        size = parse_batch(cell[1])[-1]
        samples = self.validation_samples // size * size
        scale, least = (100, 100 / max(samples, 1)) if measure == "accuracy" else (1, 0.0)
        differences = []
        for record in self.finals.get(cell, {}).values():
            modes = record.get("modes") or {}
            evaluation, training = modes.get(f"evaluation_{measure}"), modes.get(f"training_{measure}")
            if evaluation is not None and training is not None:
                differences.append(scale * (evaluation - training))
        return find_interval(differences, least)


def plain_sizes(plan: Plan) -> list[str]:
    """Batch sizes that are one number, largest first."""
    return sorted((batch for batch in plan.batches if ":" not in batch), key=lambda batch: -int(batch))


@dataclass(frozen=True)
class Choice:
    """The answer for one network at one batch size.

    `leader` has the best mean validation accuracy over the seeds that all norms here have; `differences` are the
    leader's test accuracies less the other norm's. Chosen on one set and judged on another, the leader is not
    flattered by the choice. `missing` norms have no full run yet, though they can exist here; `proven` norms are
    clearly better than none. `learned` says whether the leader is clearly better than guessing, `same` that all norms
    gave the same numbers.
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

    @property
    def judged(self) -> bool:
        """Whether every norm that can exist here was compared with a leader that learned, over two seeds or more."""
        return self.compared and self.learned and not self.same

    @property
    def compared(self) -> bool:
        """Whether every norm that can exist here has been compared with the leader over two seeds or more."""
        return not self.missing and bool(self.differences) and not self.with_verdict("not judged")

    def with_verdict(self, *verdicts: str) -> list[str]:
        """Norms whose difference to the leader has one of these verdicts."""
        return [norm for norm, interval in self.differences.items() if interval.verdict in verdicts]

    @property
    def equals(self) -> list[str]:
        """Norms that are not clearly worse than the leader."""
        return self.with_verdict("no clear difference", "lower")

    def find_answers(self, *, prove: bool) -> list[str]:
        """Norms that may answer: the leader, and those not clearly worse and less than NEGLIGIBLE points behind it.

        No clear difference alone may only mean that the interval is wide. None is no answer where a norm is proven;
        with `prove` proven norms alone answer where there are any, if need be one that is further behind.
        """
        near = [self.leader, *(norm for norm in self.equals if self.differences[norm].mean < NEGLIGIBLE)]
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
    validation = {norm: findings.values(cell, "validation_accuracy") for norm, cell in cells.items()}
    leader = max(cells, key=lambda norm: fmean(validation[norm][seed] for seed in common))
    differences = {}
    for norm, cell in cells.items():
        interval = findings.compare(cells[leader], cell)
        if norm != leader and interval is not None:
            differences[norm] = interval
    possible = [norm for norm in findings.plan.norms if (model, batch, norm) in findings.rates]
    missing = [norm for norm in possible if norm not in cells and (model, batch, norm) not in findings.failures]
    gains = {norm: findings.compare(cell, cells["none"]) for norm, cell in cells.items() if "none" in cells}
    proven = [norm for norm, gain in gains.items() if gain is not None and gain.verdict == "higher"]
    tests = [findings.values(cell) for cell in cells.values()]
    same = len(cells) > 1 and all(found == some[0] for some in (tests, [*validation.values()]) for found in some)
    return Choice(
        model, batch, leader, differences, len(common), tuple(missing), tuple(proven),
        findings.has_learned(cells[leader]), same,
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
