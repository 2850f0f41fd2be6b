"""Plots as inline SVG: one idea for each panel, colours that colour-blind readers can tell apart, and markers too."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from anynorm.apps.document import Plot, draw

from ..intervals import find_interval
from ..plots import COLOURS, MARKERS
from .judge import Findings, plain_sizes


def say_values(values: dict[str, float], unit: str) -> str:
    """Values by name in words."""
    return "; ".join(f"{name} {value:.3g}{unit}" for name, value in values.items()) or "nothing finished"


def find_limits(accuracies: list[float]) -> tuple[float, float]:
    """Limits of an axis in percent: every seed inside and 10 points at least; long intervals are cut at the frame."""
    low, high = min(accuracies), max(accuracies)
    pad = max(0.12 * (high - low), (10 - (high - low)) / 2, 1.0)
    return max(0.0, low - pad), min(101.0, high + pad)


def plot_batches(findings: Findings, model: str) -> Plot | None:
    """Test accuracy against batch size, each norm a line of means with 95 % intervals and a dot for each seed."""
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
        axes.set(xlabel="batch size", ylabel="test accuracy, %", xlim=(-0.5, len(batches) - 0.5))
        axes.set_ylim(find_limits([value for values in series.values() for v in values.values() for value in v]))

    last = {norm: float(np.mean(values[max(values)])) for norm, values in series.items()}
    alt_text = f"Test accuracy against batch size in the {model}. Rightmost means: {say_values(last, ' %')}."
    return draw(f"{model}", alt_text, paint)


def plot_modes(findings: Findings, model: str) -> Plot | None:
    """Batch norm on the same validation images in training and in evaluation mode, against batch size."""
    points: dict[str, list[tuple[int, float]]] = {"training": [], "evaluation": []}
    for place, batch in enumerate(findings.plan.batches):
        for record in findings.finals.get((model, batch, "batch"), {}).values():
            for mode, found in points.items():
                value = (record.get("modes") or {}).get(f"{mode}_accuracy")
                if value is not None:
                    found.append((place, 100 * value))
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
        axes.set(xlabel="batch size", ylabel="validation accuracy, %", xlim=(-0.4, len(batches) - 0.6))
        axes.set_ylim(find_limits([value for found in points.values() for _, value in found]))
        axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)

    last = {f"{mode} mode": list(values.values())[-1] for mode, values in means.items()}
    alt_text = f"Batch norm in the {model}, the same images in two modes. At the last batch: {say_values(last, ' %')}."
    return draw(model, alt_text, paint)


def average_curves(findings: Findings, model: str, batch: str) -> dict[str, dict[str, np.ndarray]]:
    """Curves of each norm, averaged over its seeds; a value that was not finite in any seed is NaN."""
    curves = {}
    for norm in findings.plan.norms:
        found = [r["curve"] for r in findings.finals.get((model, batch, norm), {}).values()]
        # A run that diverged stopped early and has fewer points: the others' points go on without it.
        length = max((len(curve["step"]) for curve in found), default=0)
        found = [curve for curve in found if len(curve["step"]) == length]
        if found:
            curves[norm] = {
                name: np.mean([np.array(curve[name], dtype=float) for curve in found], axis=0) for name in found[0]
            }
    return curves


def plot_curves(findings: Findings, model: str, batch: str) -> list[Plot]:
    """Training loss and validation accuracy against steps and against seconds."""
    curves = average_curves(findings, model, batch)
    if not curves:
        return []
    plots = []
    for across, unit in (("step", "steps"), ("seconds", "seconds of training")):
        for up, label in (("loss", "training loss"), ("accuracy", "validation accuracy, %")):

            def paint(axes: Axes, across: str = across, unit: str = unit, up: str = up, label: str = label) -> None:
                for norm, curve in curves.items():
                    y = 100 * curve[up] if up == "accuracy" else curve[up]
                    axes.plot(curve[across], y, color=COLOURS[norm], marker=MARKERS[norm])
                axes.set(xlabel=unit, ylabel=label)
                axes.set_xlim(left=0)
                if up == "loss":
                    axes.set_yscale("log")
                    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                    axes.yaxis.set_major_formatter("{x:g}")
                    axes.yaxis.set_minor_formatter("")

            scale = 100 if up == "accuracy" else 1
            last = {norm: float(scale * curve[up][-1]) for norm, curve in curves.items()}
            alt_text = f"{label} against {unit} in the {model} at batch {batch}. Last values: {say_values(last, '')}."
            plots.append(draw(f"{label.split(',')[0]} against {unit}", alt_text, paint))
    return plots


def plot_rates(findings: Findings, model: str, batch: str) -> Plot | None:
    """Validation accuracy of every learning rate in the first look, norm by norm."""
    norms = [norm for norm in findings.plan.norms if findings.searched((model, batch, norm))]
    if not norms:
        return None
    rates = findings.plan.rates
    working = [(findings.working_rates((model, batch, norm)) or ([], []))[0] for norm in norms]
    table = np.full((len(norms), len(rates)), np.nan)
    for row, norm in enumerate(norms):
        for record in findings.searched((model, batch, norm)):
            if record["status"] == "finished":
                table[row, rates.index(record["rate"])] = 100 * record["validation_accuracy"]

    def paint(axes: Axes) -> None:
        axes.imshow(table, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        axes.grid(False)
        for (row, column), value in np.ndenumerate(table):
            known = np.isfinite(value)
            colour = "#222222" if not known or value > 55 else "#ffffff"
            weight = "bold" if rates[column] in working[row] else "normal"
            label = f"{value:.0f}" if known else "–"
            axes.text(column, row, label, ha="center", va="center", color=colour, weight=weight)
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
    alt_text = f"Validation accuracy by learning rate in the {model} at batch {batch}. Rates that work: "
    return draw(f"{model}, batch {batch.replace(':', ' then ')}", alt_text + say_values(counts, "") + ".", paint)


def plot_drift(findings: Findings, model: str) -> list[Plot]:
    """Mean and standard deviation of a fixed probe batch's inputs to the last layer, during training."""
    batch = (plain_sizes(findings.plan) or list(findings.plan.batches))[0]
    curves = average_curves(findings, model, batch)
    curves = {norm: curve for norm, curve in curves.items() if np.isfinite(curve["probe_mean"]).any()}
    plots = []
    for name, label in (("probe_mean", "mean"), ("probe_std", "standard deviation")):

        def paint(axes: Axes, name: str = name, label: str = label) -> None:
            for norm, curve in curves.items():
                axes.plot(curve["step"], curve[name], color=COLOURS[norm], marker=MARKERS[norm])
            axes.set(xlabel="steps", ylabel=f"{label} of the inputs")
            axes.set_xlim(left=0)

        if curves:
            moved = {norm: float(curve[name][-1] - curve[name][0]) for norm, curve in curves.items()}
            alt_text = (
                f"{label.capitalize()} of the last layer's inputs in the {model} at batch {batch}, end less start: "
            )
            plots.append(draw(f"{model}, batch {batch}: {label}", alt_text + say_values(moved, "") + ".", paint))
    return plots
