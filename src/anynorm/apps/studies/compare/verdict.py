"""The answer of a comparison in one sentence, which says first where nothing can be said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from anynorm.apps.terminal import join_words

from ..intervals import LEAST_SEEDS, Interval
from .findings import Findings
from .judge import Choice, cover, find_common
from .sentences import name_norm, say_batch, say_guessing


def say_verdict(findings: Findings, choices: Sequence[Choice]) -> str:
    """The answer in one sentence; only places where every norm is judged count."""
    if not choices:
        return "No full run is finished yet, so there is no answer; run the same command again to go on."
    if not any(choice.differences or choice.missing for choice in choices):
        return "Only one norm was run, so there is nothing to compare."
    judged = [choice for choice in choices if choice.judged]
    if not judged:
        return say_no_verdict(findings, choices)
    lead = [] if any(choice.clear for choice in judged) else [say_too_wide(findings, judged)]
    by_model = {model: [choice for choice in judged if choice.model == model] for model in findings.plan.models}
    parts = lead + [say_model_verdict(findings, model, found) for model, found in by_model.items() if found]
    worst = find_worst(judged)
    if worst is not None:
        choice, norm, interval = worst
        below = "below" if findings.metric.higher else "above"
        parts.append(
            f"the largest clear loss is {name_norm(norm)} in the {choice.model} at {say_batch(choice.batch)}, "
            f"{findings.metric.say_gain(interval.mean).removeprefix('+')} {below} {name_norm(choice.leader)}"
        )
    sentence = "; ".join(parts)
    return sentence[0].upper() + sentence[1:] + "."


def say_no_verdict(findings: Findings, choices: Sequence[Choice]) -> str:
    """Why nothing can be recommended where no place is judged."""
    if any(choice.same for choice in choices):
        return (
            "Nothing can be said: every norm gave exactly the same numbers; see that the network runs what "
            "norm returns."
        )
    if any(choice.compared and not choice.learned for choice in choices):
        return (
            f"Nothing can be said: no network is clearly better than guessing ({say_guessing(findings)}), so a "
            "lead is chance; give more images, seeds or rates, or see whether x tells anything about y."
        )
    if findings.plan.seeds == 1:
        return "Nothing can be said from one seed: without an interval a lead may be chance; use --seeds 8."
    if findings.plan.seeds < LEAST_SEEDS:
        return (
            "Nothing can be said from two seeds: their interval rests on a single difference, so a lead may be chance; "
            "use --seeds 8."
        )
    return (
        "Nothing can be said yet: nowhere have all norms finished three seeds, so a lead may be chance; run the "
        "same command again to go on."
    )


def say_too_wide(findings: Findings, choices: Sequence[Choice]) -> str:
    """That every interval is wider than its difference, and how small a difference could have been seen."""
    halves = [i.high - i.mean for choice in choices for i in choice.differences.values() if i.high is not None]
    seen = findings.metric.say_gain(median(halves)).removeprefix("+")
    return (
        f"nothing can be said of one norm against another: every interval is wider than the difference in it, and "
        f"half of them would hide {seen}; give more seeds or images"
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
    parts = [
        f"Not judged yet, because not every norm has three seeds: {join_words(waiting)}; the same command goes on."
    ]
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
    if not any(choice.clear for choice in choices):
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
        if interval.verdict == "higher" and norm != "none" and interval.mean >= choice.negligible
    ]
    return max(losses, key=lambda loss: loss[2].mean, default=None)
