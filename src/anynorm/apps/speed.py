"""`anynorm speed`: a dozen layers and two whole training steps, on this machine, in the time that it says."""

import copy
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from torch import Tensor, nn

import anynorm
from anynorm.apps.models.call import Call
from anynorm.apps.terminal import heading, open_console, plain_table, say
from anynorm.apps.timing.cases import MODES, Case, make_call, needs_grad
from anynorm.apps.timing.interleaved import InterleavedTimings, find_quartiles, time_interleaved
from anynorm.apps.timing.steps import take_step
from anynorm.apps.timing.threads import use_threads
from anynorm.apps.zoo import MobileNetV2, ResNet18
from anynorm.randomness import keep_randomness

CASES = (
    Case("ResNet-50", "BatchNorm2d", (256,), (8, 256, 56, 56)),
    Case("ResNet-50", "BatchNorm2d", (256,), (8, 256, 56, 56), channels_last=True),
    Case("ResNet-50", "BatchNorm2d", (2048,), (8, 2048, 7, 7)),
    Case("MobileNetV2", "BatchNorm2d", (576,), (1, 576, 14, 14)),
    Case("MLP", "BatchNorm1d", (1024,), (256, 1024)),
    Case("diffusion U-Net", "GroupNorm", (32, 640), (2, 640, 32, 32)),
    Case("diffusion U-Net", "GroupNorm", (32, 640), (2, 640, 32, 32), channels_last=True),
    Case("nnU-Net", "InstanceNorm3d", (128,), (2, 128, 32, 32, 32)),
    Case("ViT-B", "LayerNorm", (768,), (8, 197, 768)),
    Case("language model 4096", "RMSNorm", (4096,), (1, 512, 4096)),
    Case("tiny", "BatchNorm1d", (16,), (8, 16)),
    Case("tiny", "LayerNorm", (16,), (8, 16)),
)
MODELS: dict[str, Callable[[], nn.Module]] = {"ResNet-18": ResNet18, "MobileNetV2": MobileNetV2}
# Shares of the time: all layers, each model, each model once more after tune_allocator.
FOR_CASES, FOR_MODEL, FOR_TUNED = 0.25, 0.22, 0.12
STEPS = 20  # how many training steps of one size should fit into the time that the layers leave
FEWEST_IMAGES = 2  # batch norm of one image may have one value in a channel
BUSY = 1.3  # third over first quartile of what should always be the same
WAS_BUSY = "The machine was busy"


@dataclasses.dataclass(frozen=True)
class Step:
    """A model's training step, its forms by name (as built, accelerated, fused), and what was fused, in words."""

    name: str
    forms: dict[str, nn.Module]
    images: Tensor
    summary: str

    def time(self, names: Sequence[str], seconds: float) -> InterleavedTimings:
        """Time forward and backward of these forms in turn."""
        call = Call((self.images,))

        def step(model: nn.Module) -> None:
            model.zero_grad(set_to_none=True)
            take_step(model, call)

        with keep_randomness():
            calls = {name: lambda model=self.forms[name]: step(model) for name in names}
            return time_interleaved(calls, 0.8 * seconds, fewest=4, longest=seconds)


def print_speed(
    seconds: float = 70.0,
    threads: int | None = None,
    images: tuple[int, int] = (16, 224),
    console: Console | None = None,
) -> None:
    """Measure and print layers, then training steps, then the steps once more after `anynorm.tune_allocator()`.

    Args:
        seconds: how long it takes, setting up included; longer only where two rounds of the steps do not fit in, be it
            with two images.
        threads: CPU threads; where None, as many as torch is set to.
        images: how many, at most, and their side in pixels, for the training steps.
        console: where to print; where None, standard output.
    """
    console = console or open_console()
    with use_threads(threads):
        end = time.perf_counter() + seconds
        say(console, f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}; above 1 anynorm is faster")
        say(
            console,
            f"This takes about {seconds:.0f} seconds (--seconds), unless a step of two images takes several.",
        )
        _print_cases(console, CASES, FOR_CASES * seconds)
        _print_models(console, images, end)


def _print_models(console: Console, images: tuple[int, int], end: float) -> None:
    """Print training steps of both models, then once more after `anynorm.tune_allocator()`, until about `end`."""
    most, side = images
    count = find_count(most, end - time.perf_counter(), lambda count: _time_step(count, side))
    steps = [_make_step(name, make, torch.randn(count, 3, side, side)) for name, make in MODELS.items()]
    heading(console, f"A training step (forward and backward), {count}x3x{side}x{side}")
    if count < most:
        say(console, f"{count} images instead of {most}, to keep to the time: the machine is slow, or busy.")
    say(console, "speed: the median over rounds of torch.nn's time over the form's")
    before = []
    for index, step in enumerate(steps):
        waiting = FOR_MODEL * (len(steps) - index) + FOR_TUNED * len(steps)
        before.append(step.time(list(step.forms), find_share(end, FOR_MODEL, waiting)))
        _print_step(console, step, before[-1])
    _print_tuned(console, steps, before, end)


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


def _time_step(count: int, side: int) -> float:
    """Return the seconds of the first model's training step; the faster of two, as the first one sets up."""
    model, call = next(iter(MODELS.values()))().train(), Call((torch.randn(count, 3, side, side),))
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


