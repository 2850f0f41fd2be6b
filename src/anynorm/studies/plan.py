"""Which run comes next: learning rates by successive halving, then seeds; the same rule and grid for every norm."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .train import Run, find_steps, parse_batch

Cell = tuple[str, str, str]
Find = Callable[[Run], dict[str, Any] | None]

# The first look at a rate: an eighth of the images, but at least this many steps, or large batches would show nothing.
FIRST_SHARE, FIRST_STEPS = 1 / 8, 60
SECOND_SHARE, SECOND_RATES = 1 / 4, 2


@dataclass(frozen=True)
class Study:
    """What is asked: every combination of these, except the cells that cannot exist.

    `images` is what a final run sees; `impossible` maps a cell (model, batch, norm) to its reason.
    """

    models: tuple[str, ...]
    norms: tuple[str, ...]
    batches: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int
    images: int
    impossible: dict[Cell, str] = field(default_factory=dict)

    @property
    def cells(self) -> list[Cell]:
        """Cells that can exist, cheap ones (few steps) first."""
        batches = sorted(self.batches, key=lambda batch: -sum(parse_batch(batch)) / len(parse_batch(batch)))
        every = [(model, batch, norm) for batch in batches for model in self.models for norm in self.norms]
        return [cell for cell in every if cell not in self.impossible]

    def rungs(self, batch: str) -> list[tuple[int, int]]:
        """(images, rates kept at most) of the search for this batch size; empty with a single rate."""
        if len(self.rates) == 1:
            return []
        least = FIRST_STEPS * max(parse_batch(batch))
        first = min(self.images, max(round(self.images * FIRST_SHARE), least))
        second = round(self.images * SECOND_SHARE)
        rungs = [(first, len(self.rates))]
        if second > first and len(self.rates) > SECOND_RATES:
            rungs.append((second, SECOND_RATES))
        return rungs

    def search_runs(self, cell: Cell, rung: int, find: Find) -> list[Run] | None:
        """Runs of one rung of a cell, middle rates first; None while the rung below is unfinished."""
        model, batch, norm = cell
        images, kept = self.rungs(batch)[rung]
        rates = list(self.rates) if rung == 0 else self.rank_rates(cell, rung - 1, find)
        if rates is None:
            return None
        if rung == 0:
            middle = (len(rates) - 1) / 2
            rates.sort(key=lambda rate: abs(self.rates.index(rate) - middle))
        return [Run(model, norm, batch, rate, 0, images, False) for rate in rates[:kept]]

    def rank_rates(self, cell: Cell, rung: int, find: Find) -> list[float] | None:
        """Rates of a finished rung, best validation accuracy first (lower loss where equal); None if unfinished."""
        runs = self.search_runs(cell, rung, find)
        records = [find(run) for run in runs or []]
        if runs is None or any(record is None for record in records):
            return None
        ranked = sorted((record for record in records if record is not None), key=rank)
        return [record["rate"] for record in ranked]

    def find_rate(self, cell: Cell, find: Find) -> float | None:
        """The rate that the search chose for a cell; None while it is unfinished."""
        if len(self.rates) == 1:
            return self.rates[0]
        ranked = self.rank_rates(cell, len(self.rungs(cell[1])) - 1, find)
        return ranked[0] if ranked else None

    def final_run(self, cell: Cell, rate: float, seed: int) -> Run:
        """A full run with the chosen rate."""
        model, batch, norm = cell
        return Run(model, norm, batch, rate, seed, self.images, True)

    def order(self, find: Find) -> Iterator[Run]:
        """Every run known to be needed, in the order of its use: all first looks, then the rest stage by stage."""
        for rung in (0, 1):
            found = [self.search_runs(cell, rung, find) or [] for cell in self.cells if rung < len(self.rungs(cell[1]))]
            for position in range(max((len(runs) for runs in found), default=0)):
                yield from (runs[position] for runs in found if position < len(runs))
        chosen = {cell: self.find_rate(cell, find) for cell in self.cells}
        for seed, cell in sorted(itertools.product(range(self.seeds), self.cells), key=self.final_turn):
            rate = chosen[cell]
            if rate is not None:
                yield self.final_run(cell, rate, seed)

    def final_turn(self, place: tuple[int, Cell]) -> tuple[float, int]:
        """When a cell's seed has its turn: seed by seed, but large batches, whose runs are short, run ahead.

        Where time is short, this leaves intervals at the large batch sizes rather than single seeds everywhere.
        """
        seed, (_, batch, _) = place
        return (seed + 1) * len(find_steps(batch, self.images)) ** 0.5, seed

    def count(self) -> int:
        """Runs of the whole plan."""
        return sum(self.seeds + sum(kept for _, kept in self.rungs(cell[1])) for cell in self.cells)

    def first_look_done(self, find: Find) -> bool:
        """Whether every cell has shown what its rates do."""
        if len(self.rates) == 1:
            return all(find(self.final_run(cell, self.rates[0], 0)) for cell in self.cells)
        return all(self.rank_rates(cell, 0, find) is not None for cell in self.cells)


def rank(record: dict[str, Any]) -> tuple[bool, float, float]:
    """Sort key: finished before diverged or failed, then validation accuracy, then loss."""
    loss = record.get("validation_loss")
    accuracy = record.get("validation_accuracy") or 0.0
    return record["status"] != "finished", -accuracy, float("inf") if loss is None else loss


class Clock:
    """What runs cost here, learned from those that are finished.

    A cost is kept per model, norm and batch size, in seconds per image; the largest of the last few is used,
    because a run that does not fit is lost.
    """

    def __init__(self) -> None:
        self.costs: dict[Cell, list[float]] = {}

    def learn(self, run: Run, wall: float) -> None:
        """Note that a run took `wall` seconds."""
        self.costs.setdefault(run.cell, []).append(wall / run.images)

    def estimate(self, run: Run) -> float:
        """Seconds that a run will take; 0 where nothing like it has run yet."""
        return max(self.costs.get(run.cell, [0.0])[-4:]) * run.images
