"""The page of `anynorm monitor --html`: each quantity over the steps, the worst layers in colour and named."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from anynorm.apps.document import EDGE, INK, LINE, Plot, draw, write_document, write_figures
from anynorm.apps.monitor.read import History
from anynorm.apps.monitor.show import describe_run, list_warned, name_worst
from anynorm.apps.terminal import show_controls
from anynorm.doctor.monitor.alarms import LAG, NOISY
from anynorm.doctor.monitor.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito (2008); the page's style has others where the reader's page is dark.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00")
OTHER = "#b4bac4"
VARIABLES = {INK: "label", EDGE: "edge", LINE: "grid", OTHER: "other"} | {
    colour: f"c{place}" for place, colour in enumerate(COLOURS)
}
LONGEST_NAME = 34  # of a layer in a legend


class Panel(NamedTuple):
    """One quantity: its columns, its title, what its axis says, a limit that is warned of, and whether powers of ten
    are alike far apart."""

    columns: tuple[str, ...]
    title: str
    unit: str
    limit: float = math.nan
    log: bool = False


PANELS = (
    Panel(("gap",), "Gap of the median channel", "standard deviations", LAG),
    Panel(("gap_worst",), "Gap of the worst channel", "standard deviations"),
    Panel(("ratio",), "Variance", "batch over running", log=True),
    Panel(("noise",), "Noise", "standard deviations", NOISY),
    Panel(("gamma_min", "gamma_max"), "Gamma, smallest and largest", "gamma"),
    Panel(("gradient",), "Gradient of gamma", "Euclidean norm", log=True),
    Panel(("std",), "What reaches the norm", "standard deviation", log=True),
)


def write_page(history: History) -> str:
    """Return the page as text, with nothing to load from elsewhere."""
    warned = list_warned(history)
    verdict = f"{len(warned)} problem{'s' * (len(warned) > 1)} warned of" if warned else "Nothing was warned of"
    listed = "".join(f"<dt>{escape(clean(name))}</dt><dd>{escape(clean(v))}</dd>" for name, v in history.facts.items())
    items = "".join(f"<li>{escape(clean(line))}</li>" for line in warned)
    worst = "".join(f"<li>{escape(clean(line))}</li>" for line in name_worst(history))
    plots = [colour(plot) for panel in PANELS if (plot := draw_panel(history, panel)) is not None]
    body = [
        f'<header><h1>The norms while training</h1>\n<p class="verdict">{verdict}</p>\n'
        f'<p class="facts">{escape(clean(describe_run(history)))}</p></header>\n',
        f"<section><h2>Warned of</h2><ul>{items}</ul></section>\n" if warned else "",
        f"<section><h2>Worst layers, in the second half</h2><ul>{worst}</ul></section>\n",
        "<section><h2>Over the steps</h2><p>A line for each norm; those that end farthest off are in colour and named, "
        "all others grey. A dotted line is the limit of a warning. Gap: batch mean from running mean; variance: the "
        f"median channel's; noise: standard error of the batch mean.</p>{write_figures(plots)}</section>\n",
        f"<section><h2>Run</h2><dl>{listed}</dl></section>\n" if listed else "",
        "<footer>Written by <code>anynorm monitor --html</code></footer>",
    ]
    style = files("anynorm.apps.monitor").joinpath("page.css").read_text(encoding="utf-8")
    return write_document("anynorm monitor", body, style)


def clean(text: str) -> str:
    """Names come from models, and may hold what no page should."""
    return show_controls(text)


def draw_panel(history: History, panel: Panel) -> Plot | None:
    """A line for each layer; None where the quantity applies to none."""
    lines = {
        layer: records
        for layer, records in history.records.items()
        if any(is_drawn(getattr(record, panel.columns[0]), panel.log) for record in records)
    }
    if not lines:
        return None
    ranked = sorted(lines, key=lambda layer: -find_badness(lines[layer], panel))
    coloured = dict(zip(ranked, COLOURS))

    def paint(axes: Axes) -> None:
        for layer in [*(name for name in ranked[::-1] if name not in coloured), *coloured]:
            for place, column in enumerate(panel.columns):
                points = find_points(lines[layer], column, panel.log)
                look: dict[str, Any] = {
                    "color": coloured.get(layer, OTHER),
                    "marker": "o" if len(points[0]) < 2 else "",
                }
                label = shorten(layer) if layer in coloured and place == 0 else None
                axes.plot(*points, label=label, linewidth=1.8 if layer in coloured else 1.0, **look)
        if panel.limit == panel.limit and axes.get_ylim()[1] > panel.limit / 3:
            axes.axhline(panel.limit, color=INK, linestyle=":", linewidth=1.2)
        if panel.log:
            axes.set_yscale("log")
        elif panel.columns != ("gamma_min", "gamma_max"):
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel(panel.unit)
        axes.locator_params(axis="x", integer=True, nbins=6)
        axes.figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8, labelcolor=INK)

    named = "; ".join(f"{clean(name or 'the model')} {describe_end(lines[name], panel)}" for name in coloured)
    return draw(panel.title, f"{panel.title}, {panel.unit}, over the steps. Last: {named}.", paint, (4.6, 3.7))


def is_drawn(value: float, log: bool) -> bool:
    """Whether a number has a place on the axis."""
    return math.isfinite(value) and (value > 0 or not log)


def find_points(records: Sequence[Record], column: str, log: bool) -> tuple[list[int], list[float]]:
    """Steps and values, with a gap in the line where there is none."""
    values = [getattr(record, column) for record in records]
    return [record.step for record in records], [value if is_drawn(value, log) else math.nan for value in values]


def find_badness(records: Sequence[Record], panel: Panel) -> float:
    """How far off a layer ends, by its last few records: a ratio from 1, a gradient or the least gamma from above."""
    column = panel.columns[0]
    values = [getattr(record, column) for record in records if is_drawn(getattr(record, column), panel.log)][-3:]
    if not values:
        return -math.inf
    mean: float = sum(values) / len(values)
    if column == "ratio":
        return abs(math.log(mean))
    return -mean if column in ("gradient", "gamma_min") else mean


def describe_end(records: Sequence[Record], panel: Panel) -> str:
    """The last values in words."""
    return " to ".join(f"{getattr(records[-1], column):.3g}" for column in panel.columns)


def shorten(layer: str) -> str:
    """A layer's name as a legend has room for it: its end tells more. matplotlib hides labels that begin with _."""
    name = clean(layer or "the model")
    name = name if len(name) <= LONGEST_NAME else "..." + name[3 - LONGEST_NAME :]
    return f"\u200b{name}" if name.startswith("_") else name


def colour(plot: Plot) -> Plot:
    """Return the plot in the colours of the page's style."""
    names = "|".join(VARIABLES)
    svg = re.sub(f"({names})", lambda match: f"var(--{VARIABLES[match[1]]})", plot.svg)
    return Plot(plot.heading, svg, plot.alt_text)
