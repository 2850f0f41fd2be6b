"""Does batch normalization's noise regularize? Noise of several sizes, and batch normalization without any."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import anynorm

from ..fit import draw_batches, evaluate, find_status, fit_steps
from ..norms import NormFactory, choose_groups, ghosts
from ..plots import COLOURS, MARKERS, dots
from ..study import Find, Published, Results, Setting, Study, Trial, try_rates
from ..verdicts import Effect, Verdict, conclude, difference, say_mean
from ..workers import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENOUGH = 0.5  # points of error: what group norm lacks against batch norm at 32 images in Wu and He
IMAGES, BATCH, STEPS, EVERY = 500, 128, 200, 20
RATES, SEARCH_SEEDS = (0.01, 0.03, 0.1), (1001, 1002)
NONE = 0  # the size that stands for no noise
SIZES: dict[str, tuple[int, ...]] = {"batch": (8, 16, 32, 64, 128, NONE), "group": (8, 32, 128, NONE)}
CELLS: list[tuple[str, int]] = [(arm, size) for arm, sizes in SIZES.items() for size in sizes]


class WholeSet(nn.Module):
    """Outputs for some of the training images, normalized by the statistics of all: no image's mates are chance.

    Gradients go through these statistics to all images, so that they are those of one fixed function of the weights.
    """

    network: nn.Module
    images: Tensor

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.network, self.images = network, images

    def forward(self, chosen: Tensor) -> Tensor:
        y: Tensor = self.network(self.images)[chosen]
        return y


class NoisyGroupNorm(nn.Module):
    """Group norm, then, in training, the errors of mean and deviation that statistics over `size` samples have.

    y = gamma * (center + (x - center - std * e) / s) + beta, e ~ N(0, 1/n), s^2 ~ chi^2(n - 1) / n

    x is normalized; center and std are each channel's over the batch, without gradient; e and s are drawn for each
    channel and each `size` samples, and n is the number of their values, as if these were independent and normal.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, num_features: int, size: int) -> None:
        super().__init__()
        self.norm: nn.GroupNorm = anynorm.GroupNorm(choose_groups(num_features), num_features, affine=False)
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        channels = (1, -1, *[1] * (x.dim() - 2))
        return (self.add_noise(x) if self.training else x) * self.weight.view(channels) + self.bias.view(channels)

    def add_noise(self, x: Tensor) -> Tensor:
        """x with the errors."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        center, std = x.detach().mean(axes, keepdim=True), x.detach().std(axes, correction=0, keepdim=True)
        count = self.size * prod(x.shape[2:])
        shape = (-(-len(x) // self.size), x.shape[1], *[1] * (x.dim() - 2))
        error = std * torch.randn(shape) / count**0.5
        # A chi-squared of k degrees is a gamma of k / 2, doubled.
        scale = (2 * torch._standard_gamma(torch.full(shape, (count - 1) / 2)) / count).sqrt()
        error, scale = (each.repeat_interleave(self.size, 0)[: len(x)] for each in (error, scale))
        return center + (x - center - error) / scale


def make_norm(arm: str, size: int) -> str | NormFactory:
    """The norm of an arm; without noise batch norm is as ever, and the whole set goes through it."""
    if size == NONE:
        return arm
    return ghosts(size, BATCH) if arm == "batch" else lambda num_features, dims: NoisyGroupNorm(num_features, size)


def plan(setting: Setting, find: Find) -> Iterable[Trial]:
    """Each cell's rate by validation loss over two seeds, then the seeds."""
    rates, tries, steps = (RATES[:1], SEARCH_SEEDS[:1], 2 * EVERY) if setting.quick else (RATES, SEARCH_SEEDS, STEPS)
    for arm, size in CELLS:
        trials = [Trial.of(arm, r, s, search=True, size=size, steps=steps) for r in rates for s in tries]
        rate, search = try_rates(find, trials)
        yield from search
        if rate is not None:
            yield from (Trial.of(arm, rate, seed, size=size, steps=steps) for seed in range(setting.seeds))


