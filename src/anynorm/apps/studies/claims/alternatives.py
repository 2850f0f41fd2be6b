"""Do layer, instance and group norm lift batch norm's limits? Every norm at an ordinary task and at four hard ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..fit import MOMENTUM, draw_order, evaluate, fit
from ..intervals import find_interval
from ..models import NotForThisData
from ..norms import CannotNormalize, NormFactory
from ..study import Find, Published, Results, Setting, Study, Trial, try_rates
from ..verdicts import Effect, Verdict, conclude, difference
from ..workers import Record
from .leak import draw_pure_batches

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARMS = ("none", "batch", "layer", "instance", "group")
SEARCH_SEED = 1001
GAIN, ALLOWED = 1.0, 1.0  # points of accuracy
CONTRASTS = (0.25, 0.5, 1.0, 2.0)  # an image is multiplied by one of them, which is its class


@dataclass(frozen=True)
class Task:
    """A column of the matrix: how it is called, the batch size of either half of training, its images, rates of SGD."""

    title: str
    sizes: tuple[int, int]
    images: int
    rates: tuple[float, ...]


USUAL, LOW = (0.03, 0.1, 0.3), (0.003, 0.01, 0.03)
TASKS = {
    "ordinary": Task("ordinary,\nbatch 32", (32, 32), 4800, USUAL),
    "contrast": Task("contrast\nis the class", (32, 32), 4800, USUAL),
    "batch 2": Task("batch 2", (2, 2), 2000, LOW),
    "one class": Task("batches of\none class", (50, 50), 10_000, LOW),
    "changing": Task("batch 32,\nthen 2", (32, 2), 2000, LOW),
}
LIMITS = ("batch 2", "one class", "changing")


def plan(setting: Setting, find: Find) -> Iterable[Trial]:
    """Each arm's rate by validation loss, task by task, then the seeds."""
    for name, task in TASKS.items():
        images = 200 if setting.quick else task.images
        for arm in setting.norms or ARMS:
            rates = task.rates[1:2] if setting.quick else task.rates
            trials = [Trial.of(arm, rate, SEARCH_SEED, search=True, task=name, images=images) for rate in rates]
            rate, search = try_rates(find, trials)
            yield from search
            if rate is not None:
                yield from (Trial.of(arm, rate, seed, task=name, images=images) for seed in range(setting.seeds))


