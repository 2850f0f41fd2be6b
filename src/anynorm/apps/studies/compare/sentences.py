"""What the numbers say, in sentences that claim no more than the numbers do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from anynorm.apps.terminal import join_words

from ..intervals import CONFIDENCE, Interval
from .judge import NEGLIGIBLE, Choice, Findings, cover, find_common
from .plan import rank


def name_norm(norm: str) -> str:
    """A norm as it is called in a sentence."""
    return {"none": "no normalization", "rms": "RMS norm"}.get(norm, f"{norm} norm")


def signed(value: float) -> str:
    """A difference with its sign, one decimal, a true minus."""
    text = f"{value:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def say_interval(interval: Interval, unit: str = " points") -> str:
    """Mean, 95 % interval and number of seeds of a difference."""
    if interval.low is None or interval.high is None:
        return f"{signed(interval.mean)}{unit}, one seed, no interval"
    return (
        f"{signed(interval.mean)}{unit}, {CONFIDENCE:.0%} interval {signed(interval.low)} to "
        f"{signed(interval.high)}, {interval.seeds} seeds"
    ).replace("95%", "95 %")


def say_batch(batch: str) -> str:
    """batch 64, or batch 64 then 8."""
    return f"batch {batch.replace(':', ' then ')}"


def say_verdict(findings: Findings, choices: Sequence[Choice]) -> str:
    """The answer in one sentence; only places where every norm is judged count."""
    if not choices:
        return "No full run is finished yet, so there is no answer; run the same command again to go on."
    if not any(choice.differences or choice.missing for choice in choices):
        return "Only one norm was run, so there is nothing to compare."
    judged = [choice for choice in choices if choice.judged]
    if not judged:
        return say_no_verdict(findings, choices)
    by_model = {model: [choice for choice in judged if choice.model == model] for model in findings.plan.models}
    parts = [say_model_verdict(findings, model, found) for model, found in by_model.items() if found]
    worst = find_worst(judged)
    if worst is not None:
        choice, norm, interval = worst
        parts.append(
            f"the largest clear loss is {name_norm(norm)} in the {choice.model} at {say_batch(choice.batch)}, "
            f"{interval.mean:.1f} points below {name_norm(choice.leader)}"
        )
    sentence = "; ".join(parts)
    return sentence[0].upper() + sentence[1:] + "."


def say_no_verdict(findings: Findings, choices: Sequence[Choice]) -> str:
    """Why nothing can be recommended where no place is judged."""
    if any(choice.same for choice in choices):
        return (
            "Nothing can be recommended: every norm gave exactly the same numbers; see that the network runs what "
            "norm returns."
        )
    if any(choice.compared and not choice.learned for choice in choices):
        return (
            f"Nothing can be said: no network is clearly better than guessing ({findings.guessing:.1f} %), so a "
            "lead is chance; give more images, seeds or rates, or see whether x tells anything about y."
        )
    if findings.plan.seeds == 1:
        return "Nothing can be recommended from one seed: without an interval a lead may be chance; use --seeds 5."
    return (
        "Nothing can be recommended yet: nowhere have all norms finished two seeds, so a lead may be chance; "
        "run the same command again to go on."
    )


def say_unjudged(findings: Findings, choices: Sequence[Choice]) -> str:
    """Which places the verdict leaves out; empty where it leaves out none."""
    judged = {(choice.model, choice.batch) for choice in choices if choice.judged}
    places = Counter(cell[:2] for cell in findings.rates if cell not in findings.failures)
    left_out = [
        f"{model} at {say_batch(batch)}"
        for (model, batch), norms in places.items()
        if norms > 1 and (model, batch) not in judged
    ]
    if not left_out or not judged:
        return ""
    unlearned = [f"{c.model} at {say_batch(c.batch)}" for c in choices if c.compared and not c.judged]
    waiting = [place for place in left_out if place not in unlearned]
    parts = [f"Not judged yet, because not every norm has two seeds: {join_words(waiting)}; the same command goes on."]
    learned = f"Nothing can be said where no network is clearly better than guessing: {join_words(unlearned)}."
    return " ".join([*(parts if waiting else []), *([learned] if unlearned else [])])


def say_model_verdict(findings: Findings, model: str, choices: Sequence[Choice]) -> str:
    """The answer for one network, as a part of a sentence."""
    possible = {cell[1] for cell in findings.rates if cell[0] == model}
    where = "at every batch size tested" if len(choices) == len(possible) > 1 else ""
    where = where or f"at batch {join_words([choice.batch.replace(':', ' then ') for choice in choices])}"
    order = [choice.batch for choice in choices]
    common, answers = find_common(choices), cover(choices)
    if "none" in common and not any(choice.proven for choice in choices):
        return f"for the {model}, no norm was clearly better than none {where}"
    if not any(choice.with_verdict("higher") or choice.proven for choice in choices):
        norms = list(dict.fromkeys(norm for c in choices for norm in (c.leader, *c.differences)))
        return (
            f"for the {model}, there is no clear difference between {join_words([name_norm(n) for n in norms])} {where}"
        )
    if len(answers) == 1:
        best = next(iter(answers))
        # None that is common is beaten somewhere, so it is worse than the answer.
        others = [name_norm(norm) for norm in common if norm not in (best, "none")]
        rest = f" ({join_words(others)} {'is' if len(others) == 1 else 'are'} not clearly worse)" if others else ""
        return f"for the {model}, use {name_norm(best)} {where}{rest}"
    listed = [
        f"{name_norm(norm)} at batch {join_words([batch.replace(':', ' then ') for batch in batches])}"
        for norm, batches in sorted(answers.items(), key=lambda answer: order.index(answer[1][0]))
    ]
    return f"for the {model}, use {join_words(listed)}"


def find_worst(choices: Sequence[Choice]) -> tuple[Choice, str, Interval] | None:
    """The largest clear loss against a leader, if it is worth telling; no normalization is no norm to warn of."""
    losses = [
        (choice, norm, interval)
        for choice in choices
        for norm, interval in choice.differences.items()
        if interval.verdict == "higher" and norm != "none" and interval.mean >= NEGLIGIBLE
    ]
    return max(losses, key=lambda loss: loss[2].mean, default=None)


def say_choice(findings: Findings, choice: Choice) -> str:
    """One network at one batch size: who leads, who is not clearly worse, who is clearly worse."""
    interval = findings.interval((choice.model, choice.batch, choice.leader))
    assert interval is not None
    where, name = f"{choice.model}, {say_batch(choice.batch)}", name_norm(choice.leader)
    reached = f"{interval.mean:.1f} % on test, {interval.seeds} seed{'s' if interval.seeds > 1 else ''}"
    if not choice.differences:
        return f"{where}: only {name} has finished runs ({reached})."
    if not any(difference.low is not None for difference in choice.differences.values()):
        return f"{where}: {name} was ahead ({reached}); not judged, no interval."
    if choice.same:
        return f"{where}: every norm gave exactly the same numbers ({reached}), so none leads."
    if not choice.learned:
        return (
            f"{where}: nothing can be said; {name} was ahead ({reached}), which is not clearly better than guessing "
            f"({findings.guessing:.1f} %)."
        )
    text = f"{where}: {name} leads ({reached})"
    if choice.equals:
        text += f"; no clear difference to {join_words([name_norm(norm) for norm in choice.equals], 'or')}"
    worse = sorted(choice.with_verdict("higher"), key=lambda norm: choice.differences[norm].mean)
    if worse:
        losses = [f"{name_norm(norm)} ({signed(-choice.differences[norm].mean)})" for norm in worse]
        text += f"; clearly worse: {join_words(losses)}"
    waiting = [*choice.with_verdict("not judged"), *choice.missing]
    if waiting:
        text += f"; not judged, too few seeds: {join_words([name_norm(norm) for norm in waiting])}"
    return text + "."


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
                parts.append(f"{name_norm(min(records, key=rank)['norm'])} at {say_batch(batch)} (one short run)")
        if parts:
            lines.append(f"{model}: {', '.join(parts)}")
    return lines
