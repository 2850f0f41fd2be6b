"""A page as one HTML file that needs no network and no script: its frame, and plots as inline SVG."""

import io
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anynorm.errors import UserError

from .extras import check_installed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, EDGE, LINE = "#3d434d", "#8a8f98", "#e6e8ec"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "anynorm",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": EDGE,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    # Names come from users: a dollar sign is a dollar sign.
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Plot:
    """One panel: its heading, its SVG, and what it shows in words for those who do not see it."""

    heading: str
    svg: str
    alt_text: str


def draw(heading: str, alt_text: str, paint: Callable[["Axes"], None], size: tuple[float, float] = (4.3, 3.0)) -> Plot:
    """Return a panel that `paint` fills, of this size in inches."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.add_subplot())
        for axes in figure.axes:
            write_powers_out(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Without a size of its own the drawing takes the width of its column.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    return Plot(heading, svg, alt_text)


def write_powers_out(axes: "Axes") -> None:
    """Give logarithmic axes plain numbers: their usual labels are mathematics, which `STYLE` shows as text."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log" and axis.isDefault_majfmt:
            low, high = sorted(axis.get_view_interval())
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())


def write_figures(plots: Iterable[Plot]) -> str:
    """Return plots as a grid of figures with captions."""
    figures = "".join(
        f"<figure><figcaption>{escape(plot.heading)}</figcaption>"
        f'<div role="img" aria-label="{escape(plot.alt_text)}">{plot.svg}</div></figure>\n'
        for plot in plots
    )
    return f'<div class="plots">{figures}</div>'


def write_document(title: str, body: Iterable[str], style: str = "") -> str:
    """Return a whole page.

    Args:
        title: as plain text.
        body: parts of the page, as HTML.
        style: rules of this page's own, after those that all pages share.
    """
    shared = files("anynorm.apps").joinpath("document.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>\n{shared}{style}</style>\n</head>\n'
        f"<body>\n<main>\n{''.join(body)}</main>\n</body>\n</html>\n"
    )


def check_output(command: str, what: str, out: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse, before any work, a file that cannot be drawn to.

    Args:
        command: what the user asked, for the message: explain.
        what: the kind of file, in the words of the message: a picture.

    Raises:
        UserError: another suffix, no such folder, no right to write, or no matplotlib.
    """
    if out.suffix.lower() not in suffixes:
        names = " or ".join(filter(None, [", ".join(suffixes[:-1]), suffixes[-1]]))
        raise UserError(f"{command}: {what} ends in {names}; got {str(out)!r}.")
    folder = out.parent
    if not folder.is_dir():
        raise UserError(f"{command}: there is no folder {str(folder)!r} to write {out.name} to; make it first.")
    if out.is_dir() or not os.access(out if out.exists() else folder, os.W_OK):
        raise UserError(f"{command}: {str(out)!r} cannot be written; choose another place.")
    check_installed(f"{command}: {what}", ["matplotlib"])
