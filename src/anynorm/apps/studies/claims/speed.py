"""Does batch normalization converge faster, and does it allow higher learning rates?"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ..fit import LEVEL_EVERY, draw_batches, fit_to_level
from ..models import dense
from ..plots import draw_steps, split_axes
from ..study import Find, Published, Results, Setting, Study, Trial, try_rates
from ..verdicts import INCONCLUSIVE, Effect, Verdict, conclude, difference
from ..workers import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARMS = ("none", "batch", "layer")  # the first is the baseline, the second is judged
RATES = tuple(float(10 ** (half / 2)) for half in range(-4, 4))
STEP = 0.5  # decades from one rate to the next
BATCH, MOST, SEARCH_SEED = 60, 1000, 1001
LEVEL = 0.9  # share of right answers
BESIDE_SEEDS = 2  # of the whole sweep of an arm that is shown beside
FASTER, WIDER = 0.0, 0.5  # decades: of steps, none over batch; of workable rates, batch less none

VERSIONS = {
    "sigmoid": partial(dense, activation=nn.Sigmoid, start=nn.init.xavier_uniform_),
    "ReLU": partial(dense, activation=nn.ReLU, start=partial(nn.init.kaiming_normal_, nonlinearity="relu")),
}


def find_versions(setting: Setting) -> tuple[str, ...]:
    """The networks: the first decides."""
    return tuple(VERSIONS) if setting.model is None else (setting.model,)


def plan(setting: Setting, find: Find) -> Iterable[Trial]:
    """Each arm's best rate from one seed, then all rates for the pair that is judged and fewer for those beside."""
    most, rates = (60, RATES[2:7:2]) if setting.quick else (MOST, RATES)
    for version in find_versions(setting):
        for place, arm in enumerate(setting.norms or ARMS):
            options: dict[str, Any] = {"version": version, "most": most}
            trials = [Trial.of(arm, rate, SEARCH_SEED, search=True, **options) for rate in rates]
            best, search = try_rates(find, trials, by="cost")
            yield from search
            for seed in range(setting.seeds):
                swept = rates if place < 2 or seed < BESIDE_SEEDS else (best,)
                yield from (Trial.of(arm, rate, seed, **options) for rate in swept if rate is not None)


def perform(trial: Trial, setting: Setting) -> Record:
    """Steps and seconds of training until the level is reached: on validation data in the search, else on test data."""
    network = setting.build(trial.arm, trial.seed, VERSIONS.get(trial["version"], "mlp"))
    batches = draw_batches(len(setting.data.train_x), BATCH, trial["most"], trial.seed)
    return fit_to_level(network, setting.data, batches, trial.rate, LEVEL, search=trial.search)


def find_effects(results: Results, version: str, first: str, other: str) -> list[Effect]:
    """Steps at the best rates, workable rates, then what is beside: the baseline's best rate, and seconds."""
    best = {arm: results.best_rate("cost", arm=arm, version=version) for arm in (first, other)}

    def ratio(key: str, rate: float) -> dict[int, float]:
        slow = results.values(key, arm=first, version=version, rate=best[first])
        return difference(slow, results.values(key, arm=other, version=version, rate=rate))

    widths = difference(*(results.find_width(STEP, arm=arm, version=version) for arm in (other, first)))
    over, least = f"{first} over {other}, {version}", LEVEL_EVERY / 100 / 6**0.5
    return [
        Effect(f"log10 of steps to the level, each at its best rate, {over}", ratio("log_steps", best[other]), FASTER,
               "decades", least),
        Effect(f"workable rates, {other} less {first}, {version}", widths, WIDER, "decades", STEP / 6**0.5),
        Effect(f"log10 of steps, both at the best rate of {first}, {over}", ratio("log_steps", best[first]), 0.0,
               "decades", least),
        Effect(f"log10 of seconds, each at its best rate, {over}", ratio("log_seconds", best[other]), 0.0, "decades"),
    ]  # fmt: skip


