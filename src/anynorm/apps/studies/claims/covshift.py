"""Does batch normalization help because it reduces internal covariate shift?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..fit import draw_batches, find_status, fit_steps, fit_to_level, observe, untouched
from ..models import dense
from ..norms import NORMS
from ..plots import COLOURS, MARKERS, dots, split_axes
from ..study import Find, Published, Results, Setting, Study, Trial, try_rates
from ..verdicts import CONFIRMED, INCONCLUSIVE, REFUTED, Effect, Verdict, conclude, difference
from ..workers import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARMS = ("none", "batch", "batch + noise", "none + noise")
RATES = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)
BATCH, MOST, WATCHED, EVERY, SEARCH_SEED = 60, 1000, 300, 10, 1001
LEVEL, PROBE = 0.9, 500
SHIFT, SCALE = 0.5, 1.5  # of the noise: at most so many standard deviations, and so many times, up or down
STEPS_ALONG = (0.5, 1.0, 2.0, 4.0)  # times the learning rate
LESS_SHIFT, LOST = 0.0, 0.0  # decades: drift, none over batch; steps, batch + noise over the middle of none and batch


class Noise(nn.Module):
    """In training mode, shifts and scales each unit by amounts drawn anew at every forward, the same for all samples.

    The scale is about the mean of the batch, and the shift is in units of its standard deviation, so that the noise
    moves a unit's distribution equally far whatever the unit's scale.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shift, scale = (2 * torch.rand(2, x.shape[1]) - 1).unbind()
        scale = SCALE**scale
        mean, std = x.detach().mean(0), x.detach().std(0, unbiased=False)
        return x * scale + (mean * (1 - scale) + SHIFT * shift * std)


def make_norm(arm: str, num_features: int, dims: int) -> nn.Module:
    """The norm of an arm, followed by the noise where it has one."""
    norm, _, noise = arm.partition(" + ")
    return nn.Sequential(NORMS[norm](num_features, dims), Noise() if noise else nn.Identity())


def plan(setting: Setting, find: Find) -> Iterable[Trial]:
    """Each arm's best rate, its seeds there, and its seeds watched at the best rate of none."""
    most, watched, rates = (40, 20, RATES[2:3]) if setting.quick else (MOST, WATCHED, RATES)
    equal = None
    for arm in ARMS:
        trials = [Trial.of(arm, rate, SEARCH_SEED, search=True, kind="speed", most=most) for rate in rates]
        best, search = try_rates(find, trials, by="cost")
        yield from search
        equal = best if arm == ARMS[0] else equal
        for seed in range(setting.seeds):
            if best is not None:
                yield Trial.of(arm, best, seed, kind="speed", most=most)
            if equal is not None:
                yield Trial.of(arm, equal, seed, kind="watch", most=watched)


def perform(trial: Trial, setting: Setting) -> Record:
    """Steps until the level is reached; or so many steps, watched."""
    own = partial(dense, activation=nn.Sigmoid, start=nn.init.xavier_uniform_)
    network = setting.build(partial(make_norm, trial.arm), trial.seed, own)
    batches = draw_batches(len(setting.data.train_x), BATCH, trial["most"], trial.seed)
    if trial["kind"] == "speed":
        return fit_to_level(network, setting.data, batches, trial.rate, LEVEL, search=trial.search)
    assert isinstance(network, nn.Sequential)
    return watch(network, setting, batches, trial.rate)


def watch(network: nn.Sequential, setting: Setting, batches: list[Tensor], rate: float) -> Record:
    """Train, and at some steps look at what the last hidden layer gets and at the loss around; means of log10."""
    x, y = torch.from_numpy(setting.data.train_x), torch.from_numpy(setting.data.train_y)
    found: dict[str, list[float]] = {"drift": [], "turn": [], "error": [], "range": []}
    steps = fit_steps(network, x, y, batches, torch.optim.SGD(network.parameters(), lr=rate))
    loss = 0.0
    for step, chosen in enumerate(batches):
        looks = step % EVERY == 0
        if looks:
            before = observe(network, network[-3], x[:PROBE], training=True)
            seen = look_around(network, x[chosen], y[chosen], rate, step)
        loss = next(steps)
        if not math.isfinite(loss):
            break
        if looks:
            seen["drift"] = measure_drift(before, observe(network, network[-3], x[:PROBE], training=True))
            for name, value in seen.items():
                found[name].append(math.log10(max(value, 1e-12)))
    means = {name: float(np.mean(values)) if values else None for name, values in found.items()}
    return {"status": find_status(loss), **means}


