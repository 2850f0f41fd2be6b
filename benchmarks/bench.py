"""`make bench`: time the grid, print the tables and the goals' verdicts, write CSV, page and plot."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from anynorm.apps.terminal import open_console
from anynorm.apps.timing.cases import Case
from anynorm.errors import UserError

from . import page, plot
from .grid import find_cases
from .limits import find_caches
from .machine import Watch, describe_load, find_facts, find_last_level, set_allocator
from .measure import measure
from .peers import USUAL, choose_peers
from .results import Row, read_csv, write_csv
from .tables import as_table, list_measured, print_report
from .verdicts import judge

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDE = 130


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A sixth of the cases, in float32, half as long.")] = False,
    peers: Annotated[str, typer.Option("--peers", help="Who is timed; also anynorm-compile.")] = ",".join(USUAL),
    dtypes: Annotated[str, typer.Option("--dtypes", help="float32, bfloat16 or both; both, or float32 if quick.")] = "",
    only: Annotated[str, typer.Option("--only", help="Cases whose network, name or layout contains this.")] = "",
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="For a case in a mode, over all peers.")] = 0.4,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads of every peer; 1 is steadier where others work.")
    ] = None,
    allocator: Annotated[bool, typer.Option("--allocator", help="Call anynorm.tune_allocator() first.")] = False,
    docs: Annotated[
        bool | None, typer.Option("--docs/--no-docs", help="Write docs/speed.md; the complete run does.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The CSV to write.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="Measure nothing; report on this CSV.")] = None,
) -> None:
    """Time anynorm, torch eager, torch.compile and JAX in turn on the layers of well-known networks."""
    console = open_console()
    console.width = max(console.width, WIDE)
    if source:
        report(console, *read_csv(source), docs=bool(docs))
        return
    torch.set_num_threads(threads or torch.get_num_threads())
    cases = choose_cases(dtypes or ("float32" if quick else ",".join(DTYPES)), quick, only)
    chosen, missing = choose_peers(peers)
    facts = find_facts(set_allocator(allocator))
    for sentence in (missing, f"{len(cases)} cases, {facts['threads']} threads, kernels {facts['kernels']}"):
        console.print(sentence, end="\n" if sentence else "")
    start, watch = time.perf_counter(), Watch()
    rows, problems = run(console, cases, chosen, seconds / 2 if quick else seconds)
    minutes = (time.perf_counter() - start) / 60
    grid = "the quick grid" if quick else f"the cases with {only!r}" if only else "the complete grid"
    facts |= {"peers": ", ".join(chosen), "run": f"{grid}, {len(cases)} cases, in {minutes:.1f} minutes"}
    facts |= {"other work meanwhile": describe_load(watch.find_share())}
    path = out or RESULTS / name_results(facts, describe_options(quick, only, threads, allocator))
    write_csv(rows, facts, path)
    complete = not (quick or only or problems or dtypes or threads) and set(USUAL) <= set(chosen)
    report(console, rows, facts, docs=complete if docs is None else docs)
    console.print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    if problems:
        raise typer.Exit(1)


def choose_cases(dtypes: str, quick: bool, only: str) -> list[Case]:
    """The cases asked for.

    Raises:
        UserError: a dtype is not known, or nothing is left.
    """
    names = [name.strip() for name in dtypes.split(",") if name.strip()]
    unknown = [name for name in names if name not in DTYPES]
    if unknown:
        raise UserError(f"bench: --dtypes takes {' and '.join(DTYPES)}; got {unknown[0]!r}; take one of these.")
    cases = [case for name in names for case in find_cases(DTYPES[name], quick)]
    chosen = [case for case in cases if only.lower() in f"{case.place} {case.name} {case.layout}".lower()]
    if not chosen:
        raise UserError(f"bench: --only must name a part of a case; got {only!r}; try resnet, layer or channels_last.")
    return chosen


def run(console: Console, cases: list[Case], peers: list[str], seconds: float) -> tuple[list[Row], list[str]]:
    """Measure, and print each network's table when it is complete. Ctrl-C ends it with what there is."""
    rows: list[Row] = []
    problems: list[str] = []
    measured = measure(cases, peers, seconds, find_last_level(find_caches()), problems.append)
    printed = 0
    try:
        for case, found in zip(track(cases, "measuring", console=console, transient=True), measured, strict=True):
            rows += found
            following = cases[cases.index(case) + 1 :]
            if not following or following[0].place != case.place:
                print_measured(console, rows[printed:])
                printed = len(rows)
    except KeyboardInterrupt:
        problems.append("stopped before the end")
    for problem in problems:
        console.print(problem, style="red", markup=False)
    return rows, problems


def print_measured(console: Console, rows: list[Row]) -> None:
    """Print one network's table: the peers' times over anynorm's, and anynorm's share of the limit."""
    if rows:
        console.rule(f"{rows[0].place}, {rows[0].dtype}: a peer's time over anynorm's", align="left")
        console.print(as_table(*list_measured(rows)))


def report(console: Console, rows: list[Row], facts: dict[str, str], docs: bool) -> None:
    """Print means and verdicts; where asked, write the page and its plot."""
    verdicts = judge(rows)
    print_report(console, rows, verdicts)
    console.print(f"Other work meanwhile took {facts['other work meanwhile']}.")
    if docs:
        page.PAGE.write_text(page.write_page(page.PAGE.read_text(), rows, facts, verdicts))
        plot.draw(rows, page.PICTURE)
        console.print(f"wrote docs/{page.PAGE.name} and docs/{page.PICTURE.name}")


def describe_options(quick: bool, only: str, threads: int | None, allocator: bool) -> list[str]:
    """What is special about a run, for the name of its CSV."""
    chosen = (("quick", quick), (only, only), (f"{threads} threads", threads), ("allocator", allocator))
    return [words for words, is_given in chosen if is_given]


def name_results(facts: dict[str, str], words: list[str]) -> str:
    """The CSV's name: date, processor, and what was special about the run."""
    parts = [facts["date"], facts["cpu"], *words]
    return "-".join(re.sub(r"\W+", "-", part.lower()).strip("-") for part in parts) + ".csv"


def main() -> None:
    """Run the command; what the user can repair ends in one sentence and exit code 2."""
    try:
        typer.run(bench)
    except UserError as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
