"""`make bench`: time models and grid, print the tables and the goals' verdicts, write CSV, page and plot."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from anynorm.apps.terminal import open_console
from anynorm.apps.timing.cases import Case
from anynorm.apps.timing.limits import find_caches, find_last_level
from anynorm.apps.zoo import Model
from anynorm.errors import UserError

from . import page, plot
from .grid import find_cases
from .machine import Watch, describe_load, find_facts
from .measure import measure
from .models import MODELS, QUICK
from .peers import USUAL, choose_peers
from .report import print_models, print_report
from .results import Row, read_csv, write_csv
from .steps import ModelRow, measure_models, read_models, write_models
from .stop import Stop, catch_stop
from .tables import as_table, list_measured
from .tuned import find_problem, open_process
from .verdicts import judge

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS = 0.3  # for a case in a mode, over all peers
TUNED_PEER = "tuned"
WIDE = 180


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A sixth of the cases, in float32, half as long.")] = False,
    peers: Annotated[str, typer.Option("--peers", help="Who is timed; also anynorm-compile.")] = ",".join(USUAL),
    dtypes: Annotated[
        str, typer.Option("--dtypes", help="float32, bfloat16 or both; else float32, and bfloat16 on a few cases.")
    ] = "",
    only: Annotated[
        str, typer.Option("--only", help="Cases whose network, name or layout contains this, and such models.")
    ] = "",
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.0, help="For a case in a mode, over all peers.")
    ] = SECONDS,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads of every peer; 1 is steadier where others work.")
    ] = None,
    minutes: Annotated[
        float, typer.Option("--minutes", help="The last cases are left out where they would take more.")
    ] = 45,
    models: Annotated[bool, typer.Option("--models/--no-models", help="Whether to time whole models.")] = True,
    docs: Annotated[
        bool | None, typer.Option("--docs/--no-docs", help="Write docs/speed.md; the complete run does.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The CSV to write.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="Measure nothing; report on this CSV.")] = None,
) -> None:
    """Time anynorm, torch eager, torch.compile and JAX in turn on layers of well-known networks; and whole models."""
    console = open_console()
    console.width = max(console.width, WIDE)
    if source:
        rows, facts = read_csv(source)
        report(console, Found(rows, read_models(source)), facts, docs=bool(docs))
        return
    torch.set_num_threads(threads or torch.get_num_threads())
    plan = choose_plan(dtypes, quick, only, models)
    chosen, missing = choose_peers(peers)
    facts = find_facts()
    for sentence in (missing, f"{plan.describe()}, {facts['threads']} threads, kernels {facts['kernels']}"):
        console.print(sentence, end="\n" if sentence else "")
    start, watch = time.perf_counter(), Watch()
    found = run(console, plan, chosen, seconds / 2 if quick else seconds, end=start + 60 * minutes)
    spent = f"in {(time.perf_counter() - start) / 60:.1f} minutes" + describe_left_out(found)
    grid = "the quick grid" if quick else f"what is called {only!r}" if only else "the complete grid"
    facts |= {"peers": ", ".join(chosen), "run": f"{grid}, {plan.describe()}, {spent}"}
    facts |= {"other work meanwhile": describe_load(watch.find_share())}
    path = out or RESULTS / name_results(facts, describe_options(quick, only, threads))
    write_csv(found.rows, facts, path)
    write_models(found.models, facts, path)
    whole = not found.problems and all(case.dtype != torch.float32 for case in found.left_out)
    complete = not (quick or only or dtypes or threads) and whole and models and set(USUAL) <= set(chosen)
    report(console, found, facts, docs=complete if docs is None else docs)
    console.print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    if found.problems:
        raise typer.Exit(1)


@dataclass
class Found:
    """What was measured, what went wrong, and which cases were left out because the time was over."""

    rows: list[Row] = field(default_factory=list)
    models: list[ModelRow] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: list[Case] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What is to be measured; `sparing` as in `measure`."""

    cases: list[Case]
    models: dict[str, Callable[[], Model]]
    sparing: bool = False

    def describe(self) -> str:
        """How much that is."""
        halves = sum(case.dtype != torch.float32 for case in self.cases)
        words = f"{len(self.cases)} cases" + (f" ({halves} of them in bfloat16)" if halves else "")
        return words + (f" and {len(self.models)} whole models" if self.models else "")


