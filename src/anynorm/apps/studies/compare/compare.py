"""`anynorm compare`: which normalization should this network use, on this data, at this batch size?"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from anynorm.apps.terminal import open_console
from anynorm.errors import UserError

from ..data import Data, load_data
from ..describe import find_machine, find_versions
from ..fit import MOMENTUM
from ..journal import REPORT, RESULTS, Journal, set_aside, write_atomically
from ..progress import LiveProgress
from ..session import Session
from ..workers import Workers
from .agenda import Comparison, time_plot
from .effects import say_effects
from .judge import Choice, Findings, choose_all
from .options import Options
from .plan import Plan
from .sentences import say_choice, say_unjudged, say_verdict
from .tables import print_tables
from .train import CHECKPOINTS, HOPELESS_LOSS, HOPELESS_STEPS, PROBE, Run, parse_batch, train

if TYPE_CHECKING:
    from ..models import Model

# Raise it when train.py changes what a run measures: older runs are then left alone and not reused.
PROTOCOL = 1


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
            data = load_data(options.data)
            plan, context = prepare(options, data)
            journal = Journal(options.out, lambda run: identify(run, context))
            for name in set_aside(options.out, context["configuration"]):
                progress.say(f"Results of other options were kept as {name}.")
            workers.send_task(train, data)
            agenda = Comparison(plan, journal, context, time_plot())
            session = Session(agenda, journal, workers, progress, started, budget)
            code = 0
            try:
                session.run()
            except KeyboardInterrupt:
                code = 130
            workers.stop()
            progress.show(0, 0, "writing the report", [])
            findings = Findings(plan, journal.find, context["data_sizes"], context["guessing"])
            choices = choose_all(findings)
            facts = {"options": describe_options(options), "seconds": time.monotonic() - started, **context}
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
        "model": context["models"][run.model],
        "versions": {name: context["versions"][name] for name in ("anynorm", "torch")},
    }


def prepare(options: Options, data: Data) -> tuple[Plan, dict[str, Any]]:
    """Return the plan with what cannot exist left out, and what identifies and describes the study."""
    from ..models import find_model
    from .check import find_impossible

    models = [find_model(name, data.sample_shape, data.classes) for name in options.models]
    check_sizes(options, data)
    plan = Plan(options.models, options.norms, options.batches, options.rates, options.seeds, options.images)
    plan.impossible.update(find_impossible(plan, data))
    if not plan.cells:
        reasons = "; ".join(dict.fromkeys(plan.impossible.values()))
        raise UserError(f"compare: nothing can be run, because {reasons}; change --model, --norms or --data.")
    return plan, describe_study(options, data, models)


def check_sizes(options: Options, data: Data) -> None:
    """Raise where a batch does not fit in the training samples, or a run has too few images for its batches."""
    sizes = [size for batch in options.batches for size in parse_batch(batch)]
    if max(sizes) > len(data.train_x):
        raise UserError(
            f"compare --batch-sizes: a batch must fit in the {len(data.train_x):,} training samples of "
            f"{options.data!r}; got {max(sizes)}; try a smaller size."
        )
    least = max(sum(parse_batch(batch)) if ":" in batch else int(batch) for batch in options.batches)
    if options.images < 2 * max(sizes) or options.images < least:
        raise UserError(
            f"compare --images: a run must have 2 batches of the largest size at least; got {options.images} images "
            f"with batch {max(sizes)}; try --images {16 * max(sizes)}."
        )


def describe_study(options: Options, data: Data, models: list[Model]) -> dict[str, Any]:
    """Return the facts for the journal and the report; runs of an equal `configuration` belong to one study."""
    versions = find_versions()
    fingerprints = {model.name: model.fingerprint for model in models}
    identity = {
        "data": data.fingerprint,
        "models": fingerprints,
        "versions": {name: versions[name] for name in ("anynorm", "torch")},
        "options": [options.norms, options.batches, options.rates, options.seeds, options.images],
    }
    return {
        "configuration": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        "data": data.fingerprint,
        "data_sizes": [len(data.train_x), len(data.validation_x), len(data.test_x)],
        "guessing": 100 * float(np.bincount(data.test_y).max()) / len(data.test_y),
        "sample_shape": list(data.sample_shape),
        "classes": data.classes,
        "models": fingerprints,
        "about": {model.name: model.about for model in models},
        "versions": versions,
        "machine": find_machine(),
    }


def describe_options(options: Options) -> dict[str, Any]:
    """Return the options as JSON holds them."""
    return {**asdict(options), "out": str(options.out)}


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
        "runs": runs,
    }
    write_atomically(options.out / RESULTS, json.dumps(results, indent=1))
    write_atomically(options.out / REPORT, write_report(findings, choices, results))


def conclude(console: Console, options: Options, findings: Findings, choices: list[Choice], code: int) -> None:
    """Print the tables, the verdict and where the report is."""
    print_tables(console, findings, choices)
    lines = [f"  {say_choice(findings, choice)}" for choice in choices]
    for line in filter(None, [say_verdict(findings, choices), say_unjudged(findings, choices), *lines]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
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
