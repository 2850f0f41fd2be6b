"""The generated part of docs/speed.md, between its markers; the prose around it is written by hand."""

from __future__ import annotations

import re
from pathlib import Path

from .report import list_disturbed, list_models, list_verdicts
from .results import Row
from .steps import ModelRow
from .tables import as_markdown, list_cases, list_limits, list_means, list_peers
from .verdicts import Verdict

PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
PICTURE = PAGE.with_suffix(".svg")
MARKERS = re.compile(r"(<!-- bench -->\n).*(<!-- /bench -->)", re.DOTALL)


def write_page(
    text: str, rows: list[Row], models: list[ModelRow], facts: dict[str, str], verdicts: list[Verdict]
) -> str:
    """The page's text with its generated part made anew."""
    if not MARKERS.search(text):
        raise ValueError("docs/speed.md: the generated part stands between <!-- bench --> and <!-- /bench -->")
    parts = [*write_goals(facts, verdicts), *write_models(models), *write_means(rows), *write_rest(rows, facts)]
    generated = "\n\n".join(parts)
    return MARKERS.sub(lambda match: f"{match[1]}\n{generated}\n\n{match[2]}", text)


def write_goals(facts: dict[str, str], verdicts: list[Verdict]) -> list[str]:
    """What was run, the goals and the plot."""
    return [
        f"Measured on {facts['date']}: {facts['run']}. Other work meanwhile took {facts['other work meanwhile']}.",
        "## Goals",
        as_markdown(*list_verdicts(verdicts)),
        f"![Each case's speed over torch eager, torch.compile and JAX, by network and layout]({PICTURE.name})",
    ]


def write_models(models: list[ModelRow]) -> list[str]:
    """Whole models, where they were measured."""
    if not models:
        return []
    sentences = list_disturbed(models)
    notes = ["Disturbed by other work:", "\n".join(f"- {sentence}" for sentence in sentences)] if sentences else []
    return ["## Whole models", as_markdown(*list_models(models)), *notes]


def write_means(rows: list[Row]) -> list[str]:
    """The means of each dtype."""
    parts = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        chosen = [row for row in rows if row.dtype == dtype]
        tables = [as_markdown(*table(chosen)) for table in (list_means, list_peers, list_limits)]
        parts += [f"## Means, {dtype}", *tables]
    return parts


def write_rest(rows: list[Row], facts: dict[str, str]) -> list[str]:
    """Every case, and the machine."""
    parts = ["## Every case"]
    for dtype in dict.fromkeys(row.dtype for row in rows):
        table = as_markdown(*list_cases([row for row in rows if row.dtype == dtype]))
        parts += ["<details>", f"<summary>{dtype}</summary>", table, "</details>"]
    return [*parts, "## Machine and run", as_markdown(["fact", "value"], [[*fact] for fact in facts.items()])]
