"""The verdicts of a run of all studies on the pages that show them, with their pictures in docs/studies.

`python -m benchmarks.claims DIR` takes what `anynorm study run all --out DIR` wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anynorm.apps.studies.find import CLAIMS
from anynorm.apps.studies.page import read_results

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = DOCS / "studies"

Entry = dict[str, Any]


def write_row(entry: Entry) -> str:
    """A study as a row of the table."""
    decided = "<br>".join(entry["said"]) or entry["sentence"]
    published = "<br>".join(f"{each['source']}: {each['figure']}" for each in entry["published"])
    cells = (f"[{entry['name']}](#{entry['name']})", entry["title"], f"**{entry['outcome']}**", decided, published)
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def write_part(entry: Entry) -> str:
    """A study as a part of the page: claim, finding, picture, rule, and what differs from the papers."""
    picture = PICTURES / f"{entry['name']}.svg"
    lines = [
        f"### {entry['name']}",
        f"> {entry['claim']}",
        f"**{entry['outcome'].capitalize()}.** {entry['sentence']}",
        *([f"![{entry['title']}](studies/{picture.name})"] if picture.exists() else []),
        f"Rule: {entry['rule']}",
        *entry["notes"],
        *([f"What differs from the papers: {entry['differs']}"] if entry["differs"] else []),
        f"`{entry['command']}`: {entry['trials']['finished']} trials, {entry['diverged']} of them diverged, in "
        f"{entry['seconds']:.0f} seconds.",
    ]
    return "\n\n".join(lines)


def write_tables(entries: Iterable[Entry]) -> str:
    """What stands between the marks."""
    entries = list(entries)
    machine, versions = entries[-1]["machine"], entries[-1]["versions"]
    rows = ["| study | question | verdict | what decided | published |", "|---|---|---|---|---|"]
    minutes = sum(entry["seconds"] for entry in entries) / 60
    facts = (
        f"Run on {entries[-1]['on']}, {machine['cores']} cores, one torch thread for each trial; torch "
        f"{versions['torch']}, Python {versions['python']}; {minutes:.0f} minutes."
    )
    parts = [write_part(entry) for entry in entries]
    return "\n\n".join(["\n".join([*rows, *map(write_row, entries)]), facts, *parts])


def write_batches(entry: Entry) -> str:
    """What the page on small batches shows of its study: the verdict, the tables, and what decided."""
    parts = [f"**{entry['outcome'].capitalize()}.** {entry['sentence']}"]
    for caption, heads, rows in entry["tables"]:
        lines = [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
        parts.append("\n".join([f"{caption}:", "", *lines]))
    parts.append("\n".join(f"- {line}" for line in [*entry["said"], *entry["said_beside"]]))
    return "\n\n".join(parts)


def copy_picture(source: Path) -> None:
    """A picture on white ground, since a page may be dark."""
    PICTURES.mkdir(exist_ok=True)
    text = source.read_text(encoding="utf-8").replace("<svg ", '<svg style="background:#fff" ', 1)
    (PICTURES / source.name).write_text(text, encoding="utf-8")


def write_tutorial(entries: Iterable[Entry]) -> str:
    """What the tutorial shows of each study: the question, the verdict in a sentence, and the picture."""
    parts = []
    for entry in entries:
        parts.append(f"**{entry['title']}** {entry['outcome'].capitalize()}. {entry['sentence']}")
        if (PICTURES / f"{entry['name']}.svg").exists():
            parts.append(f"![{entry['title']}](studies/{entry['name']}.svg)")
        parts.append(f"`anynorm study run {entry['name']}`")
    return "\n\n".join(parts)


def write_between(page: Path, mark: str, text: str) -> None:
    """Replace what stands between a page's marks."""
    start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{start}{text}\n{end}{after}", encoding="utf-8")


def main(folder: Path) -> None:
    """Write the pages and the pictures."""
    results = read_results(folder)
    if not results:
        sys.exit(f"claims: there are no results in {str(folder)!r}; run anynorm study run all --out {folder} first.")
    if any(entry["quick"] for entry in results.values()):
        sys.exit("claims: quick results are no evidence; run all studies without --quick.")
    for source in folder.glob("*.svg"):
        copy_picture(source)
    entries = [results[name] for name in CLAIMS if name in results]
    write_between(DOCS / "claims.md", "claims", write_tables(entries))
    write_between(DOCS / "tutorial.md", "claims-said", write_tutorial(entries))
    if "batchsize" in results:
        write_between(DOCS / "small-batch.md", "batchsize", write_batches(results["batchsize"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