def choose_plan(dtypes: str, quick: bool, only: str, models: bool = True) -> Plan:
    """The cases and models asked for.

    Raises:
        UserError: a dtype is not known, or nothing is left.
    """
    names = [name.strip() for name in dtypes.split(",") if name.strip()]
    unknown = [name for name in names if name not in DTYPES]
    if unknown:
        raise UserError(f"bench: --dtypes takes {' and '.join(DTYPES)}; got {unknown[0]!r}; take one of these.")
    cases = [case for name in names or ["float32"] for case in find_cases(DTYPES[name], quick)]
    if not names and not quick:
        cases += find_cases(torch.bfloat16, quick=True)
    cases = [case for case in cases if only.lower() in f"{case.place} {case.name} {case.layout}".lower()]
    chosen = {name: make for name, make in MODELS.items() if models and only.lower() in name.lower()}
    if quick:
        chosen = {name: make for name, make in chosen.items() if name in QUICK}
    if not cases and not chosen:
        raise UserError(f"bench: --only must name a part of a case; got {only!r}; try resnet, layer or channels_last.")
    return Plan(cases, chosen, sparing=not (quick or only))


def run(console: Console, plan: Plan, peers: list[str], seconds: float, end: float = math.inf) -> Found:
    """Measure, and print each model and each network's table when it is complete. Ctrl-C ends it with what there is."""
    found = Found()
    try:
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(catch_stop(end))
            run_models(console, plan.models, seconds / SECONDS, found, stop)
            process = None
            if TUNED_PEER in peers and plan.cases:
                process = stack.enter_context(open_process(torch.get_num_threads()))
                problem = find_problem(process)
                found.problems += [problem] if problem else []
                process = None if problem else process
            others = [peer for peer in peers if peer != TUNED_PEER]
            cache, complain = find_last_level(find_caches()), found.problems.append
            measured = measure(plan.cases, others, seconds, cache, complain, process=process, sparing=plan.sparing)
            print_cases(console, plan.cases, measured, found, stop)
    except KeyboardInterrupt:
        found.problems.append("stopped before the end")
    for problem in found.problems:
        console.print(problem, style="red", markup=False)
    return found


def run_models(
    console: Console, models: dict[str, Callable[[], Model]], share: float, found: Found, stop: Stop
) -> None:
    """Time whole models."""
    measured = measure_models(models, share, found.problems.append)
    for name, rows in zip(track(models, "models", console=console, transient=True), measured, strict=True):
        found.models += rows
        if rows:
            console.rule(f"{name}: torch.nn's time over the form's", align="left")
            print_models(console, rows)
        stop.check()


def print_cases(console: Console, cases: list[Case], measured: Iterator[list[Row]], found: Found, stop: Stop) -> None:
    """Take the rows of the cases as they come, until the time is over."""
    printed = 0
    for place, case in enumerate(track(cases, "measuring", console=console, transient=True)):
        if stop.is_late():
            found.left_out = cases[place:]
            break
        found.rows += next(measured)
        following = cases[place + 1 : place + 2]
        if not following or (following[0].place, following[0].dtype) != (case.place, case.dtype):
            print_measured(console, found.rows[printed:])
            printed = len(found.rows)
        stop.check()


def describe_left_out(found: Found) -> str:
    """What was left out, in words."""
    return f"; the time was over before the last {len(found.left_out)} cases" if found.left_out else ""


def print_measured(console: Console, rows: list[Row]) -> None:
    """Print one network's table: the peers' times over anynorm's, and anynorm's share of the limit."""
    if rows:
        console.rule(f"{rows[0].place}, {rows[0].dtype}: a peer's time over anynorm's", align="left")
        console.print(as_table(*list_measured(rows)))


def report(console: Console, found: Found, facts: dict[str, str], docs: bool) -> None:
    """Print means and verdicts; where asked, write the page and its plot."""
    rows, models = found.rows, found.models
    verdicts = judge(rows, models)
    print_report(console, rows, models, verdicts)
    console.print(f"Other work meanwhile took {facts['other work meanwhile']}.")
    if docs:
        page.PAGE.write_text(page.write_page(page.PAGE.read_text(), rows, models, facts, verdicts))
        plot.draw(rows, page.PICTURE)
        console.print(f"wrote docs/{page.PAGE.name} and docs/{page.PICTURE.name}")


def describe_options(quick: bool, only: str, threads: int | None) -> list[str]:
    """What is special about a run, for the name of its CSV."""
    chosen = (("quick", quick), (only, only), (f"{threads} threads", threads))
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
