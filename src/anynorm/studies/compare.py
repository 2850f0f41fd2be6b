"""`anynorm compare`: which normalization should this network use, on this data, at this batch size?"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console

from anynorm.errors import UserError

from .data import Data, load_data
from .journal import REPORT, RESULTS, Journal, set_aside, write_atomically
from .judge import Choice, Findings, choose_all
from .options import Options
from .plan import Clock, Study
from .screen import Screen, print_tables
from .sentences import say_choice, say_effects, say_first, say_unjudged, say_verdict
from .train import parse_batch
from .workers import Workers

# A first recommendation is given when every cell has had its first look, or after this many seconds.
FIRST_AFTER = 36.0


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
    console = console or Console()
    budget = 60 * options.minutes
    journal, workers = None, Workers()
    try:
        with Screen(console, started + budget) as screen:
            screen.show(0, 0, "loading torch, data and networks", [])
            data = load_data(options.data)
            study, context = prepare(options, data)
            journal = Journal(options.out, context)
            for name in set_aside(options.out, context["configuration"]):
                screen.say(f"Results of other options were kept as {name}.")
            workers.send_data(data)
            reserve = prepare_report(study, budget)
            code = 0
            try:
                run_all(study, journal, workers, screen, started, budget - reserve)
            except KeyboardInterrupt:
                code = 130
            workers.stop()
            screen.show(0, 0, "writing the report", [])
            findings = Findings(study, journal.find)
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


def prepare(options: Options, data: Data) -> tuple[Study, dict[str, Any]]:
    """The plan with what cannot exist left out, and what identifies the study."""
    import torch

    import anynorm

    from .check import find_impossible
    from .models import find_model

    torch.set_num_threads(1)
    models = [find_model(name) for name in options.models]
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
    versions = {
        "anynorm": getattr(anynorm, "__version__", "unknown"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    study = Study(options.models, options.norms, options.batches, options.rates, options.seeds, options.images)
    study.impossible.update(find_impossible(study, data))
    if not study.cells:
        reasons = "; ".join(dict.fromkeys(study.impossible.values()))
        raise UserError(f"compare: nothing can be run, because {reasons}; change --model, --norms or --data.")
    identity = {
        "data": data.fingerprint,
        "models": {model.name: model.fingerprint for model in models},
        "versions": {name: versions[name] for name in ("anynorm", "torch")},
        "options": [options.norms, options.batches, options.rates, options.seeds, options.images],
    }
    context = {
        "configuration": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        "data": data.fingerprint,
        "data_sizes": [len(data.train_x), len(data.validation_x), len(data.test_x)],
        "sample_shape": list(data.sample_shape),
        "classes": data.classes,
        "models": identity["models"],
        "about": {model.name: model.about for model in models},
        "versions": versions,
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "torch_threads_per_run": 1},
    }
    return study, context


def prepare_report(study: Study, budget: float) -> float:
    """Import what draws the report while the workers start; seconds to keep free for writing it."""
    from . import report  # noqa: F401
    from .plots import draw

    draw("", "", lambda axes: None)  # The first drawing loads fonts.
    began = time.monotonic()
    draw("", "", lambda axes: None)
    plots = len(study.models) * (12 + len(study.batches))
    # A real plot takes up to twice an empty one, and twice as much again while the machine is busy; a small budget
    # cannot keep free more than a part of itself.
    return min(3.0 + 4 * plots * (time.monotonic() - began), budget / 3)


def run_all(study: Study, journal: Journal, workers: Workers, screen: Screen, started: float, until: float) -> None:
    """Keep the workers busy until the plan is finished or the time is up."""
    clock, first = Clock(), False
    total = study.count()
    state = "first look"
    while True:
        elapsed = time.monotonic() - started
        if not first and (elapsed > FIRST_AFTER or study.first_look_done(journal.find)):
            first, state = True, "refining"
            announce(study, journal, screen, elapsed)
        waiting = (
            run
            for run in study.order(journal.find)
            if journal.find(run) is None and run not in workers.busy and elapsed + clock.estimate(run) < until
        )
        for worker in workers.idle:
            if (run := next(waiting, None)) is not None:
                worker.start(run)
        if not workers.busy or elapsed > until:
            return
        for run, record, wall in workers.wait(min(0.25, max(0.0, until - elapsed))):
            journal.add(run, record)
            clock.learn(run, wall)
        names = [f"{r.model}, {r.norm}, batch {r.batch}, rate {r.rate:g}, seed {r.seed}" for r in workers.busy]
        screen.show(count_done(study, journal), total, state, sorted(names))


def count_done(study: Study, journal: Journal) -> int:
    """Finished runs of the plan."""
    return sum(journal.find(run) is not None for run in study.order(journal.find))


def announce(study: Study, journal: Journal, screen: Screen, elapsed: float) -> None:
    """Say the first recommendation, and on what little it stands."""
    lines = say_first(study, journal.find)
    if not lines or len(study.norms) < 2:
        return
    screen.first = lines
    screen.say(f"First recommendation after {elapsed:.0f} s, from short runs of one seed, so without interval:")
    for line in lines:
        screen.say(f"  {line}")


def describe_options(options: Options) -> dict[str, Any]:
    """Options as JSON holds them."""
    return {**asdict(options), "out": str(options.out)}


def write_results(
    options: Options, journal: Journal, findings: Findings, choices: list[Choice], facts: dict[str, Any]
) -> None:
    """results.json and report.html, each replaced in one step."""
    from .report import write_report

    study = findings.study
    runs = [record for run in study.order(journal.find) if (record := journal.find(run)) is not None]
    results = {
        **facts,
        "planned_runs": study.count(),
        "finished_runs": len(runs),
        "verdict": say_verdict(findings, choices),
        "not_judged": say_unjudged(findings, choices),
        "choices": [asdict(choice) | {"said": say_choice(findings, choice)} for choice in choices],
        "effects": say_effects(findings),
        "impossible": [[*cell, reason] for cell, reason in study.impossible.items()],
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
