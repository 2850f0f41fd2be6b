"""What the numbers say, in sentences that claim no more than the numbers do."""

from __future__ import annotations

from collections.abc import Sequence

from anynorm.apps.terminal import join_words

from ..intervals import CONFIDENCE, Interval
from ..metrics import Metric
from .findings import Findings
from .judge import Choice
from .plan import Cell


def name_norm(norm: str) -> str:
    """A norm as it is called in a sentence."""
    return {"none": "no normalization", "rms": "RMS norm"}.get(norm, f"{norm} norm")


def say_interval(interval: Interval, metric: Metric) -> str:
    """Mean, 95 % interval and number of seeds of a gain."""
    mean = metric.say_gain(interval.mean)
    if interval.low is None or interval.high is None:
        return f"{mean}, one seed, no interval"
    return (
        f"{mean}, {CONFIDENCE:.0%} interval {metric.write_gain(interval.low)} to "
        f"{metric.write_gain(interval.high)}, {interval.seeds} seeds"
    ).replace("95%", "95 %")


def say_batch(batch: str) -> str:
    """batch 64, or batch 64 then 8."""
    return f"batch {batch.replace(':', ' then ')}"


def say_choice(findings: Findings, choice: Choice) -> str:
    """One network at one batch size: who leads, who is not clearly worse, who is clearly worse."""
    interval = findings.interval((choice.model, choice.batch, choice.leader))
    assert interval is not None
    metric, cells = (
        findings.metric,
        [(choice.model, choice.batch, norm) for norm in (choice.leader, *choice.differences)],
    )
    where, name = f"{choice.model}, {say_batch(choice.batch)}", name_norm(choice.leader)
    reached = f"{metric.say(interval.mean)} on test, {interval.seeds} seed{'s' if interval.seeds > 1 else ''}"
    ended = say_diverged(findings, cells)
    if not choice.differences:
        return f"{where}: only {name} has finished runs ({reached}){ended}."
    if len(choice.with_verdict("not judged")) == len(choice.differences):
        why = "no interval" if interval.low is None else "too few seeds"
        return f"{where}: {name} was ahead ({reached}); not judged, {why}{ended}."
    if choice.same:
        return f"{where}: every norm gave exactly the same numbers ({reached}), so none leads."
    if not choice.learned:
        return (
            f"{where}: nothing can be said; {name} was ahead ({reached}), which is not clearly better than guessing "
            f"({say_guessing(findings)}){ended}."
        )
    text = f"{where}: {name} leads ({reached})"
    if choice.equals:
        text += f"; no clear difference to {join_words([name_norm(norm) for norm in choice.equals], 'or')}"
    worse = sorted(choice.with_verdict("higher"), key=lambda norm: choice.differences[norm].mean)
    if worse:
        losses = [f"{name_norm(norm)} ({metric.write_gain(-choice.differences[norm].mean)})" for norm in worse]
        text += f"; clearly worse: {join_words(losses)}"
    waiting = [*choice.with_verdict("not judged"), *choice.missing]
    if waiting:
        text += f"; not judged, too few seeds: {join_words([name_norm(norm) for norm in waiting])}"
    return f"{text}{ended}."


def say_guessing(findings: Findings) -> str:
    """What guessing reaches."""
    guessing = findings.metric.guessing
    return "unknown" if guessing is None else findings.metric.say(guessing)


def say_diverged(findings: Findings, cells: Sequence[Cell]) -> str:
    """Which of these diverged in how many of their full runs, as a part of a sentence; empty where none did."""
    counts = {cell[2]: (findings.diverged(cell), len(findings.finals[cell])) for cell in cells}
    parts = [f"{name_norm(norm)} in {bad} of {runs}" for norm, (bad, runs) in counts.items() if bad]
    return f"; diverged, and counted with what was reached: {join_words(parts)} runs" if parts else ""


def say_first(findings: Findings, choices: Sequence[Choice]) -> list[str]:
    """What can be recommended so far, one line for each network: judged, or ahead in the short runs of the search."""
    judged = {(choice.model, choice.batch): choice for choice in choices if choice.judged}
    lines = []
    for model in findings.plan.models:
        parts = []
        for batch in findings.plan.batches:
            choice = judged.get((model, batch))
            records = [
                record
                for norm in findings.plan.norms
                if (model, batch, norm) in findings.rates
                for record in findings.searched((model, batch, norm))
                if record["status"] == "finished"
            ]
            if choice is not None:
                parts.append(f"{name_norm(choice.leader)} at {say_batch(batch)} ({choice.seeds} seeds)")
            elif records:
                parts.append(
                    f"{name_norm(min(records, key=findings.plan.rank)['norm'])} at {say_batch(batch)} (one short run)"
                )
        if parts:
            lines.append(f"{model}: {', '.join(parts)}")
    return lines
