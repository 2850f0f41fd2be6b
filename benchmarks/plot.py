"""The plot of the speed page: every case as a dot, on a logarithmic axis, one panel for each mode."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from anynorm.apps.timing.cases import MODES

from .results import Row

# Okabe & Ito (2008): to be told apart with any colour vision; the markers differ too.
PEERS = {
    "torch": ("torch eager", "#0072b2", "o"),
    "compile": ("torch.compile", "#e69f00", "^"),
    "jax": ("JAX", "#009e73", "x"),
}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "anynorm",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8ec",
    "figure.facecolor": "white",
}
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def name_line(row: Row) -> str:
    """The line of the plot that a row belongs to."""
    return f"{row.place}, {row.norm}" + (", channels_last" if row.layout == "channels_last" else "")


def draw(rows: list[Row], path: Path) -> None:
    """Draw the float32 rows and save them."""
    rows = [row for row in rows if row.dtype == "float32" and row.peer in PEERS]
    lines = list(dict.fromkeys(name_line(row) for row in rows))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 1.6 + 0.42 * len(lines)), layout="constrained")
        panels = figure.subplots(1, len(MODES), sharey=True, sharex=True)
        for axes, mode in zip(panels, MODES, strict=True):
            draw_mode(axes, [row for row in rows if row.mode == mode], lines)
            axes.set_title(mode)
        panels[0].set_yticks(range(len(lines)), lines)
        panels[0].set_ylim(len(lines) - 0.5, -0.9)
        panels[1].set_xlabel("a peer's time over anynorm's: right of 1 anynorm is faster")
        legend = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
        figure.legend([*legend.values()], [*legend], loc="outside upper center", ncols=len(legend), frameon=False)
        figure.savefig(path, metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else None)


def draw_mode(axes: Axes, rows: list[Row], lines: list[str]) -> None:
    """One panel: a dot for each case, a bar at each line's mean over torch eager, a ring around the worst case."""
    axes.set_xscale("log")
    axes.axvline(1, color="#3d434d", linewidth=1)
    for line in range(0, len(lines), 2):
        axes.axhspan(line - 0.5, line + 0.5, color="#f6f7f9", zorder=0)
    peers = [peer for peer in PEERS if any(row.peer == peer for row in rows)]
    for place, peer in enumerate(peers):
        label, colour, marker = PEERS[peer]
        offset = 0.26 * (place - (len(peers) - 1) / 2)
        own = [row for row in rows if row.peer == peer]
        heights = [lines.index(name_line(row)) + offset for row in own]
        axes.scatter(
            [row.ratio for row in own], heights, s=16, c=colour, marker=marker, linewidths=1, alpha=0.75, label=label
        )
        if peer == "torch":
            draw_means(axes, own, lines, offset)
            mark_worst(axes, own, lines, offset)
    axes.xaxis.set_major_locator(mpl.ticker.FixedLocator(TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", length=0)


def draw_means(axes: Axes, rows: list[Row], lines: list[str], offset: float) -> None:
    """A short bar at the geometric mean over torch eager of each line."""
    for height, line in enumerate(lines):
        ratios = [row.ratio for row in rows if name_line(row) == line]
        if ratios:
            label = "geometric mean over torch eager" if height == 0 else None
            mean = statistics.geometric_mean(ratios)
            axes.plot(
                [mean, mean], [height + offset - 0.2, height + offset + 0.2], color="#004b78", lw=2.5, label=label
            )


def mark_worst(axes: Axes, rows: list[Row], lines: list[str], offset: float) -> None:
    """A ring around the worst case over torch eager, with its name and ratio."""
    if not rows:
        return
    worst = min(rows, key=lambda row: row.ratio)
    height = lines.index(name_line(worst)) + offset
    axes.scatter(
        [worst.ratio],
        [height],
        s=90,
        facecolors="none",
        edgecolors="#d55e00",
        linewidths=1.6,
        label="worst over torch eager",
    )
    axes.annotate(
        f"{worst.ratio:.2f}: {worst.norm} {worst.shape}",
        (worst.ratio, height),
        textcoords="offset points",
        xytext=(4, 9),
        fontsize=8,
        color="#a34700",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
    )
