"""`anynorm study run`: studies performed one after the other, judged and written into one report."""

from __future__ import annotations

import json
import time
from collections.abc import Hashable, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from anynorm.apps.document import draw
from anynorm.apps.terminal import heading, open_console, say
from anynorm.errors import UserError

from .command import StudyOptions
from .journal import Journal, write_atomically
from .page import PAGE, STUDIES, read_results, write_page
from .prepare import choose_fitting, prepare
from .progress import LiveProgress
from .session import Session
from .study import Results, Setting, Study, Trial
from .verdicts import INCONCLUSIVE, Verdict, say_effect
from .workers import Workers

REPORT_SECONDS = 3.0


def run_studies(
    studies: Sequence[Study], options: StudyOptions, *, started: float | None = None, console: Console | None = None
) -> int:
    """Perform studies, and write journal, results, pictures and report into the out directory.

    Args:
        studies: in the order in which they are performed.
        options: what they are run on, and for how long altogether.
        started: when the time began, by time.monotonic(); now where None.
        console: where to show progress and verdicts.

    Returns:
        Exit code: 0, 1 where a study could not be finished, 2 where one of several could not be run, 130 where Ctrl-C
        ended it.
    """
    started = time.monotonic() if started is None else started
    console = console or open_console()
    studies, code = choose_fitting(studies, options, console)
    workers = Workers()
    try:
        for place, each in enumerate(studies):
            budget = None
            if options.minutes is not None:
                left = 60 * options.minutes - (time.monotonic() - started)
                budget = left / (len(studies) - place)
            try:
                ended, entry = perform_study(each, options, workers, console, budget)
            except UserError as problem:  # such as a package that is missing; the others go on
                if len(studies) == 1:
                    raise
                say(console, "", f"{problem}")
                code = max(code, 2)
                continue
            results = read_results(options.out) | {each.name: entry}
            write_atomically(options.out / STUDIES, json.dumps(results, indent=1) + "\n")
            write_page(options.out, results)
            print_entry(console, entry)
            code = max(code, ended)
            if code == 130:
                break
        say(console, "", f"Report: {options.out / PAGE}")
    except KeyboardInterrupt:
        return 130
    finally:
        workers.stop()
    return code


def perform_study(
    study: Study, options: StudyOptions, workers: Workers, console: Console, budget: float | None
) -> tuple[int, dict[str, Any]]:
    """(exit code, entry for the results) of one study."""
    began = time.monotonic()
    deadline = None if budget is None else began + budget
    with LiveProgress(console, deadline) as progress:
        progress.show(0, 0, f"{study.name}: loading data", [])
        setting, facts = prepare(study, options)
        journal = Journal(options.out, lambda trial: {**facts["identity"], "trial": trial.fields}, "study run")
        try:
            agenda = StudyAgenda(study, setting, journal)
            workers.send_task(study.perform, setting)
            code = 0
            try:
                Session(agenda, journal, workers, progress, began, budget).run()
            except KeyboardInterrupt:
                code = 130
                workers.stop()
            results = Results(setting, agenda.order(), journal.find)
        finally:
            journal.close()
        progress.show(0, 0, f"{study.name}: drawing", [])
        verdict = judge(study, results)
        draw_picture(study, results, verdict, options.out)
    entry = {
        **describe(study, options),
        **asdict(verdict),
        "said": [say_effect(effect, verdict.confidence) for effect in verdict.effects],
        "said_beside": [say_effect(effect, decides=False) for effect in verdict.beside],
        "trials": {"planned": len(results.trials), "finished": len(results.records), "failed": len(results.failures)},
        "diverged": sum(record["status"] == "diverged" for record in results.records),
        "seconds": round(time.monotonic() - began, 1),
        "on": date.today().isoformat(),
        **facts["shown"],
        "records": results.records,
    }
    return max(code, int(bool(results.missing or results.failures))), entry


class StudyAgenda:
    """What is to be done for a study."""

    study: Study
    setting: Setting
    journal: Journal

    def __init__(self, study: Study, setting: Setting, journal: Journal) -> None:
        self.study, self.setting, self.journal = study, setting, journal

    def order(self) -> list[Trial]:
        """Every trial known to be needed, once each."""
        return list(dict.fromkeys(self.study.plan(self.setting, self.journal.find)))

    def count(self) -> int:
        """Trials that are known to be needed so far."""
        return len(self.order())

    def name(self, trial: Trial) -> str:
        """What a trial is called while it is under way."""
        options = "".join(f", {name} {value}" for name, value in trial.options)
        return f"{trial.arm}{options}, rate {trial.rate:g}, seed {trial.seed}"

    def price(self, trial: Trial) -> tuple[Hashable, float]:
        """Trials that differ only in rate and seed take as long as each other."""
        return (trial.arm, trial.search, trial.options), 1.0

    def reserve(self, finished: Sequence[Trial]) -> float:
        """Seconds for the report."""
        return REPORT_SECONDS

    def state(self, elapsed: float, progress: LiveProgress) -> str:
        """The study's name."""
        return self.study.name


def judge(study: Study, results: Results) -> Verdict:
    """The study's verdict; where it was quick, or not all trials are there, it says no more than that."""
    reasons = list(dict.fromkeys(record["reason"] for record in results.failures))
    if results.failures:
        return Verdict(INCONCLUSIVE, f"{len(results.failures)} trials failed: {'; '.join(reasons)}.")
    if results.missing or not results.trials:
        done = len(results.trials) - len(results.missing)
        return Verdict(
            INCONCLUSIVE,
            f"Unfinished: {done} of {len(results.trials)} trials known so far; the same command goes on from there.",
        )
    verdict = study.judge(results)
    if results.setting.quick:
        return replace(verdict, outcome=f"{INCONCLUSIVE}: quick")
    return verdict


def draw_picture(study: Study, results: Results, verdict: Verdict, out: Path) -> None:
    """The study's picture as NAME.svg, where its trials are finished; else what was there is taken away."""
    path = out / f"{study.name}.svg"
    if results.missing or results.failures or not results.trials:
        path.unlink(missing_ok=True)
        return
    plot = draw(study.title, verdict.sentence, lambda axes: study.paint(results, axes), study.size)
    write_atomically(path, plot.svg)


def describe(study: Study, options: StudyOptions) -> dict[str, Any]:
    """What a study says of itself."""
    return {
        "name": study.name,
        "title": study.title,
        "claim": study.claim,
        "design": study.design,
        "rule": study.rule,
        "published": [asdict(each) for each in study.published],
        "differs": study.differs,
        "command": f"anynorm study run {study.name} {options.command}".strip(),
        "quick": options.quick,
    }


def print_entry(console: Console, entry: dict[str, Any]) -> None:
    """A study's verdict in the terminal."""
    heading(console, f"{entry['name']}: {entry['title']}")
    say(console, f"{entry['outcome'].upper()}. {entry['sentence']}", *(f"  {line}" for line in entry["said"]))
    say(console, *(f"  beside: {line}" for line in entry["said_beside"]), *entry["notes"], f"Rule: {entry['rule']}")
    trials = entry["trials"]
    diverged = f", {entry['diverged']} of them diverged" if entry["diverged"] else ""
    say(console, f"{trials['finished']} trials{diverged}; {entry['seconds']:.0f} s.")