def perform(trial: Trial, setting: Setting) -> Record:
    """Train; errors and losses at the end, and where the loss on validation images was least."""
    data, size, steps = setting.data, trial["size"], trial["steps"]
    x, y = (torch.from_numpy(part)[:IMAGES] for part in (data.train_x, data.train_y))
    network = setting.build(make_norm(trial.arm, size), trial.seed, "mlp")
    plain = setting.build("batch", trial.seed, "mlp") if trial.arm == "batch" else network
    whole = trial.arm == "batch" and size == NONE
    trained, samples = (WholeSet(network, x), torch.arange(len(x))) if whole else (network, x)
    torch.manual_seed(trial.seed)
    points: list[Record] = []
    batches = draw_batches(len(x), BATCH, steps, trial.seed)
    for step, loss in enumerate(fit_steps(trained, samples, y, batches, trial.rate), 1):
        status = find_status(loss)
        if step % EVERY == 0 or status == "diverged":
            points.append(measure(network, plain, trial, setting))
    end = points[-1]
    if trial.search:
        return {"status": status, "loss": end["validation_loss"]}
    best = min(points, key=lambda point: float("inf") if point["validation_loss"] is None else point["validation_loss"])
    return {"status": status, **end, **{f"best_{name}": value for name, value in best.items()}}


def measure(network: nn.Module, plain: nn.Module, trial: Trial, setting: Setting) -> Record:
    """Errors in percent and losses, batch norm by the statistics of all training images; test only where it counts."""
    data = setting.data
    parts = ("train", "validation") if trial.search else ("train", "validation", "test")
    if plain is not network:
        plain.load_state_dict(network.state_dict())
        with contextlib.suppress(FloatingPointError):  # Where training diverged, nothing can be estimated.
            anynorm.recalibrate(plain, [torch.from_numpy(data.train_x)[:IMAGES]], progress=False)
    found: Record = {}
    for part in parts:
        count = IMAGES if part == "train" else None
        x, y = (torch.from_numpy(getattr(data, f"{part}_{name}"))[:count] for name in "xy")
        accuracy, loss = evaluate(plain, x, y)
        found |= {f"{part}_error": 100 * (1 - accuracy), f"{part}_loss": loss}
    if not trial.search and found["test_loss"] is not None and found["train_loss"] is not None:
        found["gap"] = found["test_loss"] - found["train_loss"]
    return found


def find_best_size(results: Results, arm: str) -> int:
    """The size of noise whose networks of the search, at their best rate, have the least loss on validation images."""
    losses: dict[int, float] = {}
    for size in SIZES[arm][:-1]:
        final = results.where(arm=arm, size=size)
        tried = results.where(search=True, arm=arm, size=size, rate=final[0]["rate"]) if final else []
        found = [float("inf") if record["loss"] is None else record["loss"] for record in tried]
        losses[size] = float(np.mean(found)) if found else float("inf")
    return min(losses, key=lambda size: losses[size])


def judge(results: Results) -> Verdict:
    """Errors without noise less errors with the noise that validation chose."""
    best, noisy_group = find_best_size(results, "batch"), ("group", find_best_size(results, "group"))
    silent, noisy, group = ("batch", NONE), ("batch", best), ("group", NONE)

    def less(name: str, first: tuple[str, int], second: tuple[str, int], key: str = "test_error") -> Effect:
        values = difference(*(results.values(key, arm=arm, size=size) for arm, size in (first, second)))
        if not key.endswith("error"):
            return Effect(name, values)
        threshold = ENOUGH if first == silent else 0.0
        return Effect(f"test error, {name}", values, threshold, "points", 100 / len(results.setting.data.test_x))

    name = f"batch norm without noise less with that of {best} images"
    effects = [less(f"{name}, at the end", silent, noisy)]
    beside = [
        less(f"{name}, at the best validation", silent, noisy, "best_test_error"),
        less(f"test less training loss, {name}", silent, noisy, "gap"),
        less(f"test loss, {name}", silent, noisy, "test_loss"),
        less(f"batch norm of all {BATCH} images less of {best}", ("batch", BATCH), noisy),
        less(f"group norm less with the noise of {noisy_group[1]} images", group, noisy_group),
        less("group norm less batch norm without noise", group, silent),
    ]
    interval = effects[0].interval()
    mean = interval.mean if interval else float("nan")
    sentence = (
        f"Without noise batch norm's test error is {mean:+.2g} points from that with the noise that validation chose, "
        f"of {best} images."
    )
    return conclude(sentence, effects, beside=beside, notes=say_notes(results), tables=[write_table(results)])