def measure_drift(before: Tensor, after: Tensor) -> float:
    """Wasserstein-1 distance of each unit's two distributions, in its standard deviations; the mean over units."""
    distance = (before.sort(0).values - after.sort(0).values).abs().mean(0)
    scale = (before.std(0) + after.std(0)) / 2
    return (distance / scale.clamp_min(1e-12)).mean().item()


def look_around(network: nn.Sequential, x: Tensor, y: Tensor, rate: float, step: int) -> dict[str, float]:
    """What a step would meet, without taking it.

    Returns:
        turn: 1 less the cosine of the last hidden layer's gradients before and after the layers below it make their
        step, with fresh noise; error: by how much the loss after the whole step differs from what the gradient
        promised, relative to that; range: of the loss at several lengths along the gradient, as published.
    """
    weights, below = list(network.parameters()), list(network[:-4].parameters())

    def find_loss(seed: int | None = None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return functional.cross_entropy(network(x), y)

    with untouched(network), torch.enable_grad():
        loss = find_loss()
        gradients = torch.autograd.grad(loss, weights)
    saved = [weight.detach().clone() for weight in weights]
    along = []
    with torch.no_grad():
        for times in STEPS_ALONG:
            for weight, start, gradient in zip(weights, saved, gradients, strict=True):
                weight.copy_(start - times * rate * gradient)
            with untouched(network):
                along.append(find_loss().item())
        for place, (weight, start) in enumerate(zip(weights, saved, strict=True)):
            weight.copy_(start - rate * gradients[place] if place < len(below) else start)
    with untouched(network), torch.enable_grad():
        (moved,) = torch.autograd.grad(find_loss(step), weights[len(below)])
    with torch.no_grad():
        for weight, start in zip(weights, saved, strict=True):
            weight.copy_(start)
    promised = rate * sum(float(gradient.double().square().sum()) for gradient in gradients)
    turn = 1 - functional.cosine_similarity(gradients[len(below)].flatten(), moved.flatten(), dim=0).item()
    error = abs(along[STEPS_ALONG.index(1.0)] - loss.item() + promised) / max(promised, 1e-30)
    return {"turn": turn, "error": error, "range": max(along) - min(along)}


def judge(results: Results) -> Verdict:
    """Whether the shift is reduced, whether the benefit goes with the reduction, and what else would explain it."""
    seen = {
        key: {arm: results.values(key, arm=arm, kind=kind) for arm in ARMS}
        for kind, keys in (("speed", ("log_steps",)), ("watch", ("drift", "turn", "error", "range")))
        for key in keys
    }
    none, batch, noisy, noise = ARMS

    def ratio(name: str, key: str, over: str, under: str) -> Effect:
        values = difference(seen[key][over], seen[key][under])
        return Effect(f"log10 of {name}, {over} over {under}", values, 0.0, "decades", 0.01)

    steps = seen["log_steps"]
    middle = {seed: (steps[none][seed] + steps[batch][seed]) / 2 for seed in steps[none].keys() & steps[batch].keys()}
    effects = [
        replace(ratio("drift in a step", "drift", none, batch), threshold=LESS_SHIFT),
        Effect(f"log10 of steps, {noisy} over the geometric middle of {none} and {batch}",
               difference(steps[noisy], middle), LOST, "decades", 0.01),
    ]  # fmt: skip
    needed = [ratio("steps", "log_steps", none, batch), ratio("drift in a step", "drift", noisy, none)]
    smooth = [ratio("error of the gradient's promise", "error", none, arm) for arm in (batch, noisy)]
    beside = [
        *needed,
        *smooth,
        ratio("turn of the gradient as lower layers move", "turn", none, batch),
        ratio("range of the loss along the gradient", "range", none, batch),
        ratio("steps", "log_steps", noise, noisy),
    ]
    means = {arm: 10 ** np.mean(list(steps[arm].values())) for arm in ARMS}
    drift = {arm: 10 ** np.mean(list(seen["drift"][arm].values())) for arm in ARMS}
    text = ", ".join(f"{arm} {drift[arm]:.2g} and {means[arm]:.0f} steps" for arm in ARMS)
    preferred = prefer([effect.outcome() for effect in (*effects, *needed, *smooth)])
    sentence = (
        f"Drift of what the last hidden layer gets in a step, in standard deviations, and steps to {100 * LEVEL:g} %: "
        f"{text}. The data prefer {preferred}."
    )
    counts = {arm: sum(r["status"] == "diverged" for r in results.records if r["arm"] == arm) for arm in ARMS}
    notes = [f"Diverged, searches included: {', '.join(f'{arm} {count}' for arm, count in counts.items())}."]
    verdict = conclude(sentence, effects, beside=beside, notes=notes)
    holds = all(effect.outcome() == CONFIRMED for effect in needed)
    return verdict if holds or effects[0].outcome(verdict.confidence) == REFUTED else replace(
        verdict, outcome=INCONCLUSIVE
    )  # fmt: skip


def prefer(outcomes: list[str]) -> str:
    """The explanation that fits; outcomes of: less shift, benefit lost, benefit, noise shifts, smooth, so in noise."""
    shift, lost, benefit, shaken, smooth, still = outcomes
    if benefit != CONFIRMED or shaken != CONFIRMED:
        return "no explanation: there was no benefit to explain, or the noise did not take the reduction away"
    if shift == CONFIRMED and lost == CONFIRMED:
        return "reduced shift" if smooth != CONFIRMED or still == CONFIRMED else "neither over the other: both went"
    if lost == REFUTED:
        return "a smoother loss" if smooth == still == CONFIRMED else "neither: the loss was not clearly smoother"
    return "neither clearly"


def paint(results: Results, axes: Axes) -> None:
    """Shift on the left and steps on the right: were shift the reason, the order would be the same."""
    panels = split_axes(axes, 2)
    shown = (("watch", "drift", "drift in one step, standard deviations"),
             ("speed", "log_steps", f"steps to {100 * LEVEL:g} % accuracy"))  # fmt: skip
    for panel, (kind, key, label) in zip(panels, shown, strict=True):
        for place, arm in enumerate(ARMS):
            norm = arm.partition(" + ")[0]
            values = {seed: 10**value for seed, value in results.values(key, arm=arm, kind=kind).items()}
            fill = "white" if "noise" in arm else COLOURS[norm]
            dots(panel, [values], arm, places=[place], color=COLOURS[norm], marker=MARKERS[norm], mfc=fill)
        panel.set_xticks(range(len(ARMS)), [arm.replace(" + ", "\n+ ") for arm in ARMS])
        panel.set(yscale="log", ylabel=label, xlim=(-0.5, len(ARMS) - 0.5))


STUDY = Study(
    name="covshift",
    title="Does batch norm help because it reduces internal covariate shift?",
    claim="“The primary goal of batch normalization is to address the issue of internal covariate shift, which occurs "
    "when the distribution of input features to a given layer changes during training, making it difficult for the "
    "model to converge.” (Introduction)",
    design=f"Three dense layers of 100 sigmoid units, batches of {BATCH}, with and without batch norm, and both with "
    f"noise behind the norm: at each step each unit is shifted by up to {SHIFT:g} of its standard deviations and "
    f"scaled by up to {SCALE:g} times, up or down, drawn anew. That is covariate shift by force. Shift is the drift of "
    f"what enters the last hidden layer's sigmoids for {PROBE} fixed images, statistics of those images, from one step "
    "to the next: the Wasserstein-1 distance of a unit's two distributions, divided by its standard deviation, so that "
    "scale does not decide. It and the loss around are watched at the best rate of the plain network in all arms, "
    f"over {WATCHED} steps; steps to {100 * LEVEL:g} % of the test images are counted at each arm's own best rate.",
    rule="Confirmed if batch norm reduces the drift, and if with noise it loses more than half of its benefit: it "
    "takes more steps than the geometric middle of the arms without noise. Refuted if batch norm increases the drift, "
    "or if with noise it keeps more than half. Both intervals together 95 %. Inconclusive, unless the drift itself "
    "refutes, where batch norm is not faster to begin with, or where with noise the drift is not larger than without a "
    "norm.",
    published=(
        Published(
            "Santurkar et al. 2018, arXiv:1805.11604",
            "reported by others: with noise after batch norm a VGG trains as well, though its layers' inputs are less "
            "stable than those of the plain network; the loss is smoother instead",
        ),
    ),
    differs="A small sigmoid network; theirs is a VGG on CIFAR-10. Their noise is drawn for each sample as well and "
    "has one size in all arms; here it is in units of the unit's own standard deviation. What is called smooth here is "
    "the relative error of the gradient's promise after one step, because the range of the loss, as published, is "
    "small where the gradient is.",
    plan=plan,
    perform=perform,
    judge=judge,
    paint=paint,
    seeds=8,
    refuses={
        "model": "it looks at layers of its own network",
        "norms": "the claim is about batch norm, with and without noise behind it",
    },
)
