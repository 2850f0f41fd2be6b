"""One sitting: workers kept busy until nothing is left to do, or the time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol

from .journal import Journal
from .progress import LiveProgress
from .workers import Run, Workers


class Agenda(Protocol):
    """What is to be done: the runs, which are known only as far as finished ones decide on them."""

    def order(self) -> Sequence[Run]:
        """Every run known to be needed, finished ones too, in the order of its use."""
        ...

    def count(self) -> int:
        """Runs altogether, as far as it is known."""
        ...

    def name(self, run: Run) -> str:
        """What a run is called while it is under way."""
        ...

    def price(self, run: Run) -> tuple[Hashable, float]:
        """(kind, size): runs of a kind take time in proportion to their size."""
        ...

    def reserve(self, finished: Sequence[Run]) -> float:
        """Seconds to keep free at the end."""
        ...

    def state(self, elapsed: float, progress: LiveProgress) -> str:
        """A word for the display; lines that are to be said are said here."""
        ...


class Session:
    """A sitting.

    Args:
        agenda: what is to be done.
        journal: where finished runs are.
        workers: who does it; they have their task.
        progress: the display.
        started: when the time began, by time.monotonic().
        budget: seconds from then, or None where all is to be done.
    """

    agenda: Agenda
    journal: Journal
    workers: Workers
    progress: LiveProgress
    started: float
    budget: float

    def __init__(
        self,
        agenda: Agenda,
        journal: Journal,
        workers: Workers,
        progress: LiveProgress,
        started: float,
        budget: float | None,
    ) -> None:
        self.agenda, self.journal, self.workers, self.progress = agenda, journal, workers, progress
        self.started, self.budget = started, float("inf") if budget is None else budget
        self.costs: RunCosts = RunCosts(agenda)

    def run(self) -> None:
        """Perform runs until nothing is left to do or to fit in."""
        while True:
            order = self.agenda.order()
            finished = [run for run in order if self.journal.find(run) is not None]
            elapsed = time.monotonic() - self.started
            until = self.budget - self.agenda.reserve(finished)
            state = self.agenda.state(elapsed, self.progress)
            self.assign(order, until - elapsed)
            if not self.workers.busy or elapsed > until:
                return
            for run, record, wall in self.workers.wait(min(0.25, until - elapsed)):
                self.journal.add(run, record)
                self.costs.learn(run, wall)
            names = sorted(self.agenda.name(run) for run in self.workers.busy)
            left = self.costs.total(run for run in order if self.journal.find(run) is None) / len(self.workers.all)
            self.progress.show(len(finished), self.agenda.count(), state, names, left)

    def assign(self, order: Sequence[Run], seconds: float) -> None:
        """Give each idle worker the next run that can be expected to end within `seconds`."""
        for worker in self.workers.idle:
            for run in order:
                if self.journal.find(run) or run in self.workers.busy or self.costs.estimate(run) > seconds:
                    continue
                worker.start(run)
                break


class RunCosts:
    """What runs cost here, learned from those that are finished.

    A cost is kept for each kind, in seconds for each unit of its size; the largest of the last few is used, because a
    run that does not fit is lost.
    """

    def __init__(self, agenda: Agenda) -> None:
        self.price: Callable[[Run], tuple[Hashable, float]] = agenda.price
        self.costs: dict[Hashable, list[float]] = {}

    def learn(self, run: Run, wall: float) -> None:
        """Note that a run took `wall` seconds."""
        kind, size = self.price(run)
        self.costs.setdefault(kind, []).append(wall / size)

    def estimate(self, run: Run) -> float:
        """Seconds that a run will take; 0 where nothing like it has run yet."""
        kind, size = self.price(run)
        return max(self.costs.get(kind, [0.0])[-4:]) * size

    def total(self, runs: Iterable[Run]) -> float:
        """Seconds that runs will take; those whose like has not run yet cost what is usual here."""
        seconds = [self.estimate(run) for run in runs]
        known = [value for value in seconds if value]
        return sum(known) + (len(seconds) - len(known)) * (sum(known) / len(known) if known else 0.0)
