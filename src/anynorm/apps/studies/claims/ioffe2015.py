"""Ioffe and Szegedy 2015, figure 1: three layers of 100 sigmoid units on MNIST, with and without batch norm."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..fit import draw_batches, evaluate, find_status, fit_steps, observe
from ..models import dense
from ..plots import COLOURS, split_axes
from ..study import Find, Published, Results, Setting, Study, Trial
from ..verdicts import Effect, Verdict, conclude, difference
from ..workers import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARMS = ("none", "batch")
BATCH, RATE, STEPS, FULL_STEPS, LOOKS = 60, 0.05, 9_000, 50_000, 30
HIGHER = 1.0  # points of test accuracy, on average over the steps
STEADIER = 0.0  # log2 of the movement of a unit's input, none over batch
PERCENTILES = (15, 50, 85)
NETWORK = partial(dense, activation=nn.Sigmoid, start=partial(nn.init.normal_, std=0.1))


def plan(setting: Setting, find: Find) -> Iterable[Trial]:
    """Both networks from the same weights in the same order of images, at one rate, as published."""
    steps = FULL_STEPS if setting.full else 300 if setting.quick else STEPS
    for seed in range(setting.seeds):
        yield from (Trial.of(arm, RATE, seed, steps=steps) for arm in ARMS)


def perform(trial: Trial, setting: Setting) -> Record:
    """Test accuracy and the percentiles of one unit's input in the last hidden layer, at even steps."""
    network = setting.build(trial.arm, trial.seed, NETWORK)
    assert isinstance(network, nn.Sequential)
    (x, y), test = setting.data.tensors("train"), setting.data.tensors("test")
    optimizer = torch.optim.SGD(network.parameters(), lr=trial.rate)
    every, loss = trial["steps"] // LOOKS, 0.0
    curve: dict[str, list[float]] = {"step": [], "accuracy": [], **{str(p): [] for p in PERCENTILES}}
    batches = draw_batches(len(x), BATCH, trial["steps"], trial.seed)
    for step, loss in enumerate(fit_steps(network, x, y, batches, optimizer), 1):  # noqa: B007 # the last one is used
        if step % every == 0:
            # The norm stands before the last sigmoid, which stands before the output.
            inputs = observe(network, network[-3], test[0], training=True)[:, 0].numpy()
            curve["step"].append(step)
            curve["accuracy"].append(100 * evaluate(network, *test)[0])
            for p in PERCENTILES:
                curve[str(p)].append(float(np.percentile(inputs, p)))
    return {
        "status": find_status(loss),
        "accuracy": float(np.mean(curve["accuracy"])),
        "last": curve["accuracy"][-1],
        "log_movement": find_movement(curve),
        "curve": curve,
    }


def find_movement(curve: dict[str, list[float]]) -> float:
    """log2 of how far a unit's median input moves between looks, in units of its mean spread (85th less 15th)."""
    spread = np.mean(np.subtract(curve["85"], curve["15"]))
    return float(np.log2(np.mean(np.abs(np.diff(curve["50"]))) / spread))


def judge(results: Results) -> Verdict:
    """Accuracy over the whole training, and how steadily the unit's input is distributed."""
    gain = difference(*(results.values("accuracy", arm=arm) for arm in reversed(ARMS)))
    moved = difference(*(results.values("log_movement", arm=arm) for arm in ARMS))
    last = {arm: results.values("last", arm=arm) for arm in ARMS}
    one = 100 / len(results.setting.data.test_x)
    effects = [
        Effect("test accuracy on average over training, batch less none", gain, HIGHER, "points", one),
        Effect("log2 of the movement of a unit's median input, none over batch", moved, STEADIER),
    ]
    beside = [
        Effect("test accuracy at the end, batch less none", difference(last["batch"], last["none"]), 0.0, "points", one)
    ]
    means = {arm: np.mean(list(values.values())) for arm, values in last.items()}
    steps = results.records[0]["steps"]
    mean, times = np.mean(list(gain.values())), 2 ** np.mean(list(moved.values()))
    sentence = (
        f"After {steps:,} steps {means['batch']:.1f} % of the test images are right with batch norm and "
        f"{means['none']:.1f} % without; on average over training the difference is {mean:+.1f} points, and a unit's "
        f"input moves {times:.2g} times as much without."
    )
    return conclude(sentence, effects, beside=beside)


def paint(results: Results, axes: Axes) -> None:
    """The three panels of the figure: accuracy, and the percentiles without and with batch norm (seed 0)."""
    left, *panels = split_axes(axes, 3)
    for arm in ARMS:
        curves = [record["curve"] for record in results.where(arm=arm)]
        mean = np.mean([curve["accuracy"] for curve in curves], axis=0)
        left.plot(curves[0]["step"], mean, color=COLOURS[arm], label=arm)
    left.set(xlabel="steps", ylabel="test accuracy, %")
    left.legend(frameon=False)
    for panel, arm in zip(panels, ARMS, strict=True):
        curve = results.where(arm=arm)[0]["curve"]
        for p in PERCENTILES:
            panel.plot(curve["step"], curve[str(p)], color=COLOURS[arm], linewidth=2.2 if p == 50 else 1.0)
        panel.set(xlabel="steps", ylabel="a unit's input: 15, 50, 85 %", title=arm)


STUDY = Study(
    name="ioffe2015",
    title="Ioffe and Szegedy's figure 1: does batch norm train a sigmoid network sooner, with steadier inputs?",
    claim="“The primary goal of batch normalization is to address the issue of internal covariate shift, which occurs "
    "when the distribution of input features to a given layer changes during training, making it difficult for the "
    "model to converge.” (Introduction)",
    design=f"784-100-100-100-10 with sigmoid units, Gaussian weights of standard deviation 0.1, biases 0, batches of "
    f"{BATCH}, plain gradient descent at rate {RATE:g}, {STEPS:,} steps ({FULL_STEPS:,} with --full). At {LOOKS} even "
    "steps the test images are classified, and the 15th, 50th and 85th percentiles over them of the input of one unit "
    "of the last hidden layer are taken, as in the figure; with batch norm in training mode, as while it learns.",
    rule=f"Confirmed if, on average over training, test accuracy with batch norm is more than {HIGHER:g} point higher, "
    "and if the unit's median input moves more, in units of its spread, without it. Refuted if one of them is below. "
    "Both intervals together 95 %.",
    published=(
        Published(
            "Ioffe and Szegedy 2015, arXiv:1502.03167, figure 1",
            "a curve: with batch norm higher test accuracy at 50,000 steps, reached sooner, and steadier percentiles",
        ),
    ),
    differs="The 3,500 training images that are here, not 60,000; the paper gives neither rate nor standard deviation, "
    "so both were fixed beforehand; fewer steps by default.",
    plan=plan,
    perform=perform,
    judge=judge,
    paint=paint,
    has_published_size=True,
    seeds=4,
    size=(11.0, 3.6),
    refuses={"model": "the published network is what is repeated", "norms": "the published pair is what is repeated"},
)
