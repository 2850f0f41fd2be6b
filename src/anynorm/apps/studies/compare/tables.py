"""The tables of a finished study in the terminal, and the text of their cells, which the report shares."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from anynorm.apps.terminal import join_words

from ..intervals import Interval
from .findings import Findings
from .judge import Choice
from .sentences import say_batch

LEAST_MARGIN = 10.0  # points; a narrower margin of a share is printed, also at guessing
KEY = "▲ leads on validation   ▼ clearly worse than the leader   unmarked: no clear difference, or not judged"


def tabulate(findings: Findings, model: str, choices: Sequence[Choice]) -> Table:
    """Test score of every norm at every batch size."""
    plan = findings.plan
    table = Table(title=Text(f"{model}: test {findings.metric.title}"), title_justify="left", title_style="bold")
    table.add_column("norm")
    for batch in plan.batches:
        table.add_column(say_batch(batch), justify="right")
    here = {choice.batch: choice for choice in choices if choice.model == model}
    for norm in plan.norms:
        cells = [(model, batch, norm) for batch in plan.batches]
        table.add_row(norm, *(write_marked(findings, cell, here.get(cell[1])) for cell in cells))
    return table


def write_marked(findings: Findings, cell: tuple[str, str, str], choice: Choice | None) -> Text:
    """One cell with the number of runs in it that diverged."""
    text, diverged = write_cell_text(findings, cell, choice), findings.diverged(cell)
    return text.append(f" {diverged} diverged") if diverged else text


def write_cell_text(findings: Findings, cell: tuple[str, str, str], choice: Choice | None) -> Text:
    """One cell: mean and half interval, marked where the norm leads or is clearly worse."""
    if cell in findings.plan.impossible:
        return Text("n/a", style="dim")
    interval = findings.interval(cell)
    if interval is None:
        return Text("failed" if cell in findings.failures else "")
    half = (
        ""
        if interval.high is None
        else f" ± {findings.metric.write_half(interval.high - interval.mean, interval.mean)}"
    )
    if is_wide(findings, interval):
        half = " (wide)"
    text = f"{findings.metric.write(interval.mean)}{half}"
    if choice is None:
        return Text(text)
    if cell[2] == choice.leader and choice.judged:
        return Text(f"▲ {text}", style="bold green")
    if cell[2] in choice.with_verdict("higher"):
        return Text(f"▼ {text}", style="dim")
    return Text(text)


def is_wide(findings: Findings, interval: Interval) -> bool:
    """Whether half of an interval is more than what was learned, which is then no answer."""
    metric = findings.metric
    if interval.high is None or metric.guessing is None:
        return False
    return interval.high - interval.mean > max(
        metric.gain(interval.mean, metric.guessing), LEAST_MARGIN if metric.percent else 0.0
    )


def print_tables(console: Console, findings: Findings, choices: Sequence[Choice]) -> None:
    """All tables with their key and the reasons for what is missing."""
    plan = findings.plan
    for model in plan.models:
        if any(cell[0] == model for cell in plan.cells):
            console.print(tabulate(findings, model, choices))
    console.print(
        Text(
            f"{KEY}; ± half of the 95 % interval over seeds; wide: that half is larger than what was learned; "
            "empty: not finished",
            style="dim",
        )
    )
    for reason, cells in group_reasons(plan.impossible).items():
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
        places.setdefault(reason, []).append(f"{join_words(names)} in {model} at batch {shared}")
    return {reason: join_words(found) for reason, found in places.items()}