def judge(results: Results) -> Verdict:
    """Both parts of the claim on the first network; other networks and norms beside."""
    arms, versions = results.setting.norms or ARMS, find_versions(results.setting)
    first, *others = arms
    if not any(record["reached"] for record in results.records):
        return Verdict(INCONCLUSIVE, f"No network reached {100 * LEVEL:g} % in {MOST:,} steps at any rate.")
    effects: list[Effect] = []
    beside: list[Effect] = []
    for version in versions:
        for place, other in enumerate(others):
            found = find_effects(results, version, first, other)
            effects += found[: 2 * (version == versions[0] and place == 0)]
            beside += found if place == 0 and version != versions[0] else found[2:] if place == 0 else found[:2]
    said = []
    for version in versions:
        for arm in arms:
            rate = results.best_rate("cost", arm=arm, version=version)
            steps = 10 ** np.mean(list(results.values("log_steps", arm=arm, version=version, rate=rate).values()))
            width = np.mean(list(results.find_width(STEP, arm=arm, version=version).values()))
            said.append((version, arm, f"{rate:.3g}", f"{steps:.0f}", f"{width:.2f}"))
    text = "; ".join(
        f"{version}: {', '.join(f'{row[1]} {row[3]} steps and {row[4]} decades' for row in said if row[0] == version)}"
        for version in versions
    )
    sentence = f"Steps to {100 * LEVEL:g} % at the best rate, and the width of the rates that reach it. {text}."
    counts = {arm: [r["status"] == "diverged" for r in results.where(arm=arm)] for arm in arms}
    notes = [f"Diverged, over all rates: {', '.join(f'{a} {sum(c)} of {len(c)}' for a, c in counts.items())}."]
    heads = ("network", "norm", "best rate", "steps", "workable, decades")
    return conclude(sentence, effects, beside=beside, notes=notes, tables=[("At the best rate", heads, said)])


def paint(results: Results, axes: Axes) -> None:
    """Steps to the level against the rate; the top line is the budget, where the level was never reached."""
    versions = find_versions(results.setting)
    for panel, version in zip(split_axes(axes, len(versions)), versions, strict=True):
        draw_steps(panel, results.where(version=version), results.setting.norms or ARMS, "rate")
        panel.set(xlabel="learning rate", title=version, ylabel=f"steps to {100 * LEVEL:g} % accuracy")
    panel.legend(frameon=False, loc="lower left")


STUDY = Study(
    name="speed",
    title="Does batch norm converge faster, and over a wider range of learning rates?",
    claim="“Faster convergence: BN helps to stabilize the training process, allowing for the use of higher learning "
    "rates and leading to faster convergence.” (Advantages of Batch Normalization)",
    design=f"Three dense layers of 100 units, batches of {BATCH}, plain gradient descent, rates 0.01 to 31.6 by half "
    f"decades. Sigmoid units with Xavier's start decide, as in the paper's first experiment; ReLU with He's start is "
    f"the fair baseline beside. Training ends when {100 * LEVEL:g} % of the test images are right, asked every "
    f"{LEVEL_EVERY} steps, or after {MOST:,} steps, which then count. The best rate of each arm is that of "
    "the fewest steps on validation images with a seed of its own.",
    rule="Confirmed if without a norm it takes more steps than with batch norm, each at its best rate (the ratio's "
    f"interval lies above 1), and if the rates that reach the level span more than {WIDER:g} decades more with batch "
    "norm. Refuted if one of them is below. Both intervals together 95 %. Seconds decide nothing.",
    published=(
        Published(
            "Ioffe and Szegedy 2015, arXiv:1502.03167, figure 3",
            "Inception on ImageNet to 72.2 %: 31.0 M steps without, 13.3 M with batch norm at the same rate (2.3 "
            "times), 2.1 M at 5 times the rate with other changes (14.8 times)",
        ),
        Published("Bjorck et al. 2018", "reported by others: no gap at an equal small rate; larger rates are the gain"),
    ),
    differs="A small network and 3,500 images; the level is far below the best accuracy, so it is early speed that is "
    "measured.",
    plan=plan,
    perform=perform,
    judge=judge,
    paint=paint,
)
