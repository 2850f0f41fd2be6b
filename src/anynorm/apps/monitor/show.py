"""`anynorm monitor`: the table, and the page where one is asked for."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from anynorm.apps.document import check_output
from anynorm.apps.monitor.read import History, read_history
from anynorm.apps.terminal import heading, join_words, open_console, plain_table, say
from anynorm.doctor.monitor.alarms import NAMED, PROBLEMS
from anynorm.doctor.monitor.record import Record

MOST_ROWS = 20  # of one layer's steps


def print_monitor(
    file: Path, html: Path | None = None, layer: str | None = None, console: Console | None = None
) -> None:
    """Print what `anynorm.Monitor` wrote.

    Args:
        file: its SQLite or CSV.
        html: where to write the same as a page with lines; needs matplotlib.
        layer: show this one alone, over the steps.
        console: where to print; where None, standard output.

    Raises:
        UserError: `file` cannot be read, has no such layer, or `html` cannot be written.
    """
    if html is not None:
        check_output("monitor", "a page", html, (".html",))
    console = console or open_console()
    history = read_history(file)
    if layer is not None:
        history = history.choose(layer)
    say(console, describe_run(history))
    console.print()
    console.print(make_table(history) if layer is None else make_step_table(history.records[layer]))
    say(console, "", NOTE)
    if layer is None:
        heading(console, "Worst in the second half")
        say(console, *name_worst(history))
    warned = list_warned(history)
    if warned:
        heading(console, "Warned of")
        say(console, *warned)
    if html is not None:
        from anynorm.apps.monitor.page import write_page

        html.write_text(write_page(history), encoding="utf-8")
        say(console, "", f"page: {html}")


def describe_run(history: History) -> str:
    """What was measured, in one line."""
    steps, facts = history.steps, history.facts
    model = f"{facts['model']}: " if "model" in facts else ""
    version = f", anynorm {facts['anynorm']}" if "anynorm" in facts else ""
    count = "1 norm" if len(history.records) == 1 else f"{len(history.records)} norms"
    return f"{model}{count}, {len(steps)} measured steps from {steps[0]} to {steps[-1]}{version}"


TITLES = ("gap", "worst", "variance", "noise", "g min", "g max", "grad")
COLUMNS = ("gap", "gap_worst", "ratio", "noise", "gamma_min", "gamma_max", "gradient")
NOTE = (
    "gap: batch mean from running mean, the median channel's; worst: the farthest channel's; noise: standard error of "
    "the batch mean; all in std. variance: batch over running. g: gamma; grad: the norm of its gradient."
)


def make_table(history: History) -> Table:
    """A row for each layer: the last numbers that it has."""
    table = plain_table("layer", *TITLES)
    for layer, records in history.records.items():
        table.add_row(layer or "the model", *(number(last_of(records, column)) for column in COLUMNS))
    return table


def make_step_table(records: list[Record]) -> Table:
    """A row for each measured step of one layer, or for some of them, the last among them."""
    table = plain_table("step", *TITLES)
    stride = math.ceil(len(records) / MOST_ROWS)
    for record in records[::-1][::stride][::-1]:
        table.add_row(str(record.step), *(number(getattr(record, column)) for column in COLUMNS))
    return table


def name_worst(history: History) -> list[str]:
    """The layers with the largest gaps and the noisiest statistics, in the second half of what was measured."""
    since = history.steps[len(history.steps) // 2]
    lines = []
    for quantity, words in (
        ("gap", "largest gap of the median channel"),
        ("gap_worst", "largest gap of a channel"),
        ("noise", "noisiest batch mean"),
    ):
        found = [
            record
            for records in history.records.values()
            for record in records
            if record.step >= since and math.isfinite(getattr(record, quantity))
        ]
        if found:
            worst = max(found, key=lambda record: getattr(record, quantity))
            channel = f"channel {worst.channel} of " if quantity == "gap_worst" else ""
            size = number(getattr(worst, quantity))
            lines.append(f"{words}: {channel}{worst.layer or 'the model'}, {size} std at step {worst.step}")
    return lines or [f"no running averages could be compared from step {since} on"]


def list_warned(history: History) -> list[str]:
    """Each problem, the step of its first record, and the layers."""
    first: dict[tuple[int, str], list[str]] = {}
    for layer, records in history.records.items():
        known: set[str] = set()
        for record in records:
            for word in set(record.warned.split()) - known:
                known.add(word)
                first.setdefault((record.step, word), []).append(layer or "the model")
    return [
        f"step {step}: {PROBLEMS.get(word, word)}: "
        + join_words([*layers[:NAMED], *([f"{len(layers) - NAMED} more"] if len(layers) > NAMED else [])])
        for (step, word), layers in sorted(first.items(), key=lambda item: item[0])
    ]


def number(value: float) -> str:
    """Two digits, or three; nothing where it does not apply."""
    return "" if math.isnan(value) else f"{value:.2g}" if abs(value) < 100 else f"{value:.3g}"


def last_of(records: list[Record], quantity: str) -> float:
    """The last that applies: a gradient may have come too late for the last record."""
    values = [getattr(record, quantity) for record in records]
    return next((value for value in reversed(values) if not math.isnan(value)), math.nan)
