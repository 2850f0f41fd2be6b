"""What pictures of studies are made of: colours by norm, means with intervals, a dot for each seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from .intervals import find_interval

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
