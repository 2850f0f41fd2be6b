"""Plots as inline SVG: one idea for each panel, colours that colour-blind readers can tell apart, and markers too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from anynorm.apps.document import Plot, draw

from ..intervals import find_interval
from ..metrics import Metric
from ..plots import COLOURS, MARKERS
from .findings import ACCURACY, Findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def say_values(values: dict[str, float], unit: str) -> str:
    """Values by name in words."""
    return "; ".join(f"{name} {value:.3g}{unit}" for name, value in values.items()) or "nothing finished"


def find_limits(values: list[float], metric: Metric = ACCURACY) -> tuple[float, float]:
    """Limits of an axis: every seed inside, 10 points of a share at least; long intervals are cut at the frame."""
    low, high = min(values), max(values)
    if not metric.percent:
        pad = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
        return low - pad, high + pad
    pad = max(0.12 * (high - low), (10 - (high - low)) / 2, 1.0)
    return max(min(low, 0.0), low - pad), min(101.0, high + pad)


def plot_batches(findings: Findings, model: str) -> Plot | None:
    """Test score against batch size, each norm a line of means with 95 % intervals and a dot for each seed."""
    batches = list(findings.plan.batches)
    series = {
        norm: {
            place: list(findings.values((model, batch, norm)).values())
            for place, batch in enumerate(batches)
            if findings.finals.get((model, batch, norm))
        }
        for norm in findings.plan.norms
    }
    series = {norm: values for norm, values in series.items() if values}
    if not series:
        return None

    def paint(axes: Axes) -> None:
        for index, (norm, values) in enumerate(series.items()):
            shift = (index - (len(series) - 1) / 2) * 0.09
            x = [place + shift for place in values]
            found = [interval for v in values.values() if (interval := find_interval(v)) is not None]
            half = [0.0 if i.high is None else i.high - i.mean for i in found]
            axes.errorbar(
                x,
                [i.mean for i in found],
                half,
                color=COLOURS[norm],
                marker=MARKERS[norm],
                capsize=2.5,
                elinewidth=1.2,
            )
            for place, v in zip(x, values.values(), strict=True):
                axes.plot([place] * len(v), v, ".", color=COLOURS[norm], alpha=0.35, markersize=4)
        axes.set_xticks(range(len(batches)), [batch.replace(":", " then ") for batch in batches])
        axes.set(xlabel="batch size", ylabel=f"test {findings.metric.title}", xlim=(-0.5, len(batches) - 0.5))
        axes.set_ylim(
            find_limits([value for values in series.values() for v in values.values() for value in v], findings.metric)
        )

    last = {norm: float(np.mean(values[max(values)])) for norm, values in series.items()}
    alt_text = (
        f"Test {findings.metric.title} against batch size in the {model}. Rightmost means: {say_values(last, '')}."
    )
    return draw(f"{model}", alt_text, paint)


def plot_modes(findings: Findings, model: str) -> Plot | None:
    """Batch norm on the same validation images in training and in evaluation mode, against batch size."""
    points: dict[str, list[tuple[int, float]]] = {"training": [], "evaluation": []}
    for place, batch in enumerate(findings.plan.batches):
        for record in findings.finals.get((model, batch, "batch"), {}).values():
            for mode, found in points.items():
                value = (record.get("modes") or {}).get(f"{mode}_score")
                if value is not None:
                    found.append((place, findings.metric.scale * value))
    if not points["training"]:
        return None
    batches = [batch.replace(":", " then ") for batch in findings.plan.batches]
    looks = {
        "training": ("#56b4e9", "s", "--", "training mode, batch statistics"),
        "evaluation": (COLOURS["batch"], "o", "-", "evaluation mode, running statistics"),
    }
    means = {
        mode: {place: float(np.mean([v for p, v in found if p == place])) for place, _ in found}
        for mode, found in points.items()
    }

    def paint(axes: Axes) -> None:
        for mode, found in points.items():
            colour, marker, line, label = looks[mode]
            axes.plot(*zip(*found, strict=True), ".", color=colour, alpha=0.4, markersize=5)
            axes.plot(list(means[mode]), list(means[mode].values()), line, color=colour, marker=marker, label=label)
        axes.set_xticks(range(len(batches)), batches)
        axes.set(xlabel="batch size", ylabel=f"validation {findings.metric.title}", xlim=(-0.4, len(batches) - 0.6))
        axes.set_ylim(find_limits([value for found in points.values() for _, value in found], findings.metric))
        axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)

    last = {f"{mode} mode": list(values.values())[-1] for mode, values in means.items()}
    alt_text = f"Batch norm in the {model}, the same images in two modes. At the last batch: {say_values(last, '')}."
    return draw(model, alt_text, paint)


def find_colours(table: np.ndarray, metric: Metric) -> tuple[float, float]:
    """Values of the darkest and the brightest colour; outliers of the user's metric do not make all others alike."""
    known = table[np.isfinite(table)]
    if metric.percent or not known.size:
        return 0.0, 100.0
    low, high = (float(value) for value in np.quantile(known, (0.0, 0.75) if not metric.higher else (0.25, 1.0)))
    return low, high if high > low else low + 1.0


def plot_rates(findings: Findings, model: str, batch: str) -> Plot | None:
    """Validation score of every learning rate in the first look, norm by norm."""
    norms = [norm for norm in findings.plan.norms if findings.searched((model, batch, norm))]
    if not norms:
        return None
    rates = findings.plan.rates
    working = [(findings.working_rates((model, batch, norm)) or ([], []))[0] for norm in norms]
    table = np.full((len(norms), len(rates)), np.nan)
    marks = np.full(table.shape, "", dtype=object)
    for row, norm in enumerate(norms):
        for record in findings.searched((model, batch, norm)):
            place, score = (row, rates.index(record["rate"])), record.get("validation_score")
            marks[place] = {"finished": "", "diverged": "×"}.get(record["status"], "–")
            if record["status"] == "finished" and score is not None:
                table[place] = findings.metric.scale * score
                marks[place] = f"{table[place]:.0f}" if findings.metric.percent else f"{table[place]:.2g}"
    low, high = find_colours(table, findings.metric)

    def paint(axes: Axes) -> None:
        colours = "cividis" if findings.metric.higher else "cividis_r"
        axes.imshow(table, cmap=colours, vmin=low, vmax=high, aspect="auto")
        axes.grid(False)
        for (row, column), value in np.ndenumerate(table):
            light = ((value - low) / (high - low) > 0.55) == findings.metric.higher
            colour = "#222222" if not np.isfinite(value) or light else "#ffffff"
            weight = "bold" if rates[column] in working[row] else "normal"
            axes.text(column, row, str(marks[row, column]), ha="center", va="center", color=colour, weight=weight)
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_yticks(range(len(norms)), norms)
        axes.set(xlabel="learning rate")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    counts = {
        norm: float(len(found[0]))
        for norm in norms
        if (found := findings.working_rates((model, batch, norm))) is not None
    }
    alt_text = f"Validation {findings.metric.name} by learning rate in the {model} at batch {batch}. Rates that work: "
    return draw(f"{model}, batch {batch.replace(':', ' then ')}", alt_text + say_values(counts, "") + ".", paint)