def name_cell(arm: str, size: int) -> str:
    """A cell in words."""
    return f"{arm}, {'no noise' if size == NONE else f'noise of {size}'}"


def say_notes(results: Results) -> list[str]:
    """What diverged."""
    found = {(r["arm"], r["size"]) for r in results.records if r["status"] == "diverged"}
    return [f"Diverged in some trial: {'; '.join(name_cell(*cell) for cell in sorted(found))}."] if found else []


def write_table(results: Results) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """What was measured of each cell."""
    rows = []
    for arm, size in CELLS:
        rates = {f"{record['rate']:g}" for record in results.where(arm=arm, size=size)}
        keys = ("train_error", "test_error", "best_test_error")
        errors = [say_mean(results.values(key, arm=arm, size=size)) for key in keys]
        losses = [say_mean(results.values(key, arm=arm, size=size), 3) for key in ("train_loss", "test_loss")]
        rows.append((name_cell(arm, size), ", ".join(rates), *errors, *losses))
    heads = ("norm", "rate", "training error", "test error", "at the best validation", "training loss", "test loss")
    return "Errors in % and losses at the end, mean ± half of the 95 % interval", heads, rows


def paint(results: Results, axes: Axes) -> None:
    """Test error against the images that share statistics, from much noise to none."""
    order = SIZES["batch"]
    for shift, (arm, sizes) in enumerate(SIZES.items()):
        places = [order.index(size) + 0.12 * (shift - 0.5) for size in sizes]
        label = "batch norm" if arm == "batch" else "group norm with matched noise"
        look: dict[str, Any] = {"color": COLOURS[arm], "marker": MARKERS[arm], "places": places}
        for key, when, line in (("test_error", "end", "-"), ("best_test_error", "best validation", ":")):
            values = [results.values(key, arm=arm, size=size) for size in sizes]
            look["markerfacecolor"] = COLOURS[arm] if line == "-" else "white"
            dots(axes, values, f"{label}, {when}", line=line, **look)
    axes.set_xticks(range(len(order)), ["no noise" if size == NONE else str(size) for size in order])
    axes.set(ylabel="test error, %", xlabel="images that share statistics: noise falls from left to right")
    axes.legend(frameon=False)


STUDY = Study(
    name="noise",
    title="Does the noise of batch normalization regularize?",
    claim="“Regularization effect: BN adds a small amount of noise to the training process, which can have a "
    "regularizing effect and help to prevent overfitting.” (Advantages of Batch Normalization)",
    design="A fully connected network, 3 x 100, learns 500 images by SGD on 128 a step, 51 passes. Only the noise of "
    "the statistics changes: they are of ghosts of 8, 16, 32, 64 or all 128 images, or of all 500 training images in "
    "each step, where nothing is left to chance; gradients go through these as well. Group norm is trained as it is, "
    "and with the errors that statistics of 8, 32 or 128 independent normal values have, drawn at random. Every "
    "network is measured by the statistics of all training images, so that only training differs. Each arm has its "
    "own best of three rates by validation loss over two seeds, which also choose the size of noise that is judged.",
    rule=f"Confirmed if batch norm without noise has a test error more than {ENOUGH:g} points above that of batch norm "
    "with the size of noise that validation chose, both at the end of training; refuted if it is below that.",
    published=(
        Published(
            "Wu and He 2018, arXiv:1803.08494",
            "at 32 images group norm has a lower training error than batch norm, and 24.1 against 23.6 % validation "
            "error; they suppose that batch norm's noise regularizes",
        ),
    ),
    differs="No published experiment takes the noise out of batch norm like this. The papers train residual networks "
    "on large sets; this is a small network on 500 images, where overfitting is certain.",
    plan=plan,
    perform=perform,
    judge=judge,
    paint=paint,
    seeds=10,
    refuses={"norms": "it compares batch norm with and without its noise, and group norm with and without it"},
)
