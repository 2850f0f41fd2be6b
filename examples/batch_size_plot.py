"""The picture of docs/small-batch.md: error against the images that share statistics, a panel for each network."""

from __future__ import annotations

import io
import re

import matplotlib as mpl
from matplotlib.figure import Figure

from anynorm.apps.document import STYLE
from anynorm.apps.studies.intervals import Interval

TITLES = {
    "mlp": "fully connected: a statistic is over N values",
    "cnn": "convolutional: over N × 196 and N × 49 values",
}
# Okabe and Ito's colours, which colour-blind readers can tell apart, and markers too.
LOOKS = {
    "batch, running averages": ("#d55e00", "o"),
    "batch, recalibrated": ("#e69f00", "^"),
    "batch renormalization": ("#cc79a7", "v"),
    "group": ("#009e73", "D"),
    "layer": ("#0072b2", "s"),
}


def draw(curves: dict[str, dict[str, list[Interval]]], sizes: tuple[int, ...]) -> str:
    """An SVG with means and 95 % intervals; the scale of errors is logarithmic."""
    with mpl.rc_context({**STYLE, "figure.facecolor": "white"}):
        figure = Figure(figsize=(9.2, 3.9), layout="constrained")
        panels = figure.subplots(1, len(curves), sharey=True)
        for axes, (network, lines) in zip(panels, curves.items(), strict=True):
            for index, (line, intervals) in enumerate(lines.items()):
                colour, marker = LOOKS[line]
                x = [place + (index - 2) * 0.07 for place in range(len(sizes))]
                means = [interval.mean for interval in intervals]
                half = [0.0 if i.high is None else i.high - i.mean for i in intervals]
                axes.errorbar(x, means, half, color=colour, marker=marker, capsize=2.5, elinewidth=1.2, label=line)
            axes.set_title(TITLES[network], fontsize=10)
            axes.set_xticks(range(len(sizes)), map(str, sizes))
            axes.set_xlabel("images that share statistics, N")
            axes.set_yscale("log")
            ticks = (5, 10, 20, 50, 100)
            axes.set_yticks(ticks, map(str, ticks))
            axes.minorticks_off()
        panels[0].set_ylabel("test error, %")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
