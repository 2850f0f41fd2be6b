"""Plots over the course of training; runs that diverged are drawn as far as they got."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from anynorm.apps.document import Plot, draw

from ..plots import COLOURS, MARKERS
from .findings import Findings, plain_sizes
from .plots import say_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = dict[str, np.ndarray]


def average_curves(findings: Findings, model: str, batch: str) -> dict[str, Curve]:
    """Curves of each norm, averaged over its seeds that did not diverge; what was not finite in any of them is NaN."""
    curves = {}
    for norm in findings.plan.norms:
        records = findings.finals.get((model, batch, norm), {}).values()
        found = [record["curve"] for record in records if record["status"] != "diverged"]
        if found:
            curves[norm] = {
                name: np.mean([np.array(curve[name], dtype=float) for curve in found], axis=0) for name in found[0]
            }
    return curves


def find_diverged(findings: Findings, model: str, batch: str) -> list[tuple[str, Curve]]:
    """(norm, curve until it ended) of every full run that diverged."""
    return [
        (norm, {name: np.array(values, dtype=float) for name, values in record["curve"].items()})
        for norm in findings.plan.norms
        for record in findings.finals.get((model, batch, norm), {}).values()
        if record["status"] == "diverged"
    ]


def plot_curves(findings: Findings, model: str, batch: str) -> list[Plot]:
    """Training loss and validation score against steps and against seconds."""
    curves, diverged = average_curves(findings, model, batch), find_diverged(findings, model, batch)
    if not curves and not diverged:
        return []
    plots = []
    score = f"validation {findings.metric.title}"
    for across, unit in (("step", "steps"), ("seconds", "seconds of training")):
        for up, label in (("loss", "training loss"), ("score", score)):

            def paint(axes: Axes, across: str = across, unit: str = unit, up: str = up, label: str = label) -> None:
                scale = findings.metric.scale if up == "score" else 1
                for norm, curve in curves.items():
                    axes.plot(curve[across], scale * curve[up], color=COLOURS[norm], marker=MARKERS[norm])
                for norm, curve in diverged:
                    known = np.flatnonzero(np.isfinite(curve[up]))
                    axes.plot(curve[across], scale * curve[up], color=COLOURS[norm], linewidth=0.8)
                    last = known[-1:]
                    axes.plot(curve[across][last], scale * curve[up][last], "X", color=COLOURS[norm], markersize=8)
                axes.set(xlabel=unit, ylabel=label)
                axes.set_xlim(left=0)
                if up == "loss":
                    show_logarithms(axes)

            scale = findings.metric.scale if up == "score" else 1
            last = {norm: float(scale * curve[up][-1]) for norm, curve in curves.items()}
            alt_text = f"{label} against {unit} in the {model} at batch {batch}. Last values: {say_values(last, '')}."
            if diverged:
                alt_text += f" Runs that diverged: {', '.join(norm for norm, _ in diverged)}."
            heading = "training loss" if up == "loss" else f"validation {findings.metric.name}"
            plots.append(draw(f"{heading} against {unit}", alt_text, paint))
    return plots


def show_logarithms(axes: Axes) -> None:
    """A logarithmic axis with plain numbers; where a loss is not positive, the axis stays linear."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    if np.nanmin(values, initial=np.inf) <= 0:
        return
    axes.set_yscale("log")
    # Where a run diverged the axis spans many decades, which have no room for ticks between them.
    wide = np.nanmax(values, initial=-np.inf) > 1e3 * np.nanmin(values, initial=np.inf)
    from matplotlib.ticker import LogLocator

    axes.yaxis.set_major_locator(LogLocator() if wide else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


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
