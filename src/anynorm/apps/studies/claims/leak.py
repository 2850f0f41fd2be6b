"""Does batch normalization let a sample see its batch mates? Batches of one class, as a file sorted by class gives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..fit import draw_batches, evaluate, fit
from ..intervals import find_interval
from ..plots import dots
from ..study import Find, Published, Results, Setting, Study, Trial, try_rates
from ..verdicts import Effect, Verdict, conclude, difference
from ..workers import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARMS = ("batch", "group", "layer")
RATES = (0.003, 0.01, 0.03, 0.1)
BATCH, STEPS, SEARCH_SEED = 50, 400, 1001
ENOUGH, MARGIN = 10.0, 10.0  # points of accuracy


def draw_pure_batches(labels: Tensor, steps: int, seed: int) -> list[Tensor]:
    """Batches of one class each, the classes in a random order that begins anew when all had their turn."""
    generator = np.random.default_rng([seed, 2])
    members = [np.flatnonzero(labels.numpy() == label) for label in range(int(labels.max()) + 1)]
    turns = np.concatenate([generator.permutation(len(members)) for _ in range(-(-steps // len(members)))])
    return [torch.from_numpy(generator.choice(members[turn], BATCH)) for turn in turns[:steps]]


def plan(setting: Setting, find: Find) -> Iterable[Trial]:
    """Each arm's rate by validation loss, class-pure batches and shuffled ones apart, then the seeds."""
    steps = 40 if setting.quick else STEPS
    rates = RATES[:1] if setting.quick else RATES
    for arm in setting.norms or ARMS:
        for pure in (True, False):
            trials = [Trial.of(arm, rate, SEARCH_SEED, search=True, pure=pure, steps=steps) for rate in rates]
            rate, search = try_rates(find, trials)
            yield from search
            if rate is not None:
                yield from (Trial.of(arm, rate, seed, pure=pure, steps=steps) for seed in range(setting.seeds))


def perform(trial: Trial, setting: Setting) -> Record:
    """Train, then measure the same class-pure batches in training mode and in evaluation mode."""
    data, steps = setting.data, trial["steps"]
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    network = setting.build(trial.arm, trial.seed, "mlp")
    batches = (
        draw_pure_batches(y, steps, trial.seed) if trial["pure"] else draw_batches(len(x), BATCH, steps, trial.seed)
    )
    status = fit(network, x, y, batches, trial.rate)
    if trial.search:
        x, y = torch.from_numpy(data.validation_x), torch.from_numpy(data.validation_y)
        if trial["pure"]:
            order = torch.cat(draw_pure_batches(y, 10, 0))
            x, y = x[order], y[order]
        return {"status": status, "loss": evaluate(network, x, y, batch=BATCH, training=True)[1]}
    test_x, test_y = torch.from_numpy(data.test_x), torch.from_numpy(data.test_y)
    order = torch.cat(draw_pure_batches(test_y, 20, 0))
    seen = evaluate(network, test_x[order], test_y[order], batch=BATCH, training=True)[0]
    return {"status": status, "seen": 100 * seen, "accuracy": 100 * evaluate(network, test_x[order], test_y[order])[0]}


def judge(results: Results) -> Verdict:
    """What training mode shows more than evaluation mode, and how much more than group norm shows."""
    arms = results.setting.norms or ARMS
    first, *others = arms
    gaps = {arm: difference(*(results.values(key, arm=arm, pure=True) for key in ("seen", "accuracy"))) for arm in arms}
    one = 100 / len(results.setting.data.test_x)
    name = "accuracy in training mode less evaluation mode"
    effects = [Effect(f"{name}, {first}", gaps[first], ENOUGH, "points", one)]
    effects += [
        Effect(f"that gap, {first} less {other}", difference(gaps[first], gaps[other]), MARGIN, "points", one)
        for other in others[:1]
    ]
    beside = [Effect(f"{name}, {arm}", gaps[arm], 0.0, "points", one) for arm in others]
    means = {arm: find_interval(list(gaps[arm].values())) for arm in arms}
    text = (
        ", ".join(f"{mean.mean:+.1f} points with {arm} norm" for arm, mean in means.items() if mean) or "nothing known"
    )
    sentence = f"On batches of one class, accuracy in training mode is above that in evaluation mode by {text}."
    return conclude(sentence, effects, beside=beside)


def paint(results: Results, axes: Axes) -> None:
    """Both modes, for batches of one class and for shuffled ones."""
    arms = results.setting.norms or ARMS
    places = [(arm, pure) for pure in (True, False) for arm in arms]
    for shift, key, mode in ((-0.1, "seen", "training mode"), (0.1, "accuracy", "evaluation mode")):
        found = [results.values(key, arm=arm, pure=pure) for arm, pure in places]
        dots(axes, found, mode, places=[place + shift for place in range(len(places))])
    axes.set_xticks(range(len(places)), [f"{arm}\n{'one class' if pure else 'shuffled'}" for arm, pure in places])
    axes.set(ylabel="test accuracy, %", ylim=(0, 101))
    axes.legend(frameon=False)


STUDY = Study(
    name="leak",
    title="Does a sample's output depend on its batch mates?",
    claim="“Calculate the mean and variance of the outputs for each feature map across the mini-batch.” (Batch "
    "Normalization Algorithm, step 1)",
    design="A fully connected network, 3 x 100, is trained on batches of 50 MNIST images of one class each, as where a "
    "sorted file is not shuffled. Test images in such batches are then classified in training mode and in evaluation "
    "mode. Where statistics are over the batch, mates tell the class; evaluation cannot. Each arm has its own best "
    "of four rates, by the loss on validation images in batches and mode of the training: what one who did not shuffle "
    "sees. A first design chose by the loss in evaluation mode and was dropped after two trials: where evaluation is "
    "lost at every rate, it prefers the rate at which batch norm learns least.",
    rule=f"Confirmed if, on class-pure batches, batch norm's accuracy in training mode is more than {ENOUGH:g} points "
    f"above evaluation mode, and that gap more than {MARGIN:g} points above group norm's. Refuted if one of them is "
    "below. Both intervals together 95 %.",
    published=(
        Published(
            "Wu and Johnson 2021, arXiv:2105.07576", "names the leak of batch statistics among batch norm's pitfalls"
        ),
    ),
    differs="A small network and real digits; the paper's examples are of detection and contrastive learning.",
    plan=plan,
    perform=perform,
    judge=judge,
    paint=paint,
)
