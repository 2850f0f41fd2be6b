"""A dozen layers of well-known networks: torch.nn's, ours and a copy of their input, timed in turn."""

import dataclasses
import statistics
from collections.abc import Sequence

import torch
from rich.console import Console
from torch import nn

import anynorm
from anynorm.apps.terminal import heading, plain_table, say
from anynorm.apps.timing.cases import MODES, Case, make_call, needs_grad
from anynorm.apps.timing.interleaved import InterleavedTimings, find_quartiles, time_interleaved
from anynorm.apps.timing.limits import find_bytes

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
BUSY = 1.3  # third over first quartile of what should always be the same
WAS_BUSY = "The machine was busy"


@dataclasses.dataclass(frozen=True)
class LayerTimes:
    """What was measured of a layer, by mode: torch, anynorm and copy."""

    case: Case
    timings: dict[str, InterleavedTimings]

    @property
    def name(self) -> str:
        """Return norm, shape and, where it is not contiguous, layout."""
        return self.case.name + (", last" if self.case.channels_last else "")

    def find_limit(self, mode: str, cache: int) -> float:
        """Return the seconds of the fewest bytes at the speed of the copy.

        Args:
            cache: bytes of the last-level cache.
        """
        return self.timings[mode].median("copy") * find_bytes(self.case, mode, cache) / (2 * self.case.size)


def print_layers(console: Console, cases: Sequence[Case], seconds: float) -> list[LayerTimes]:
    """Measure, and print how many times as long as ours torch's layers take, in each mode."""
    heading(console, "Layers: the time of torch.nn's over that of anynorm's (half of the timings)")
    table = plain_table("layer", *MODES)
    found = []
    for case in cases:
        timings = {}
        for mode in MODES:
            with console.status(f"{case.name} {mode}"):
                timings[mode] = _time_layer(case, mode, seconds / len(cases) / len(MODES))
        found.append(LayerTimes(case, timings))
        ratios = (timings[mode].ratios("torch", "anynorm") for mode in MODES)
        table.add_row(found[-1].name, *(write_ratio(values) for values in ratios))
    table.add_row("geometric mean", *(f"{find_mean(found, mode):.2f}" for mode in MODES))
    every = {mode: [layer.timings[mode].ratio("torch", "anynorm") for layer in found] for mode in MODES}
    table.add_row("worst", *(f"{min(ratios):.2f}" for ratios in every.values()))
    losses = (f"{sum(ratio < 0.95 for ratio in ratios)} of {len(cases)}" for ratios in every.values())
    table.add_row("slower by more than 5 %", *losses)
    console.print(table)
    say(console, "last: in channels_last")
    if is_busy(found):
        say(console, f"{WAS_BUSY}: the ratios of one layer differ widely, and a table like this says little.")
    return found


def find_mean(layers: Sequence[LayerTimes], mode: str) -> float:
    """Return the geometric mean of torch's time over ours."""
    return statistics.geometric_mean([layer.timings[mode].ratio("torch", "anynorm") for layer in layers])


def is_busy(layers: Sequence[LayerTimes]) -> bool:
    """Return whether the ratios of one layer differ widely from round to round, for half of the layers."""
    quartiles = [
        find_quartiles(timings.ratios("torch", "anynorm")) for layer in layers for timings in layer.timings.values()
    ]
    return statistics.median(high / low for low, high in quartiles) > BUSY


def _time_layer(case: Case, mode: str, seconds: float) -> InterleavedTimings:
    """Time torch's layer, ours and a copy in turn."""
    x, g = case.draw()
    room = torch.empty_like(x)
    calls = {"copy": lambda: room.copy_(x)}
    for name, library in (("torch", nn), ("anynorm", anynorm)):
        module = case.make(library).train(mode != "evaluation")
        calls[name] = make_call(module, module.parameters(), mode, x, g)
    with torch.set_grad_enabled(needs_grad(mode)):
        return time_interleaved(calls, 0.8 * seconds, longest=seconds)


def write_ratio(ratios: list[float]) -> str:
    """Return the median of ratios and its quartiles, three digits each; narrow, or the table would not fit."""
    low, high = find_quartiles(ratios)
    middle, low_text, high_text = (
        f"{r:.2f}" if r < 10 else f"{r:.3g}" if r < 1000 else f"{r:.0f}" for r in (statistics.median(ratios), low, high)
    )
    return f"{middle} {low_text}-{high_text}"
