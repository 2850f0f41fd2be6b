"""Whether the goals are met, and where a goal is missed, which cases are worst and where their time goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from anynorm.apps.timing.forms import AGAIN, BUILT

from .causes import WORST, Causes, Parts, find_causes, name_worst, write_shares
from .results import Row
from .steps import ModelRow
from .summaries import BOTH, MOST_LONGER, find_best_others, is_lost, mean_over_limit, mean_ratio, summarize, write_time

SMALL = 4096  # elements, below which layer norm may take 1.05 times torch's time, which is no loss here anyway
TINY = {"layer": 1.0, "group": 1.2, "batch": 1.4, "rms": 2.0}
MODELS_MEAN = 1.15
NOT_MEASURED = "not measured"
Where = Callable[[Row], bool]


@dataclass(frozen=True)
class Verdict:
    """A goal, what was found, whether that is enough, and where it is not, the worst cases and their time."""

    goal: str
    found: str
    result: str
    causes: str = ""


def judge(rows: list[Row], models: list[ModelRow]) -> list[Verdict]:
    """Every goal, on the float32 rows and the whole models."""
    rows = [row for row in rows if row.dtype == "float32"]
    causes = find_causes(rows)
    rows += find_best_others(rows)

    def at_least(goal: str, wanted: float, where: Where, peer: str = "torch") -> Verdict:
        chosen = [row for row in rows if row.peer == peer and where(row)]
        return judge_mean(f"{goal}: at least {wanted:g} times as fast", wanted, chosen, causes)

    def over_limit(goal: str, wanted: float, peer: str, where: Where) -> Verdict:
        chosen = [row for row in rows if row.peer == peer and where(row)]
        return judge_limit(f"{goal}: at most {wanted:g} times the limit", wanted, chosen, causes)

    return [
        at_least("forward + backward, torch eager", 2.2, lambda row: row.mode == BOTH),
        at_least("forward in training, torch eager", 2.6, lambda row: row.mode == "training"),
        at_least("evaluation, torch eager", 1.5, lambda row: row.mode == "evaluation"),
        judge_losses([row for row in rows if row.peer == "torch"], causes),
        judge_models(models),
        *(
            at_least(f"tiny, {norm} norm, forward + backward", wanted, lambda row, norm=norm: is_tiny(row, norm))
            for norm, wanted in TINY.items()
        ),
        at_least("tiny, forward without gradient", 1.5, lambda row: row.place == "tiny" and row.mode != BOTH),
        over_limit("larger than the last cache, mean", 1.4, "anynorm", lambda row: row.out_of_cache),
        over_limit("kernels alone, in cache, mean", 1.5, "kernel", lambda row: not row.out_of_cache),
        at_least("group norm, channels_last, forward + backward", 2, lambda row: is_last_group(row)),
        at_least("RMS norm, forward + backward", 5, lambda row: row.norm == "rms" and row.mode == BOTH),
        at_least(
            "the better of torch.compile and JAX, forward + backward", 1.8, lambda row: row.mode == BOTH, peer="best"
        ),
    ]


def is_tiny(row: Row, norm: str) -> bool:
    return row.place == "tiny" and row.norm == norm and row.mode == BOTH


def is_last_group(row: Row) -> bool:
    return row.norm == "group" and row.layout == "channels_last" and row.mode == BOTH


def judge_mean(goal: str, wanted: float, rows: list[Row], causes: Causes) -> Verdict:
    """A geometric mean of at least `wanted`."""
    summary = summarize(rows)
    if summary is None:
        return Verdict(goal, "-", NOT_MEASURED)
    short = 1 - summary.mean / wanted
    if short <= 0:
        return Verdict(goal, str(summary), "met")
    return Verdict(goal, str(summary), f"missed by {100 * short:.0f} %", name_worst(rows, causes))


def judge_losses(rows: list[Row], causes: Causes) -> Verdict:
    """No case slower than torch eager beyond noise."""
    share = f"{100 * (MOST_LONGER - 1):.0f} %"
    goal = (
        f"cases slower than torch eager by more than {share}: none (layer norm below {SMALL:,} elements with autograd"
    )
    goal += f" may take {MOST_LONGER:g} times)"
    summary = summarize(rows)
    if summary is None:
        return Verdict(goal, "-", NOT_MEASURED)
    lost = [row for row in rows if is_lost(row)]
    small = sum(is_small_layer(row) for row in lost)
    found = f"{len(lost)} of {len(rows)} ({small} of them such layer norms), worst {summary.worst:.2f}: "
    found += summary.worst_name
    return Verdict(goal, found, f"missed by {len(lost)} cases" if lost else "met", name_worst(lost, causes))


def is_small_layer(row: Row) -> bool:
    """Whether it is a layer norm of few elements, with autograd."""
    elements = math.prod(map(int, row.shape.split("x")))
    return row.norm == "layer" and row.mode == BOTH and elements < SMALL


def judge_limit(goal: str, wanted: float, rows: list[Row], causes: Causes) -> Verdict:
    """A geometric mean over the limit of at most `wanted`."""
    if not rows:
        return Verdict(goal, "-", NOT_MEASURED)
    worst = min(rows, key=lambda row: row.share)
    mean = mean_over_limit(rows)
    found = f"{mean:.2f} on average over {len(rows)} cases, {1 / worst.share:.2f} at worst: {worst.name}, {worst.mode}"
    if mean <= wanted:
        return Verdict(goal, found, "met")
    result = f"missed by {100 * (mean / wanted - 1):.0f} %"
    return Verdict(goal, found, result, name_worst(rows, causes, over_limit=True))


def judge_models(models: list[ModelRow]) -> Verdict:
    """No step and no evaluation of a whole model below 1.0 beyond noise, and a mean of 1.15."""
    goal = f"whole models, step and evaluation, plain and fused: none below 1.0 beyond noise, mean {MODELS_MEAN:g}"
    ours = [row for row in models if row.form not in (BUILT, AGAIN)]
    if not ours:
        return Verdict(goal, "-", NOT_MEASURED)
    below = sorted((row for row in ours if is_below(row, models)), key=lambda row: row.ratio)
    mean, marked = mean_ratio(ours), sum(bool(row.disturbed) for row in ours)
    found = f"mean {mean:.2f}; {len(below)} of {len(ours)} below; {marked} disturbed by other work"
    missed = [f"{len(below)} below 1.0"] if below else []
    missed += [f"the mean by {100 * (1 - mean / MODELS_MEAN):.0f} %"] if mean < MODELS_MEAN else []
    result = f"missed: {' and '.join(missed)}" if missed else "met"
    worst = below or sorted(ours, key=lambda row: row.ratio)[:WORST]
    return Verdict(goal, found, result, "; ".join(say_model(row, models) for row in worst) if missed else "")


def is_below(row: ModelRow, models: list[ModelRow]) -> bool:
    """Whether a form is slower than torch.nn beyond noise.

    The whole 95 % interval of its paired ratios lies below 1, and below all of the interval of torch.nn's model over a
    copy of itself: two copies of one model may differ by where their memory lies.
    """
    return row.high < min(1.0, find_form(row, models, AGAIN).low)


def find_form(row: ModelRow, models: list[ModelRow], form: str) -> ModelRow:
    """Another form of the same model in the same mode."""
    return next(other for other in models if (other.model, other.mode, other.form) == (row.model, row.mode, form))


def say_model(row: ModelRow, models: list[ModelRow]) -> str:
    """A model's ratio, the interval, what is lost or won, and what its norms take by themselves, in parts."""
    lost = row.median_us - find_form(row, models, BUILT).median_us
    text = f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f}) {row.model}, {row.mode}, {row.form}: "
    text += f"{write_time(abs(lost))} {'longer' if lost > 0 else 'shorter'}"
    text += ", disturbed" if row.disturbed else ""
    parts = Parts(row.kernel_us, row.memory_us, row.call_us, 0.0)
    if not parts.whole:
        return text
    shares = f"{write_time(parts.whole)}, torch.nn's {write_time(row.torch_norms_us)}: {write_shares(parts.shares)}"
    return f"{text}; its {row.norms} norms by themselves take {shares}"