def convolutions(norm: NormFactory, sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Convolutions of 16, 32 and 64 channels, stride 4, 2 and 2, each normalized before its ReLU; a dense output.

    The first has stride 1 on images of up to 16 pixels, or the last would have a single position.
    """
    if len(sample_shape) != 3 or min(sample_shape[1:]) < 5:
        raise NotForThisData(f"its network takes images, (N, C, H, W), 5 x 5 and more; a sample here is {sample_shape}")
    channels, height, width = sample_shape
    layers: list[nn.Module] = []
    for wide, size, stride in ((16, 5, 4 if min(height, width) > 16 else 1), (32, 3, 2), (64, 3, 2)):
        convolution = nn.Conv2d(channels, wide, size, stride, padding=size // 2)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        layers += [convolution, norm(wide, 2), nn.ReLU()]
        channels, height, width = wide, -(-height // stride), -(-width // stride)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, classes))


def draw_task(x: np.ndarray, y: np.ndarray, task: str, seed: int) -> tuple[Tensor, Tensor]:
    """Images and classes of a task; the contrast of an image depends on the seed alone."""
    if task != "contrast":
        return torch.from_numpy(x), torch.from_numpy(y)
    level = np.random.default_rng([seed, 4]).integers(len(CONTRASTS), size=len(x))
    factors = np.array(CONTRASTS, np.float32)[level].reshape(-1, *[1] * (x.ndim - 1))
    return torch.from_numpy((x - x.min()) * factors), torch.from_numpy(level)


def draw_task_batches(y: Tensor, task: str, images: int, seed: int) -> list[Tensor]:
    """Indices of every step's images."""
    first, second = TASKS[task].sizes
    if task == "one class":
        return draw_pure_batches(y, images // first, seed)
    halves = torch.from_numpy(draw_order(len(y), images, seed)).split(images // 2)
    return [*halves[0].split(first), *halves[1].split(second)]


def decay(network: nn.Module, rate: float, steps: int) -> torch.optim.Optimizer:
    """SGD whose rate falls to 0 in a straight line: at batch 2 accuracy would else move by points at every step."""
    optimizer = torch.optim.SGD(network.parameters(), rate, MOMENTUM)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


def perform(trial: Trial, setting: Setting) -> Record:
    """Train and test; a norm that cannot stand in the network has no accuracy."""
    data, task = setting.data, trial["task"]
    try:
        network = setting.build(trial.arm, trial.seed, convolutions)
    except CannotNormalize:
        return {"status": "finished", "accuracy": None, "loss": None}
    x, y = draw_task(data.train_x, data.train_y, task, 0)
    batches = draw_task_batches(y, task, trial["images"], trial.seed)
    status = fit(network, x, y, batches, decay(network, trial.rate, len(batches)))
    held_out = (data.validation_x, data.validation_y, 1) if trial.search else (data.test_x, data.test_y, 2)
    accuracy, loss = evaluate(network, *draw_task(*held_out[:2], task, held_out[2]))
    return {"status": status, "accuracy": 100 * accuracy, "loss": loss}


def choose_alternative(results: Results) -> str | None:
    """The norm without batch statistics that validates best at the limits, on average, each task at its best rate."""
    found = {}
    for arm in results.setting.norms or ARMS:
        best = []
        for task in LIMITS:
            rates = [r for r in results.where(arm=arm, task=task, search=True) if r["loss"] is not None]
            best += [min(rates, key=lambda record: record["loss"])["accuracy"]] if rates else []
        if arm not in ("none", "batch") and len(best) == len(LIMITS):
            found[arm] = float(np.mean(best))
    return max(found, key=lambda arm: found[arm], default=None)


def judge(results: Results) -> Verdict:
    """One alternative, chosen on validation images, against batch norm; the other norms beside."""
    chosen = choose_alternative(results) or "group"
    one = 100 / len(results.setting.data.test_x)

    def compare(arm: str, task: str, threshold: float = 0.0) -> Effect:
        values = [results.values("accuracy", arm=name, task=task) for name in (arm, "batch")]
        return Effect(f"accuracy, {task}: {arm} less batch", difference(*values), threshold, "points", one)

    effects = [compare(chosen, task, GAIN) for task in LIMITS] + [compare(chosen, "ordinary", -ALLOWED)]
    others = [arm for arm in results.setting.norms or ARMS if arm != "batch"]
    looked = [(arm, task) for task in TASKS for arm in others if arm != chosen or task == "contrast"]
    means = [np.mean(list(effect.values.values()) or [np.nan]) for effect in effects]
    parts = [f"{mean:+.1f} points ({name})" for name, mean in zip((*LIMITS, "ordinary"), means, strict=True)]
    sentence = f"{chosen.capitalize()} norm, chosen on validation images, against batch norm: {', '.join(parts)}."
    diverged = sorted({f"{r['arm']} ({r['task']})" for r in results.where(status="diverged")})
    notes = [f"Diverged: {', '.join(diverged)}."] if diverged else []
    arms, rows = results.setting.norms or ARMS, []
    for task in TASKS:
        seen = [list(results.values("accuracy", arm=arm, task=task).values()) for arm in arms]
        rows.append([task, *(f"{np.mean(values):.1f}" if values else "n/a" for values in seen)])
    tables = [("Test accuracy, %", ["task", *arms], rows)]
    return conclude(sentence, effects, beside=[compare(*pair) for pair in looked], notes=notes, tables=tables)


def paint(results: Results, axes: Axes) -> None:
    """A matrix of accuracies less the best of their column, with 95 % intervals."""
    arms, names = results.setting.norms or ARMS, list(TASKS)
    losses, texts = np.full((len(arms), len(names)), np.nan), {}
    for column, task in enumerate(names):
        seen = [results.values("accuracy", arm=arm, task=task) for arm in arms]
        best = max((values for values in seen if values), key=lambda v: np.mean(list(v.values())), default={})
        for row, values in enumerate(seen):
            interval = find_interval(list(difference(values, best).values()))
            if interval is None:
                texts[row, column] = "n/a"
                continue
            losses[row, column] = interval.mean
            half = "" if interval.high is None else f" ± {interval.high - interval.mean:.1f}"
            reached = f"best: {np.mean(list(values.values())):.1f} %"
            texts[row, column] = reached if values == best else f"{interval.mean:.1f}{half}"
    shown = axes.imshow(losses, cmap="Oranges_r", vmin=-20, vmax=0, aspect="auto")
    axes.grid(False)
    for (row, column), text in texts.items():
        dark = losses[row, column] < -12
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_xticks(range(len(names)), [task.title for task in TASKS.values()])
    axes.set_yticks(range(len(arms)), arms)
    axes.set(xlabel="task", ylabel="norm")
    bar = axes.figure.colorbar(shown, ax=axes, extend="min")
    bar.set_label("test accuracy less the best norm, points")


STUDY = Study(
    name="alternatives",
    title="Do layer, instance and group norm lift the limits of batch norm?",
    claim="“Several alternatives to batch normalization have been proposed, such as Layer Normalization, Instance "
    "Normalization, and Group Normalization. These alternatives can address some of the limitations of BN and may be "
    "more suitable for specific types of data or network architectures.” (Limitations and Alternatives)",
    design="A network of three convolutions is trained with every norm in five ways: in batches of 32; on images "
    "multiplied by one of four factors, which is to be named; in batches of 2; in batches of one class; in batches of "
    "32 that become 2 halfway. The limits of batch norm are the last three. The rate falls to 0 in a straight line. "
    "In the last norm a channel has 4 positions, so that a batch of 2 gives batch norm 8 values. Two designs were "
    "dropped: one with four times as many positions, after a look at one seed, because they hide the size of the "
    "batch; and one at a constant rate, because its intervals were 3 to 10 points wide either way and decided nothing. "
    "The alternative that is judged is the one with the best mean accuracy at the limits on validation images, by a "
    "seed that is not reported. Sequences have a study of their own.",
    rule=f"Confirmed if at each of the three limits the alternative is more than {GAIN:g} point of test accuracy above "
    f"batch norm, and in ordinary training no more than {ALLOWED:g} point below it. Refuted if one of the four is "
    "below. The four intervals hold together at 95 %.",
    published=(
        Published(
            "Wu and He 2018, arXiv:1803.08494, table 1",
            "ResNet-50 at 32 images for each statistic: error of layer norm 1.7 points above batch norm's, instance "
            "norm 4.8, group norm 0.5",
        ),
        Published(
            "Wu and He 2018, table 2",
            "at 2 images for each statistic: batch norm 34.7 % error, group norm 24.1 %",
        ),
    ),
    differs="A small network, few images and a short training; the paper changes the images of one statistic, here the "
    "batch of the step changes with them.",
    plan=plan,
    perform=perform,
    judge=judge,
    paint=paint,
    refuses={"full": "there is no published size of it"},
    size=(8.5, 4.2),
)