def _print_cases(console: Console, cases: Sequence[Case], seconds: float) -> None:
    """Print how many times as long as ours torch's layers take, in each mode."""
    heading(console, "Layers: the time of torch.nn's over that of anynorm's (half of the timings)")
    table = plain_table("layer", *MODES)
    ratios: dict[str, list[float]] = {mode: [] for mode in MODES}
    spreads = []
    for case in cases:
        cells = []
        for mode in MODES:
            with console.status(f"{case.name} {mode}"):
                timings = _time_case(case, mode, seconds / len(cases) / len(MODES))
            ratios[mode].append(timings.ratio("torch", "anynorm"))
            low, high = find_quartiles(timings.ratios("torch", "anynorm"))
            spreads.append(high / low)
            cells.append(_write_ratio(timings.ratios("torch", "anynorm")))
        table.add_row(case.name + (", last" if case.channels_last else ""), *cells)
    table.add_row("geometric mean", *(f"{statistics.geometric_mean(ratios[mode]):.2f}" for mode in MODES))
    table.add_row("worst", *(f"{min(ratios[mode]):.2f}" for mode in MODES))
    losses = (f"{sum(ratio < 0.95 for ratio in ratios[mode])} of {len(cases)}" for mode in MODES)
    table.add_row("slower by more than 5 %", *losses)
    console.print(table)
    say(console, "last: in channels_last")
    if statistics.median(spreads) > BUSY:
        say(console, f"{WAS_BUSY}: the ratios of one layer differ widely, and a table like this says little.")


def _time_case(case: Case, mode: str, seconds: float) -> InterleavedTimings:
    """Time torch's layer and ours in turn."""
    x, g = case.draw()
    calls = {}
    for name, library in (("torch", nn), ("anynorm", anynorm)):
        module = case.make(library).train(mode != "evaluation")
        calls[name] = make_call(module, module.parameters(), mode, x, g)
    with torch.set_grad_enabled(needs_grad(mode)):
        return time_interleaved(calls, 0.8 * seconds, longest=seconds)


def _make_step(name: str, make: Callable[[], nn.Module], images: Tensor) -> Step:
    """Return a model as built, accelerated and fused, with the same parameters."""
    with keep_randomness():
        model = make().train()
    accelerated = copy.deepcopy(model)
    anynorm.accelerate(accelerated)
    report = anynorm.accelerate(copy.deepcopy(model), fuse=True)
    forms = {"torch.nn": model, "accelerate": accelerated, "accelerate, fuse=True": report.model}
    summary = f"{name}: {len(report.changed)} norms, {len(report.fused)} of them fused with what follows"
    return Step(name, forms, images, summary)


def _print_step(console: Console, step: Step, timings: InterleavedTimings) -> None:
    """Print each form's time, and torch's over it; say so where the same step took very different times."""
    table = plain_table(step.name, "step", "half of the steps", "speed")
    for name in timings.seconds:
        ratio = "" if name == "torch.nn" else _write_ratio(timings.ratios("torch.nn", name))
        table.add_row(name, *_write_seconds(timings, name), ratio)
    console.print(table)
    say(console, step.summary)
    low, high = timings.quartiles("torch.nn")
    if high > BUSY * low:
        say(console, f"{WAS_BUSY}: the same step took very different times. Repeat, perhaps with --threads 1.")


def _print_tuned(console: Console, steps: Sequence[Step], before: Sequence[InterleavedTimings], end: float) -> None:
    """Tune the allocator, print the first and the last form once more, and what came before over it."""
    heading(console, "After anynorm.tune_allocator(keep_large=True)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says the same
        report = anynorm.tune_allocator(keep_large=True)
    say(console, f"{report}.")
    if not report:
        return
    for index, (step, earlier) in enumerate(zip(steps, before)):
        names = list(step.forms)
        chosen = [names[0], names[-1]]
        timings = step.time(chosen, find_share(end, FOR_TUNED, FOR_TUNED * (len(steps) - index)))
        table = plain_table(step.name, "step", "half of the steps", "speed over before")
        for name in chosen:
            gain = f"{earlier.median(name) / timings.median(name):.2f}"
            table.add_row(name, *_write_seconds(timings, name), gain)
        console.print(table)
    say(console, "It cannot be undone in a process, so it came last, and not in turn with the steps above.")


def _write_seconds(timings: InterleavedTimings, name: str) -> tuple[str, str]:
    """Return the median and the quartiles."""
    low, high = timings.quartiles(name)
    return f"{1e3 * timings.median(name):.4g} ms", f"{1e3 * low:.4g} to {1e3 * high:.4g} ms"


def _write_ratio(ratios: list[float]) -> str:
    """Return the median of ratios and its quartiles, three digits each; narrow, or the table would not fit."""
    low, high = find_quartiles(ratios)
    middle, low_text, high_text = (
        f"{r:.2f}" if r < 10 else f"{r:.3g}" if r < 1000 else f"{r:.0f}" for r in (statistics.median(ratios), low, high)
    )
    return f"{middle} {low_text}-{high_text}"
