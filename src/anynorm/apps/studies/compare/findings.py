"""What the finished runs of a study say: scores by cell and seed, and differences between cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..intervals import Interval, compare_pair, find_interval, share_confidence
from ..metrics import Metric
from .plan import Cell, Find, Plan
from .train import parse_batch

# A rate works where its short run gets this far on the way from guessing to the best validation score of any norm.
WORKING_SHARE = 0.75
# A difference of less is no reason to prefer a norm: in points, or as a share of the leader's score.
NEGLIGIBLE, NEGLIGIBLE_SHARE = 1.0, 0.01

ACCURACY = Metric()


class Findings:
    """What the finished runs of a study say; shares are in percent, and a positive difference is better.

    Args:
        plan: what was asked.
        find: gives the record of a run, or None while it is unfinished.
        sizes: numbers of training, validation and test samples.
        metric: by which runs are judged.
    """

    plan: Plan
    find: Find
    metric: Metric
    validation_samples: int
    test_samples: int

    def __init__(self, plan: Plan, find: Find, sizes: Sequence[int], metric: Metric = ACCURACY) -> None:
        self.plan, self.find, self.metric = plan, find, metric
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

    def values(self, cell: Cell, name: str = "test_score") -> dict[int, float]:
        """A score of the final runs as it is printed, by seed; one that is no number counts as the worst there is."""
        found = {seed: record[name] for seed, record in self.finals.get(cell, {}).items()}
        return {seed: self.worst if v is None else self.metric.scale * v for seed, v in found.items()}

    @property
    def worst(self) -> float:
        """The worst test score of any full run, or of guessing where that is worse."""
        scores = [r["test_score"] for found in self.finals.values() for r in found.values()]
        known = [self.metric.scale * score for score in scores if score is not None]
        known += [] if self.metric.guessing is None else [self.metric.guessing]
        return (min if self.metric.higher else max)(known, default=0.0)

    def diverged(self, cell: Cell) -> int:
        """How many full runs of a cell diverged; they count with what their networks score."""
        return sum(record["status"] == "diverged" for record in self.finals.get(cell, {}).values())

    def interval(self, cell: Cell) -> Interval | None:
        """Test score of a cell."""
        return find_interval(list(self.values(cell).values()))

    def compare(self, first: Cell, second: Cell, among: int = 2) -> Interval | None:
        """How much better the first cell's test score is than the second's, seed by seed.

        The intervals of all pairs of `among` cells hold together at 95 %, because the leader is one that these seeds
        favour: by itself each would find a difference in one of three comparisons of six equal norms.
        """
        better, worse = (first, second) if self.metric.higher else (second, first)
        confidence = share_confidence(among * (among - 1) // 2)
        step = self.metric.resolution(self.test_samples)
        return compare_pair(self.values(better), self.values(worse), step, confidence)

    def has_learned(self, cell: Cell) -> bool:
        """Whether a cell is clearly better than guessing; one seed, or a metric without guessing, is not judged."""
        interval, guessing = self.interval(cell), self.metric.guessing
        if interval is None or interval.low is None or interval.high is None or guessing is None:
            return True
        near = interval.low if self.metric.higher else interval.high
        return self.metric.gain(near, guessing) > self.metric.margin

    def negligible(self, cell: Cell) -> float:
        """A difference that is no reason to prefer another norm to this cell's."""
        interval = self.interval(cell)
        return NEGLIGIBLE if self.metric.percent or interval is None else NEGLIGIBLE_SHARE * abs(interval.mean)

    def norms(self, model: str, batch: str) -> list[str]:
        """Norms with at least one final run here."""
        return [norm for norm in self.plan.norms if self.finals.get((model, batch, norm))]

    def working_rates(self, cell: Cell) -> tuple[list[float], list[float]] | None:
        """(rates that work, rates tried) in the first look; None while it is unfinished."""
        model, batch, _ = cell
        records = self.searched(cell)
        if len(records) < len(self.plan.rates) or not records:
            return None
        others = [record for norm in self.plan.norms for record in self.searched((model, batch, norm))]
        best = max((self.find_reached(record) for record in others), default=-math.inf)
        least = WORKING_SHARE * best
        if best <= 0:
            # No norm does better than guessing; without guessing, scores where lower is better are below 0.
            least = math.inf if self.metric.guessing is not None else best / WORKING_SHARE
        works = [r["rate"] for r in records if r["status"] == "finished" and self.find_reached(r) >= least]
        return works, [record["rate"] for record in records]

    def find_reached(self, record: dict[str, Any]) -> float:
        """How much better than guessing, or than 0, a run's validation score is."""
        score = record.get("validation_score")
        return -math.inf if score is None else self.metric.gain(self.metric.scale * score, self.metric.guessing or 0.0)

    def batch_effect(self, model: str, norm: str) -> Interval | None:
        """How much better the test score is at the smallest batch size than at the largest."""
        sizes = plain_sizes(self.plan)
        if len(sizes) < 2:
            return None
        return self.compare((model, sizes[-1], norm), (model, sizes[0], norm))

    def mode_effect(self, cell: Cell, measure: str = "score") -> Interval | None:
        """Evaluation mode against training mode on the same validation samples: gain of score, or change of loss."""
        # Both modes see whole batches only.
        size = parse_batch(cell[1])[-1]
        samples = self.validation_samples // size * size
        differences = []
        for record in self.finals.get(cell, {}).values():
            modes = record.get("modes") or {}
            evaluation, training = modes.get(f"evaluation_{measure}"), modes.get(f"training_{measure}")
            if evaluation is not None and training is not None:
                gain = self.metric.scale * self.metric.gain(evaluation, training)
                differences.append(gain if measure == "score" else evaluation - training)
        return find_interval(differences, self.metric.resolution(samples) if measure == "score" else 0.0)


def plain_sizes(plan: Plan) -> list[str]:
    """Batch sizes that are one number, largest first."""
    return sorted((batch for batch in plan.batches if ":" not in batch), key=lambda batch: -int(batch))
