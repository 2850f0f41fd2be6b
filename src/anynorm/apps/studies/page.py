"""The report of studies: one HTML file that needs no network and no script, a summary and a part for each claim."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..document import write_document
from .journal import write_atomically

STUDIES, PAGE = "studies.json", "studies.html"
TITLE = "Batch normalization: its claims put to the test"

Entry = dict[str, Any]


def read_results(out: Path) -> dict[str, Entry]:
    """The entries of the studies that were run with this directory; those that cannot be read are left out."""
    try:
        results = json.loads((out / STUDIES).read_text(encoding="utf-8"))
        return {name: entry for name, entry in results.items() if "outcome" in entry}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def write_page(out: Path, results: dict[str, Entry]) -> None:
    """Write the report from the entries and the pictures that lie beside it."""
    parts = [write_study(entry, read_picture(out, name)) for name, entry in results.items()]
    last = list(results.values())[-1]
    foot = f"<footer>anynorm {escape(last['versions']['anynorm'])} · every trial is in <code>{STUDIES}</code></footer>"
    head = f"<header><h1>{TITLE}</h1>{say_counts(results.values())}</header>\n"
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    page = write_document(TITLE, [head, write_summary(results.values()), *parts, foot], style)
    write_atomically(out / PAGE, page)


def read_picture(out: Path, name: str) -> str:
    """A study's picture as SVG, empty where there is none."""
    path = out / f"{name}.svg"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def say_counts(entries: Iterable[Entry]) -> str:
    """How many claims were confirmed, refuted and neither."""
    outcomes = [entry["outcome"].partition(":")[0] for entry in entries]
    counts = [f"{outcomes.count(word)} {word}" for word in ("confirmed", "refuted", "inconclusive") if word in outcomes]
    return f'<p class="verdict">{", ".join(counts)}</p>'


def write_summary(entries: Iterable[Entry]) -> str:
    """The table of claims and verdicts."""
    rows = [
        (
            f'<a href="#{escape(entry["name"])}">{escape(entry["name"])}</a>',
            escape(entry["title"]),
            chip(entry["outcome"]),
            "<br>".join(map(escape, entry["said"])) or escape(entry["sentence"]),
        )
        for entry in entries
    ]
    return f'<section class="summary">{table(("study", "question", "verdict", "what decided"), rows)}</section>\n'


def chip(outcome: str) -> str:
    """A verdict as a coloured word."""
    return f'<span class="outcome {escape(outcome)}">{escape(outcome)}</span>'


def table(heads: Sequence[str], rows: Iterable[Iterable[str]], caption: str = "") -> str:
    """A table of cells that are HTML already."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def write_study(entry: Entry, picture: str) -> str:
    """The part of one claim."""
    name, title = escape(entry["name"]), escape(entry["title"])
    parts = [
        f"<h2>{title}</h2><blockquote>{escape(entry['claim'])}</blockquote>",
        f'{chip(entry["outcome"])}<p class="finding">{escape(entry["sentence"])}</p>',
    ]
    if picture:
        label = escape(f"{entry['title']} {entry['sentence']}")
        parts.append(f'<figure class="picture"><div role="img" aria-label="{label}">{picture}</div></figure>\n')
    parts += [
        bullets("What decided", entry["said"]),
        bullets("Beside", entry["said_beside"]),
        bullets("Notes", entry["notes"]),
        *(
            table(heads, [[escape(cell) for cell in row] for row in rows], caption)
            for caption, heads, rows in entry["tables"]
        ),
        write_published(entry),
        write_facts(entry),
    ]
    return f'<section class="study" id="{name}">{"".join(parts)}</section>\n'


def bullets(heading: str, lines: Sequence[str]) -> str:
    """A heading and a list; nothing where there are no lines."""
    items = "".join(f"<li>{escape(line)}</li>\n" for line in lines)
    return f"<h3>{escape(heading)}</h3><ul>{items}</ul>\n" if items else ""


def write_published(entry: Entry) -> str:
    """The figures of papers, and what differs from them."""
    rows = [(escape(each["source"]), escape(each["figure"])) for each in entry["published"]]
    differs = f"<p>What differs here: {escape(entry['differs'])}</p>" if entry["differs"] else ""
    published = f'<div class="words">{table(("source", "figure"), rows)}</div>' if rows else ""
    return f"<h3>Published</h3>{published}{differs}\n" if rows or differs else ""


def write_facts(entry: Entry) -> str:
    """How it was done."""
    trials, machine, versions = entry["trials"], entry["machine"], entry["versions"]
    counts = f"{trials['finished']} of {trials['planned']}, {entry['diverged']} of them diverged and count as that"
    facts = {
        "Rule": entry["rule"],
        "Design": entry["design"],
        "Trials": f"{counts}; {entry['seeds']} paired seeds",
        "Data": entry["data"],
        "Command": entry["command"],
        "Machine": f"{machine['system']}, {machine['cores']} cores, {machine['torch_threads_per_run']} torch thread "
        f"for each trial; torch {versions['torch']}, numpy {versions['numpy']}, Python {versions['python']}",
        "Run": f"{entry['on']}, in {entry['seconds']:.0f} seconds",
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in facts.items())
    return f"<h3>How it was done</h3><dl>{listed}</dl>\n"
