"""The comparison as an agenda: its plan, the first recommendation on the screen, and time kept free for the report."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from typing import Any

from ..journal import Journal
from ..progress import LiveProgress
from .findings import Findings
from .judge import choose_all
from .plan import Plan
from .sentences import say_first
from .train import Run

# A first recommendation is given when every cell has had its first look, or after this many seconds.
FIRST_AFTER = 36.0
# How often the recommendation on the screen is brought up to date, in seconds.
REFRESH = 5.0


class Comparison:
    """What is to be done for a comparison; `plot_seconds` is what a plot of the report takes."""

    plan: Plan
    journal: Journal
    context: dict[str, Any]
    plot_seconds: float

    def __init__(self, plan: Plan, journal: Journal, context: dict[str, Any], plot_seconds: float) -> None:
        self.plan, self.journal, self.context, self.plot_seconds = plan, journal, context, plot_seconds
        self.refreshed: float | None = None

    def order(self) -> list[Run]:
        """Every run known to be needed, in the order of its use."""
        return self.plan.order(self.journal.find)

    def count(self) -> int:
        """Runs of the whole plan."""
        return self.plan.count()

    def name(self, run: Run) -> str:
        """What a run is called while it is under way."""
        return f"{run.model}, {run.norm}, batch {run.batch}, rate {run.rate:g}, seed {run.seed}"

    def price(self, run: Run) -> tuple[Hashable, float]:
        """Runs of a cell take time in proportion to their images."""
        return run.cell, run.images

    def reserve(self, finished: Sequence[Run]) -> float:
        """Seconds to keep free for the report, from the plots that it will have."""
        batches = self.plan.batches
        searched = {(run.model, run.batch) for run in finished if not run.final}
        final = {(run.model, run.batch) for run in finished if run.final}
        curves = [place for place in final if place[1] in (batches[0], batches[-1])]
        plots = len(searched) + 4 * len(curves) + 4 * len({model for model, _ in final})
        return 2.0 + plots * self.plot_seconds

    def state(self, elapsed: float, progress: LiveProgress) -> str:
        """Say the first recommendation in lines that stay, and bring it up to date from then on."""
        first = self.refreshed is None
        if self.refreshed is None:
            due = elapsed > FIRST_AFTER or self.plan.first_look_done(self.journal.find)
        else:
            due = elapsed > self.refreshed + REFRESH
        if due:
            self.refreshed = elapsed
            findings = Findings(self.plan, self.journal.find, self.context["data_sizes"], self.context["metric"])
            progress.leaders = say_first(findings, choose_all(findings)) if len(self.plan.norms) > 1 else []
            if first and progress.leaders:
                progress.say(
                    f"First look after {elapsed:.0f} s: who is ahead; short runs are of one seed and decide nothing:"
                )
                for line in progress.leaders:
                    progress.say(f"  {line}")
        return "first look" if self.refreshed is None else "refining"


def time_plot() -> float:
    """Import what draws the report while the workers start; seconds that a plot takes here and now."""
    from anynorm.apps.document import draw

    from . import report  # noqa: F401

    draw("", "", lambda axes: None)  # The first drawing loads fonts.
    began = time.monotonic()
    draw("", "", lambda axes: None)
    # A real plot takes up to twice an empty one; half as much again for a machine that gets busier.
    return 3 * (time.monotonic() - began)
