"""Which run comes next: learning rates by successive halving, then seeds; the same rule and grid for every norm."""

from __future__ import annotations

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
class Plan:
    """What is asked: every combination of these, except the cells that cannot exist.

    `images` is what a final run sees; `impossible` maps a cell (model, batch, norm) to its reason; `higher` says
    whether a higher score is better.
    """

    models: tuple[str, ...]
    norms: tuple[str, ...]
    batches: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int
    images: int
    impossible: dict[Cell, str] = field(default_factory=dict)
    higher: bool = True

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
        """Rates of a finished rung, best validation score first (lower loss where equal); None if unfinished."""
        runs = self.search_runs(cell, rung, find)
        records = [find(run) for run in runs or []]
        if runs is None or any(record is None for record in records):
            return None
        ranked = sorted((record for record in records if record is not None), key=self.rank)
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

    def stream(self, cell: Cell, find: Find) -> Iterator[Run]:
        """Runs of a cell that are known to be needed, in their order: the search, then seed after seed."""
        for rung in range(len(self.rungs(cell[1]))):
            yield from self.search_runs(cell, rung, find) or []
        rate = self.find_rate(cell, find)
        if rate is not None:
            for seed in range(self.seeds):
                yield self.final_run(cell, rate, seed)

    def order(self, find: Find) -> list[Run]:
        """Every run known to be needed, in the order of its use: next is the cell that has had least so far.

        What a cell has had is counted in square roots of steps. So large batches, whose runs are short, are done early,
        and where time is short they have intervals; yet small batches are not left for the end.
        """
        turns: list[tuple[float, int, Run]] = []
        for index, cell in enumerate(self.cells):
            had = 0.0
            for run in self.stream(cell, find):
                had += len(find_steps(run.batch, run.images)) ** 0.5
                turns.append((had, index, run))
        return [run for *_, run in sorted(turns, key=lambda turn: turn[:2])]

    def count(self) -> int:
        """Runs of the whole plan."""
        return sum(self.seeds + sum(kept for _, kept in self.rungs(cell[1])) for cell in self.cells)

    def first_look_done(self, find: Find) -> bool:
        """Whether every cell has shown what its rates do."""
        if len(self.rates) == 1:
            return all(find(self.final_run(cell, self.rates[0], 0)) for cell in self.cells)
        return all(self.rank_rates(cell, 0, find) is not None for cell in self.cells)

    def rank(self, record: dict[str, Any]) -> tuple[bool, float, float]:
        """Sort key: finished before diverged or failed, then the better validation score, then the lower loss."""
        loss, score = record.get("validation_loss"), record.get("validation_score")
        last = float("inf")
        cost = last if score is None else -score if self.higher else score
        return record["status"] != "finished", cost, last if loss is None else loss
