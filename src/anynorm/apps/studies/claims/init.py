"""Does batch normalization make training less dependent on how large the weights are at the start?"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..fit import draw_batches, fit_to_level
from ..models import dense
from ..plots import draw_steps, split_axes
from ..study import Find, Published, Results, Setting, Study, Trial, try_rates
from ..verdicts import INCONCLUSIVE, Effect, Verdict, conclude, difference
from ..workers import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARMS = ("none", "batch", "layer")  # the first is the baseline, the second is judged
DEPTHS = (6, 10)
GAINS = tuple(float(10 ** (half / 2)) for half in range(-4, 4))
STEP = 0.5  # decades from one gain to the next
RATES = (0.001, 0.01, 0.1, 1.0)
BATCH, MOST, SEARCH_SEED = 60, 250, 1001
LEVEL = 0.7  # share of right answers: it learns
WIDER = 1.0  # decades of workable gains, batch less none


def start_scaled(weight: Tensor, gain: float) -> None:
    """He's start, times a gain."""
    nn.init.kaiming_normal_(weight, nonlinearity="relu")
    with torch.no_grad():
        weight.mul_(gain)


def plan(setting: Setting, find: Find) -> Iterable[Trial]:
    """At each gain each arm's best rate from one seed, then the seeds; arms that are shown beside at one depth."""
    most, gains, rates = (20, GAINS[1:8:3], RATES[2:3]) if setting.quick else (MOST, GAINS, RATES)
    for place, arm in enumerate(setting.norms or ARMS):
        for depth in DEPTHS if place < 2 else DEPTHS[1:]:
            for gain in gains:
                options: dict[str, Any] = {"depth": depth, "gain": gain, "most": most}
                trials = [Trial.of(arm, rate, SEARCH_SEED, search=True, **options) for rate in rates]
                best, search = try_rates(find, trials, by="cost")
                yield from search
                if best is not None:
                    yield from (Trial.of(arm, best, seed, **options) for seed in range(setting.seeds))


def perform(trial: Trial, setting: Setting) -> Record:
    """Steps until the level is reached: on validation data in the search, else on test data."""
    own = partial(dense, depth=trial["depth"], start=partial(start_scaled, gain=trial["gain"]))
    network = setting.build(trial.arm, trial.seed, own)
    batches = draw_batches(len(setting.data.train_x), BATCH, trial["most"], trial.seed)
    return fit_to_level(network, setting.data, batches, trial.rate, LEVEL, search=trial.search)


def judge(results: Results) -> Verdict:
    """The width of the gains at which the network learns, at each depth."""
    arms = results.setting.norms or ARMS
    first, *others = arms
    if not any(record["reached"] for record in results.records):
        return Verdict(INCONCLUSIVE, f"No network reached {100 * LEVEL:g} % in {MOST:,} steps at any gain or rate.")
    widths = {(arm, d): results.find_width(STEP, arm=arm, depth=d) for arm in arms for d in DEPTHS}
    widths = {key: width for key, width in widths.items() if width}
    wider = {
        (arm, depth): Effect(
            f"workable gains, {arm} less {first}, {depth} layers", difference(width, widths[first, depth]), WIDER,
            "decades", STEP / 6**0.5,
        )
        for (arm, depth), width in widths.items() if arm != first
    }  # fmt: skip
    effects = [effect for (arm, _), effect in wider.items() if arm == others[0]]
    beside = [effect for (arm, _), effect in wider.items() if arm != others[0]]
    means = {key: float(np.mean(list(width.values()))) for key, width in widths.items()}
    text = "; ".join(
        f"{depth} layers: {', '.join(f'{mean:.2f} with {arm}' for (arm, d), mean in means.items() if d == depth)}"
        for depth in DEPTHS
    )
    sentence = f"Decades of gain of the first weights at which the network learns, of {STEP * len(GAINS):g}. {text}."
    counts = {arm: [record["status"] == "diverged" for record in results.where(arm=arm)] for arm in arms}
    notes = [f"Diverged: {', '.join(f'{a} {sum(c)} of {len(c)}' for a, c in counts.items())}."]
    rows = [
        (arm, str(depth), *(f"{results.best_rate('cost', arm=arm, depth=depth, gain=gain):g}" for gain in GAINS))
        for arm, depth in widths
        if not results.setting.quick
    ]
    heads = ("norm", "layers", *(f"gain {gain:.2g}" for gain in GAINS))
    return conclude(sentence, effects, beside=beside, notes=notes, tables=[("The best rate at each gain", heads, rows)])


def paint(results: Results, axes: Axes) -> None:
    """Steps to the level against the gain."""
    for panel, depth in zip(split_axes(axes, len(DEPTHS)), DEPTHS, strict=True):
        records = results.where(depth=depth)
        present = [arm for arm in results.setting.norms or ARMS if any(record["arm"] == arm for record in records)]
        draw_steps(panel, records, present, "gain")
        panel.set(xlabel="weights at the start, of He's", title=f"{depth} layers")
        panel.set_ylabel(f"steps to {100 * LEVEL:g} % accuracy")
    panel.legend(frameon=False, loc="lower left")


STUDY = Study(
    name="init",
    title="Does batch norm make training less dependent on the initial weights?",
    claim="“Reduced dependence on initialization: BN reduces the sensitivity of the model to the initial values of the "
    "weights, making it less likely to get stuck in poor local minima.” (Advantages of Batch Normalization)",
    design=f"Networks of {DEPTHS[0]} and {DEPTHS[1]} dense layers of 100 ReLU units; all weights, those of the output "
    f"too, start as He's times a gain of 0.01 to 31.6, by half decades. At each gain each arm has its best of the "
    f"rates {', '.join(f'{rate:g}' for rate in RATES)}, chosen on validation images with a seed of its own. A gain is "
    f"workable if {100 * LEVEL:g} % of the test images are right within {MOST} steps of {BATCH} images.",
    rule=f"Confirmed if with batch norm the workable gains span more than {WIDER:g} decade more than without a norm, "
    "at both depths. Refuted if at one of them they span less than that. Both intervals together 95 %.",
    published=(
        Published(
            "Ioffe and Szegedy 2015, arXiv:1502.03167, section 3.3",
            "BN((aW)u) = BN(Wu): the scale of the weights changes neither the output nor what goes back to the input; "
            "the gradient of the weights is divided by a",
        ),
    ),
    differs="The paper has no experiment on it. That the gradient is divided by a means that the gain still changes "
    "the best rate, by its square; the grid of rates is wide, but not as wide as the squares of the gains.",
    plan=plan,
    perform=perform,
    judge=judge,
    paint=paint,
    refuses={"model": "it scales the weights of networks of its own, of several depths"},
)
