"""The page of `anynorm speed`: the layers as bars against torch and the limit, and the training steps."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

import torch

from anynorm.apps.document import EDGE, INK, LINE, Plot, draw, write_document, write_figures
from anynorm.apps.speed.layers import LayerTimes, find_mean, is_busy
from anynorm.apps.speed.training import StepTimes
from anynorm.apps.terminal import join_words
from anynorm.apps.timing.cases import MODES
from anynorm.apps.timing.forms import AGAIN, BUILT
from anynorm.apps.timing.limits import find_caches, find_cpu, find_last_level
from anynorm.engine.paths import describe_environment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TORCH, OURS, LIMIT = "#9aa1ac", "#0072b2", "#d55e00"
# What the page's style says of each colour: it knows whether the reader's page is dark.
VARIABLES = {TORCH: "torch", OURS: "ours", LIMIT: "limit", INK: "label", EDGE: "edge", LINE: "grid"}
MODE_WORDS = {mode: mode for mode in MODES} | {"forward+backward": "forward with backward"}
WIDTH, BAR = 9.6, 0.36  # of a plot, and of a bar's height, in inches


def find_facts() -> dict[str, str]:
    """Return what the times were measured with; no name and no path of this machine."""
    environment = describe_environment()
    return {
        "date": datetime.date.today().isoformat(),
        "processor": find_cpu(),
        "CPU threads": str(torch.get_num_threads()),
        "kernels": environment["kernels"],
        "anynorm": environment["anynorm"],
        "torch": environment["torch"],
    }


def write_page(layers: Sequence[LayerTimes], steps: Sequence[StepTimes], facts: dict[str, str]) -> str:
    """Return the page as text, with nothing to load from elsewhere."""
    cache = find_last_level(find_caches())
    means = [f"{find_mean(layers, mode):.2f} in {MODE_WORDS[mode]}" for mode in MODES]
    busy = "<p>The machine was busy: the ratios of one layer differ widely.</p>" if is_busy(layers) else ""
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    body = [
        "<header><h1>How fast is anynorm on this machine?</h1>\n"
        f'<p class="verdict">torch.nn takes so many times as long: {escape(join_words(means))}.</p>\n'
        f'<p class="facts">Geometric means over {len(layers)} layers; above 1 anynorm is faster.</p></header>\n',
        "<section><h2>Layers</h2><p>Each layer's time as a share of torch.nn's, and beside the bars the times. The "
        f"limit is the time of the fewest bytes at the speed of a copy; last: in channels_last.</p>{busy}{write_key()}",
        f"{write_figures(plot_layers(layers, mode, cache) for mode in MODES)}</section>\n",
        "<section><h2>Training steps</h2><p>Forward and backward. The same model takes part twice, to know the machine "
        f"by; bars end at the median, lines span half of the steps.</p>{write_figures(map(plot_step, steps))}",
        "".join(f'<p class="note">{escape(say_step(step))}</p>\n' for step in steps),
        f"</section>\n<section><h2>Machine</h2><dl>{listed}</dl></section>\n"
        "<footer>Written by <code>anynorm speed --html</code></footer>",
    ]
    style = files("anynorm.apps.speed").joinpath("page.css").read_text(encoding="utf-8")
    return write_document("anynorm speed", body, style)


def say_step(step: StepTimes) -> str:
    """Return what was fused, and whether other work disturbed the steps."""
    text = f"{step.name}: {step.forms.norms} norms, {step.forms.fused} of them fused with what follows."
    return text + (f" The machine was busy: {step.disturbed}." if step.disturbed else "")


def write_key() -> str:
    """Return the colours in words."""
    names = (("torch", "torch.nn"), ("ours", "anynorm"), ("limit", "the limit"))
    items = "".join(f'<li><span class="swatch {kind}"></span>{name}</li>' for kind, name in names)
    return f'<ul class="key">{items}</ul>'


def plot_layers(layers: Sequence[LayerTimes], mode: str, cache: int) -> Plot:
    """Return two bars for each layer, torch's 1 long, and a mark at the limit."""
    ratios = [1 / layer.timings[mode].ratio("torch", "anynorm") for layer in layers]
    limits = [layer.find_limit(mode, cache) / layer.timings[mode].median("torch") for layer in layers]

    end = 1.12 * max(1.0, *ratios, *limits)

    def paint(axes: Axes) -> None:
        for place, layer in enumerate(layers):
            timings, limit = layer.timings[mode], limits[place]
            for shift, colour, length, name in ((-0.2, TORCH, 1.0, "torch"), (0.2, OURS, ratios[place], "anynorm")):
                axes.barh(place + shift, length, BAR, color=colour)
                start = limit if length < limit < length + 0.1 * end else length  # the mark would cross the words
                label(axes, write_time(timings.median(name)), start, place + shift)
            axes.plot([limit] * 2, [place - 0.42, place + 0.42], color=LIMIT, linewidth=2.4)
        axes.set_yticks(range(len(layers)), [layer.name for layer in layers])
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.set_xlim(0, end)
        finish(axes, "time over torch.nn's: shorter is faster")

    words = (f"{layer.name} {ratio:.2f}" for layer, ratio in zip(layers, ratios))
    alt_text = f"{mode}: anynorm's time over torch.nn's. {'; '.join(words)}."
    return colour(draw(mode, alt_text, paint, (WIDTH, 0.45 * len(layers) + 0.7)))


def plot_step(step: StepTimes) -> Plot:
    """Return a bar for each form, as long as its step takes."""
    names = [*step.timings.seconds]
    medians = [1e3 * step.timings.median(name) for name in names]
    spans = [[1e3 * seconds for seconds in step.timings.quartiles(name)] for name in names]

    def paint(axes: Axes) -> None:
        for place, (name, median, (low, high)) in enumerate(zip(names, medians, spans)):
            axes.barh(place, median, 0.62, color=TORCH if name in (BUILT, AGAIN) else OURS)
            axes.plot([low, high], [place, place], color=INK, linewidth=1.4)
            text = f"{write_time(median / 1e3)}, {step.timings.ratio(BUILT, name):.2f} times as fast"
            label(axes, text, max(median, high), place)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1.3 * max(high for _, high in spans))
        finish(axes, "milliseconds: shorter is faster")

    words = (f"{name} {median:.3g} ms" for name, median in zip(names, medians))
    return colour(draw(step.name, f"A training step of {step.name}. {'; '.join(words)}.", paint, (WIDTH, 2.4)))


def label(axes: Axes, text: str, x: float, y: float) -> None:
    """Write beside the end of a bar."""
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", color=INK)


def finish(axes: Axes, title: str) -> None:
    """Leave lines where lengths are read, and no others."""
    axes.set_xlabel(title)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def write_time(seconds: float) -> str:
    """Return three digits, in microseconds or milliseconds."""
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


def colour(plot: Plot) -> Plot:
    """Return the plot in the colours of the page's style."""
    names = "|".join(VARIABLES)
    svg = re.sub(f"({names})", lambda match: f"var(--{VARIABLES[match[1]]})", plot.svg)
    return Plot(plot.heading, svg, plot.alt_text)
