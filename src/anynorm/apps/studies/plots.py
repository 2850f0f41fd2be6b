"""What pictures of studies are made of: colours by norm, means with intervals, a dot for each seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .fit import LEVEL_EVERY
from .intervals import find_interval
from .workers import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito (2008), without its yellow, which is too light for lines on white.
COLOURS = {
    "none": "#4d4d4d",
    "batch": "#d55e00",
    "layer": "#0072b2",
    "instance": "#cc79a7",
    "group": "#009e73",
    "rms": "#e69f00",
}
MARKERS = {"none": "x", "batch": "o", "layer": "s", "instance": "v", "group": "D", "rms": "^"}


def dots(
    axes: Axes,
    values: Sequence[Mapping[int, float]],
    label: str,
    *,
    places: Sequence[float] | None = None,
    line: str = "",
    **look: Any,
) -> None:
    """Means with 95 % intervals, and a pale dot for each seed.

    Args:
        axes: what is drawn on.
        values: by seed, for each place.
        label: in the legend.
        places: along the axis; 0, 1, 2... if not given.
        line: joins the means, as matplotlib writes it: `-`.
        look: colour and marker, as matplotlib takes them.
    """
    places = list(range(len(values))) if places is None else list(places)
    found = [(place, interval) for place, v in zip(places, values) if (interval := find_interval(list(v.values())))]
    look = {"marker": "o", "capsize": 2.5, "label": label, "linestyle": line or "none", **look}
    half = [0.0 if i.high is None else i.high - i.mean for _, i in found]
    drawn = axes.errorbar([p for p, _ in found], [i.mean for _, i in found], half, **look)
    colour = drawn.lines[0].get_color()
    for place, v in zip(places, values):
        axes.plot([place] * len(v), list(v.values()), ".", color=colour, alpha=0.35, markersize=4)


def split_axes(axes: Axes, columns: int) -> list[Axes]:
    """Panels side by side in the place of axes, which are taken away."""
    figure, spec = axes.figure, axes.get_subplotspec()
    assert spec is not None
    axes.remove()
    places = spec.subgridspec(1, columns)
    return [figure.add_subplot(places[0, column]) for column in range(columns)]


def draw_steps(panel: Axes, records: Sequence[Record], arms: Sequence[str], across: str) -> None:
    """Steps to a level against a field of the records, on log scales: a dot for each seed, and geometric means.

    A dotted line is the budget, where the level was never reached.
    """
    most = max(record["most"] for record in records)
    for arm in arms:
        own = [record for record in records if record["arm"] == arm]
        places = sorted({record[across] for record in own})
        means = [10 ** np.mean([r["log_steps"] for r in own if r[across] == place]) for place in places]
        drawn = panel.plot(places, means, label=arm, color=COLOURS.get(arm), marker=MARKERS.get(arm, "o"))
        colour = drawn[0].get_color()
        panel.plot([r[across] for r in own], [r["steps"] for r in own], ".", color=colour, alpha=0.3)
    panel.axhline(most, color="#8a8f98", linestyle=":")
    panel.annotate("never reached", (0.02, most), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    panel.set(xscale="log", yscale="log", ylim=(LEVEL_EVERY / 1.2, 1.6 * most))
