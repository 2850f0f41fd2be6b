"""Training steps of two networks, as built, accelerated and fused; and once more after tune_allocator."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from torch import Tensor, nn

import anynorm
from anynorm.apps.speed.layers import WAS_BUSY, write_ratio
from anynorm.apps.terminal import heading, plain_table, say
from anynorm.apps.timing.forms import AGAIN, BUILT, Forms, make_forms
from anynorm.apps.timing.interleaved import InterleavedTimings
from anynorm.apps.timing.steps import take_step
from anynorm.apps.zoo import MobileNetV2, ResNet18
from anynorm.doctor.call import Call
from anynorm.randomness import keep_randomness

MODELS: dict[str, Callable[[], nn.Module]] = {"ResNet-18": ResNet18, "MobileNetV2": MobileNetV2}
# Shares of the time: each model, each model once more after tune_allocator. The layers have the rest.
FOR_MODEL, FOR_TUNED = 0.22, 0.12
FIRST = 0.6  # of a model's time: the rest is kept for a second attempt, where other work disturbs the first
STEPS = 20  # how many training steps of one size should fit into the time that the layers leave
FEWEST_IMAGES = 2  # batch norm of one image may have one value in a channel


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """What was measured of a model's training step.

    Attributes:
        disturbed: what says that other work disturbed the rounds, in words; empty where nothing does.
    """

    name: str
    forms: Forms
    timings: InterleavedTimings
    disturbed: str


def print_steps(console: Console, images: tuple[int, int], end: float) -> list[StepTimes]:
    """Print training steps of both models, then once more after `anynorm.tune_allocator()`, until about `end`."""
    most, side = images
    count = find_count(most, end - time.perf_counter(), lambda count: _time_step(count, side))
    models = {name: _make_forms(make, _draw_images(count, side)) for name, make in MODELS.items()}
    heading(console, f"A training step (forward and backward), {count}x3x{side}x{side}")
    if count < most:
        say(console, f"{count} images instead of {most}, to keep to the time: the machine is slow, or busy.")
    say(console, "speed: the median over rounds of torch.nn's time over the form's")
    say(console, f"{AGAIN}: a copy of the same model, to know the machine by")
    found = []
    for index, (name, forms) in enumerate(models.items()):
        waiting = FOR_MODEL * (len(models) - index) + FOR_TUNED * len(models)
        share = find_share(end, FOR_MODEL, waiting)
        found.append(StepTimes(name, forms, *forms.time_undisturbed([*forms.models], FIRST * share, longest=share)))
        _print_step(console, found[-1])
    _print_tuned(console, found, end)
    return found


def find_count(most: int, seconds: float, time_step: Callable[[int], float]) -> int:
    """Return how many images, `most` or fewer, the training steps can have to fit into `seconds`.

    Args:
        most: images.
        seconds: for all steps.
        time_step: seconds that a step takes, from its number of images.
    """
    fewest = min(most, FEWEST_IMAGES)
    each = time_step(fewest) / fewest
    return max(fewest, min(most, int(seconds / STEPS / each)))


def _draw_images(count: int, side: int) -> Tensor:
    """Return random images, (count, 3, side, side)."""
    return torch.randn(count, 3, side, side, dtype=torch.float32, device="cpu")


def _time_step(count: int, side: int) -> float:
    """Return the seconds of the first model's training step; the faster of two, as the first one sets up."""
    model, call = next(iter(MODELS.values()))().train(), Call((_draw_images(count, side),))
    found = []
    for _ in range(2):
        start = time.perf_counter()
        take_step(model, call)
        found.append(time.perf_counter() - start)
    return min(found)


def find_share(end: float, share: float, waiting: float) -> float:
    """Return a part's seconds out of those that are left; what came before may have taken more or less than its own.

    Args:
        end: by time.perf_counter().
        share, waiting: of the whole time: this part's, and that of all parts that are still to come, this one too.
    """
    return max(0.0, (end - time.perf_counter()) * share / waiting)


def _make_forms(make: Callable[[], nn.Module], images: torch.Tensor) -> Forms:
    """Return a model's forms, with the same parameters."""
    with keep_randomness():
        return make_forms(make(), images)


def _print_step(console: Console, step: StepTimes) -> None:
    """Print each form's time, and torch's over it; say so where other work disturbed the steps."""
    table = plain_table(step.name, "step", "half of the steps", "speed")
    for name in step.timings.seconds:
        ratio = "" if name == BUILT else write_ratio(step.timings.ratios(BUILT, name))
        table.add_row(name, *_write_seconds(step.timings, name), ratio)
    console.print(table)
    say(console, f"{step.name}: {step.forms.norms} norms, {step.forms.fused} of them fused with what follows")
    _say_disturbed(console, step.disturbed)


def _say_disturbed(console: Console, disturbed: str) -> None:
    if disturbed:
        say(console, f"{WAS_BUSY}: {disturbed}. Repeat, perhaps with --threads 1.")


def _print_tuned(console: Console, steps: Sequence[StepTimes], end: float) -> None:
    """Tune the allocator, print the first and the last form once more, and what came before over it."""
    heading(console, "After anynorm.tune_allocator(keep_large=True)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says the same
        report = anynorm.tune_allocator(keep_large=True)
    say(console, f"{report}.")
    if not report:
        return
    for index, step in enumerate(steps):
        chosen = [BUILT, [*step.forms.models][-1]]
        share = find_share(end, FOR_TUNED, FOR_TUNED * (len(steps) - index))
        timings, disturbed = step.forms.time_undisturbed([*chosen, AGAIN], FIRST * share, longest=share)
        table = plain_table(step.name, "step", "half of the steps", "speed over before")
        for name in chosen:
            gain = f"{step.timings.median(name) / timings.median(name):.2f}"
            table.add_row(name, *_write_seconds(timings, name), gain)
        console.print(table)
        _say_disturbed(console, disturbed)
    say(console, "It cannot be undone in a process, so it came last, and not in turn with the steps above.")


def _write_seconds(timings: InterleavedTimings, name: str) -> tuple[str, str]:
    """Return the median and the quartiles."""
    low, high = timings.quartiles(name)
    return f"{1e3 * timings.median(name):.4g} ms", f"{1e3 * low:.4g} to {1e3 * high:.4g} ms"
