"""What the terminal shows: live progress with the time left, then the tables and the verdict."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .judge import Choice, Findings
from .plan import Study
from .sentences import join, say_batch


class Screen:
    """Live progress in a terminal; where there is none, only the lines worth keeping in a log.

    Args:
        console: where to write.
        deadline: when the command ends, by time.monotonic().
    """

    def __init__(self, console: Console, deadline: float) -> None:
        self.console, self.deadline = console, deadline
        self.first: list[str] = []
        self.live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def say(self, text: str) -> None:
        """A line that stays; names in it are never read as markup."""
        self.console.print(Text(text), soft_wrap=True)

    def show(self, done: int, total: int, state: str, running: Sequence[str]) -> None:
        """Redraw the progress."""
        if not self.console.is_terminal:
            return
        left = max(0.0, self.deadline - time.monotonic())
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"{int(left) // 60}:{int(left) % 60:02d} left", style="bold"),
            ProgressBar(total=max(total, 1), completed=done, width=30),
            Text(f"{done} of {total} runs · {state}" if total else state),
        )
        parts: list[RenderableType] = [bar, *(Text(f"  {name}", style="dim") for name in running)]
        if self.first:
            parts += [Text("so far:", style="bold"), *(Text(f"  {line}") for line in self.first)]
        self.live.update(Group(*parts))


def tabulate(findings: Findings, model: str, choices: Sequence[Choice]) -> Table:
    """Test accuracy of every norm at every batch size."""
    study: Study = findings.study
    table = Table(title=Text(f"{model}: test accuracy, %"), title_justify="left", title_style="bold")
    table.add_column("norm")
    for batch in study.batches:
        table.add_column(say_batch(batch), justify="right")
    here = {choice.batch: choice for choice in choices if choice.model == model}
    for norm in study.norms:
        table.add_row(norm, *(say_cell(findings, (model, b, norm), here.get(b)) for b in study.batches))
    return table


def say_cell(findings: Findings, cell: tuple[str, str, str], choice: Choice | None) -> Text:
    """One cell: mean and half interval, marked where the norm leads or is clearly worse."""
    if cell in findings.study.impossible:
        return Text("n/a", style="dim")
    interval = findings.interval(cell)
    if interval is None:
        return Text("failed" if cell in findings.failures else "")
    half = "" if interval.high is None else f" ± {interval.high - interval.mean:.1f}"
    # A margin wider than what was learned is no answer.
    if interval.high is not None and interval.high - interval.mean > max(
        interval.mean - findings.guessing, LEAST_MARGIN
    ):
        half = " (wide)"
    text = f"{interval.mean:.1f}{half}"
    if choice is None:
        return Text(text)
    if cell[2] == choice.leader and choice.judged:
        return Text(f"▲ {text}", style="bold green")
    if cell[2] in choice.with_verdict("higher"):
        return Text(f"▼ {text}", style="dim")
    return Text(text)


LEAST_MARGIN = 10.0  # points; a narrower margin is printed, also at guessing
KEY = "▲ leads on validation   ▼ clearly worse than the leader   unmarked: no clear difference, or not judged"


def print_tables(console: Console, findings: Findings, choices: Sequence[Choice]) -> None:
    """All tables with their key and the reasons for what is missing."""
    study = findings.study
    for model in study.models:
        if any(cell[0] == model for cell in study.cells):
            console.print(tabulate(findings, model, choices))
    console.print(
        Text(
            f"{KEY}; ± half of the 95 % interval over seeds; wide: that half is larger than what was learned; "
            "empty: not finished",
            style="dim",
        )
    )
    for reason, cells in group_reasons(study.impossible).items():
        console.print(Text(f"n/a, {cells}: {reason}.", style="dim"), soft_wrap=True)
    for reason, cells in group_reasons(findings.failures).items():
        console.print(Text(f"failed, {cells}: {reason}.", style="yellow"), soft_wrap=True)


def group_reasons(reasons: dict[tuple[str, str, str], str]) -> dict[str, str]:
    """Each reason once, with the places that it holds for; norms that share their batch sizes are said together."""
    batches: dict[tuple[str, str, str], list[str]] = {}
    for (model, batch, norm), reason in reasons.items():
        batches.setdefault((reason, model, norm), []).append(batch)
    norms: dict[tuple[str, str, str], list[str]] = {}
    for (reason, model, norm), sizes in batches.items():
        norms.setdefault((reason, model, ", ".join(sizes)), []).append(norm)
    places: dict[str, list[str]] = {}
    for (reason, model, shared), names in norms.items():
        places.setdefault(reason, []).append(f"{join(names)} in {model} at batch {shared}")
    return {reason: join(found) for reason, found in places.items()}
