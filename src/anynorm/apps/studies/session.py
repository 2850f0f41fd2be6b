"""One sitting of a study: workers kept busy until the plan is finished or the time is up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from .journal import Journal
from .judge import Findings, choose_all
from .plan import RunCosts, Study
from .progress import LiveProgress
from .sentences import say_first
from .train import Run
from .workers import Workers

# A first recommendation is given when every cell has had its first look, or after this many seconds.
FIRST_AFTER = 36.0
# How often the recommendation on the screen is brought up to date, in seconds.
REFRESH = 5.0


@dataclass
class Session:
    """What a sitting works with.

    `started` is by time.monotonic(); `budget` is in seconds from then, report included; `plot_seconds` is what a plot
    of the report takes.
    """

    study: Study
    journal: Journal
    workers: Workers
    progress: LiveProgress
    started: float
    budget: float
    plot_seconds: float
    costs: RunCosts = field(default_factory=RunCosts)
    refreshed: float | None = None

    def run(self) -> None:
        """Train until nothing is left to do or to fit in."""
        while True:
            order = self.study.order(self.journal.find)
            elapsed = time.monotonic() - self.started
            until = self.budget - self.estimate_report(order)
            self.announce(elapsed)
            self.assign(order, until - elapsed)
            if not self.workers.busy or elapsed > until:
                return
            for run, record, wall in self.workers.wait(min(0.25, until - elapsed)):
                self.journal.add(run, record)
                self.costs.learn(run, wall)
            names = [f"{r.model}, {r.norm}, batch {r.batch}, rate {r.rate:g}, seed {r.seed}" for r in self.workers.busy]
            done = sum(self.journal.find(run) is not None for run in order)
            state = "first look" if self.refreshed is None else "refining"
            self.progress.show(done, self.study.count(), state, sorted(names))

    def assign(self, order: Sequence[Run], seconds: float) -> None:
        """Give each idle worker the next run that can be expected to end within `seconds`."""
        for worker in self.workers.idle:
            for run in order:
                if self.journal.find(run) or run in self.workers.busy or self.costs.estimate(run) > seconds:
                    continue
                worker.start(run)
                break

    def announce(self, elapsed: float) -> None:
        """Say the first recommendation in lines that stay, and bring it up to date from then on."""
        study, first = self.study, self.refreshed is None
        if self.refreshed is None:
            due = elapsed > FIRST_AFTER or study.first_look_done(self.journal.find)
        else:
            due = elapsed > self.refreshed + REFRESH
        if not due:
            return
        self.refreshed = elapsed
        context = self.journal.context
        findings = Findings(study, self.journal.find, context["data_sizes"], context["guessing"])
        lines = say_first(findings, choose_all(findings)) if len(study.norms) > 1 else []
        self.progress.leaders = lines
        if first and lines:
            self.progress.say(
                f"First look after {elapsed:.0f} s: who is ahead; short runs are of one seed and decide nothing:"
            )
            for line in lines:
                self.progress.say(f"  {line}")

    def estimate_report(self, order: Sequence[Run]) -> float:
        """Seconds to keep free for the report, from the plots that it will have."""
        runs = [run for run in order if self.journal.find(run) is not None]
        batches = self.study.batches
        searched = {(run.model, run.batch) for run in runs if not run.final}
        finished = {(run.model, run.batch) for run in runs if run.final}
        curves = [place for place in finished if place[1] in (batches[0], batches[-1])]
        plots = len(searched) + 4 * len(curves) + 4 * len({model for model, _ in finished})
        return 2.0 + plots * self.plot_seconds


def time_plot() -> float:
    """Import what draws the report while the workers start; seconds that a plot takes here and now."""
    from . import report  # noqa: F401
    from .plots import draw

    draw("", "", lambda axes: None)  # The first drawing loads fonts.
    began = time.monotonic()
    draw("", "", lambda axes: None)
    # A real plot takes up to twice an empty one; half as much again for a machine that gets busier.
    return 3 * (time.monotonic() - began)
