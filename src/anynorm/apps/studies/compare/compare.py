"""`anynorm compare`: which normalization should this network use, on this data, at this batch size?"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from typing import Any

from rich.console import Console

from anynorm.apps.terminal import open_console

from ..fit import MOMENTUM
from ..journal import REPORT, RESULTS, Journal, set_aside, write_atomically
from ..progress import LiveProgress
from ..session import Session
from ..workers import Workers
from .agenda import Comparison, time_plot
from .effects import say_effects
from .findings import Findings
from .judge import Choice, choose_all
from .options import Options
from .prepare import load_task, prepare
from .sentences import say_choice
from .tables import print_tables
from .train import CHECKPOINTS, HOPELESS_LOSS, HOPELESS_STEPS, PROBE, Run, train
from .verdict import say_unjudged, say_verdict

# Raise it when train.py changes what a run measures: older runs are then left alone and not reused.
PROTOCOL = 2


def compare(options: Options, *, started: float | None = None, console: Console | None = None) -> int:
    """Run the study within its time budget, and write journal, results and report into the out directory.

    Args:
        options: what to compare.
        started: when the budget began, by time.monotonic(); now where None.
        console: where to show progress and tables.

    Returns:
        Exit code: 0, 1 where not one full run could be finished, 130 where Ctrl-C ended it.
    """
    started = time.monotonic() if started is None else started
    console = console or open_console()
    budget = 60 * options.minutes
    journal, workers = None, Workers()
    try:
        with LiveProgress(console, started + budget) as progress:
            progress.show(0, 0, "loading torch, data and networks", [])
            task = load_task(options)
            plan, context = prepare(options, task)
            journal = Journal(options.out, lambda run: identify(run, context))
            for name in set_aside(options.out, context["configuration"]):
                progress.say(f"Results of other options were kept as {name}.")
            workers.send_task(train, task)
            agenda = Comparison(plan, journal, context, time_plot())
            session = Session(agenda, journal, workers, progress, started, budget)
            code = 0
            try:
                session.run()
            except KeyboardInterrupt:
                code = 130
            workers.stop()
            progress.show(0, 0, "writing the report", [])
            findings = Findings(plan, journal.find, context["data_sizes"], context["metric"])
            choices = choose_all(findings)
            facts = {"options": describe_options(options), "seconds": time.monotonic() - started, **context}
            facts["metric"] = asdict(context["metric"])
            write_results(options, journal, findings, choices, facts)
        conclude(console, options, findings, choices, code)
        return code or (0 if choices else 1)
    except KeyboardInterrupt:
        return 130
    finally:
        workers.stop()
        if journal is not None:
            journal.close()


def identify(run: Run, context: dict[str, Any]) -> dict[str, Any]:
    """All that defines a run."""
    return {
        "protocol": [PROTOCOL, MOMENTUM, CHECKPOINTS, PROBE, HOPELESS_STEPS, HOPELESS_LOSS],
        "run": asdict(run),
        "data": context["data"],
        "functions": context.get("functions"),
        "model": context["models"][run.model],
        "versions": {name: context["versions"][name] for name in ("anynorm", "torch")},
    }


def describe_options(options: Options) -> dict[str, Any]:
    """Return the options as JSON holds them."""
    named = {name: value for name, value in asdict(options).items() if name != "reading"}
    return {**named, **asdict(options.reading), "out": str(options.out)}


def write_results(
    options: Options, journal: Journal, findings: Findings, choices: list[Choice], facts: dict[str, Any]
) -> None:
    """Write results.json and report.html, each replaced in one step."""
    from .report import write_report

    plan = findings.plan
    runs = [record for run in plan.order(journal.find) if (record := journal.find(run)) is not None]
    results = {
        **facts,
        "planned_runs": plan.count(),
        "finished_runs": len(runs),
        "verdict": say_verdict(findings, choices),
        "not_judged": say_unjudged(findings, choices),
        "choices": [asdict(choice) | {"said": say_choice(findings, choice)} for choice in choices],
        "effects": say_effects(findings),
        "impossible": [[*cell, reason] for cell, reason in plan.impossible.items()],
        "failed": [[*cell, reason] for cell, reason in findings.failures.items()],
        "diverged": [[*cell, count] for cell in findings.finals if (count := findings.diverged(cell))],
        "runs": runs,
    }
    write_atomically(options.out / RESULTS, json.dumps(results, indent=1))
    write_atomically(options.out / REPORT, write_report(findings, choices, results))


def conclude(console: Console, options: Options, findings: Findings, choices: list[Choice], code: int) -> None:
    """Print the verdict, which may be that nothing can be said, then tables, each place, and where the report is."""
    for line in filter(None, [say_verdict(findings, choices), say_unjudged(findings, choices)]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    print_tables(console, findings, choices)
    for choice in choices:
        console.print(f"  {say_choice(findings, choice)}", markup=False, highlight=False, soft_wrap=True)
    note = "Interrupted; the same command goes on from here. " if code == 130 else ""
    console.print(f"{note}Report: {options.out / REPORT}", markup=False, highlight=False, soft_wrap=True)


def process_start() -> float:
    """When this process began, by time.monotonic(), so that imports count; the best guess where unknown."""
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        age = time.process_time()
    return time.monotonic() - max(0.0, age)
