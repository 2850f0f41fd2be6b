"""Pictures of findings: what was measured with the fault and without it, and a number of each layer."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from anynorm.apps.doctor.groups import Group, shorten, write_key, write_layer, write_number
from anynorm.apps.document import EDGE, INK, LINE, Plot, draw
from anynorm.doctor.check import Effect

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE, AFTER = "#d55e00", "#009e73"
# What the page's style says of each colour: it knows whether the reader's page is dark.
VARIABLES = {BEFORE: "before", AFTER: "after", INK: "label", EDGE: "edge", LINE: "grid"}
LOWEST = 1.9  # inches
MOST_BARS = 30
LONGEST = 26  # characters of a name beside a bar


def draw_group(group: Group, effects: list[Effect]) -> list[Plot]:
    """The pictures of a group: one of each effect, and one of its layers where their numbers differ."""
    plots = [draw_effect(effect) for effect in effects if is_drawn(effect.before, effect.after)]
    shares = group.shares
    if len(shares) > 1 and is_drawn(*shares.values()):
        plots.append(draw_bars("What each layer alone costs", "rise of the loss with its running averages", shares))
    elif (found := find_varying(group)) is not None:
        plots.append(draw_bars(f"{write_key(found[0])}, by layer".capitalize(), write_key(found[0]), found[1]))
    return plots


def is_drawn(*values: float) -> bool:
    """Whether numbers have a place on an axis."""
    return all(math.isfinite(value) and abs(value) < 1e30 for value in values)


def find_varying(group: Group) -> tuple[str, dict[str, float]] | None:
    """The first number that is not alike at all layers, and its values."""
    for name, values in group.numbers.items():
        if name != "of" and len(set(values)) > 1 and len(values) == len(group.layers) and is_drawn(*values):
            return name, dict(zip(group.layers, values, strict=True))
    return None


def draw_effect(effect: Effect) -> Plot:
    """Two bars: with the fault, and without it."""
    values = {"as it is": effect.before, "without it": effect.after}

    def paint(axes: Axes) -> None:
        for place, (value, colour) in enumerate(zip(values.values(), (BEFORE, AFTER), strict=True)):
            axes.barh(place, value, 0.6, color=colour)
            label(axes, value, place)
        axes.set_yticks(range(2), list(values))
        axes.set_ylim(1.6, -0.6)
        finish(axes, [*values.values()], f"{effect.measure}: {effect.better} is better")

    words = f"{effect.measure}: {write_number(effect.before)} as it is, {write_number(effect.after)} without it."
    return make_plot(effect.measure.capitalize(), words, paint, (4.6, LOWEST))


def draw_bars(heading: str, title: str, values: dict[str, float]) -> Plot:
    """A bar for each layer, in the order of the model; the largest of them where there are many."""
    kept = sorted(sorted(values, key=lambda layer: -abs(values[layer]))[:MOST_BARS], key=list(values).index)
    if len(values) > len(kept):
        heading += f" (the {len(kept)} largest of {len(values)})"

    def paint(axes: Axes) -> None:
        for place, layer in enumerate(kept):
            axes.barh(place, values[layer], 0.66, color=BEFORE)
            label(axes, values[layer], place)
        # matplotlib hides what begins with _ in places.
        axes.set_yticks(range(len(kept)), [shorten(write_layer(layer), LONGEST) for layer in kept])
        axes.set_ylim(len(kept) - 0.4, -0.6)
        finish(axes, [values[layer] for layer in kept], title)

    words = "; ".join(f"{write_layer(layer)} {write_number(values[layer])}" for layer in kept[:8])
    return make_plot(heading, f"{heading}: {words}.", paint, (4.6, max(LOWEST, 0.27 * len(kept) + 0.9)))


def label(axes: Axes, value: float, place: int) -> None:
    """Write a bar's length behind its end."""
    text = write_number(value)
    axes.annotate(text, (max(value, 0.0), place), (5, 0), textcoords="offset points", va="center", color=INK)


def finish(axes: Axes, values: list[float], title: str) -> None:
    """Leave lines where lengths are read, room for the numbers, and no more."""
    low, high = min(0.0, *values), max(0.0, *values)
    axes.set_xlim(1.05 * low, high + 0.25 * ((high - low) or 1.0))
    axes.set_xlabel(title)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def make_plot(heading: str, alt_text: str, paint: Callable[[Axes], None], size: tuple[float, float]) -> Plot:
    """A panel in the colours of the page's style."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in letters that matplotlib's font lacks is drawn by the browser's
        plot = draw(heading, alt_text, paint, size)
    names = "|".join(VARIABLES)
    svg = re.sub(f"({names})", lambda match: f"var(--{VARIABLES[match[1]]})", plot.svg)
    return Plot(plot.heading, svg, plot.alt_text)
