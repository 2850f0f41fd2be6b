"""The explanation as a picture: the same numbers as in the terminal, drawn with matplotlib."""

from pathlib import Path
from typing import Any

import torch

from anynorm.apps.document import check_output
from anynorm.apps.explain import numbers
from anynorm.apps.explain.notation import COLOURS, LETTERS, SENTENCES, SHOWN, write_vector
from anynorm.apps.explain.numbers import BETA, GAMMA, MOMENTUM, PEOPLE, SMALL, Pools
from anynorm.errors import UserError

SUFFIXES = (".png", ".svg", ".pdf")
# Blue and orange keep their contrast under every kind of colour vision; marks differ in shape as well.
BLUE, ORANGE, DARK, PALE = "#0072B2", "#D55E00", "#222222", "#8A8A8A"
MARKS = ("o", "s")


def check_picture(out: Path) -> None:
    """Refuse, before any work, a file that cannot be drawn to, as `check_output` does."""
    check_output("explain", "a picture", out, SUFFIXES)


def draw_explanation(out: Path) -> None:
    """Draw the three steps, training against evaluation, and who shares a mean."""
    from matplotlib import pyplot

    figure = new_figure(11, 12.6)
    rows = figure.subfigures(3, 1, height_ratios=[3.2, 3.0, 5.0])
    figure.suptitle(r"$y \;=\; \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}}\;\gamma + \beta$", fontsize=22)
    _draw_steps(rows[0])
    _draw_modes(rows[1])
    _draw_family(rows[2])
    save(figure, out)
    pyplot.close(figure)


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of this size in inches, in the library's style, drawn without a display."""
    import matplotlib

    # A file is all that is wanted; the default backend may look for a screen and fail.
    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)
    return pyplot.figure(figsize=(width, height), layout=layout, facecolor="white")


def save(figure: Any, out: Path) -> None:
    """Write the figure; a failing disk becomes one sentence."""
    try:
        figure.savefig(out, dpi=150, facecolor="white")
    except OSError as problem:
        raise UserError(f"explain: writing {str(out)!r} failed: {problem.strerror or problem}.") from problem


def tidy(axes: Any, title: str) -> None:
    """Give a panel its title and take away the lines that carry nothing."""
    axes.set_title(title, fontsize=11, loc="left", color=DARK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=DARK, labelsize=9)


def _draw_steps(figure: Any) -> None:
    """Draw both channels before, normalized, and after scale and shift, each with its mean and spread."""
    steps = numbers.take_steps()
    _heading(figure, f"1  The three steps, on a batch of {len(PEOPLE)} people with two channels")
    titles = (
        "Step 1: mean and variance per channel",
        "Step 2: subtract the mean, divide by the root",
        f"Step 3: times {write_vector(GAMMA)}, plus {write_vector(BETA)}",
    )
    panels = figure.subplots(1, 3)
    panels[1].sharey(panels[2])
    for axes, title, values in zip(panels, titles, (steps.x, steps.normalized, steps.y)):
        tidy(axes, title)
        for channel, colour in enumerate((BLUE, ORANGE)):
            _draw_channel(axes, channel, values[:, channel], colour)
        axes.set_xlim(-0.4, 1.9)
        axes.set_xticks([0, 1], ["height, m", "weight, kg"])
        axes.axhline(0, color=PALE, linewidth=0.8, zorder=0)


def _draw_channel(axes: Any, channel: int, values: torch.Tensor, colour: str) -> None:
    """Draw one channel's values, their mean as a line and one standard deviation either side as a band."""
    mean, std = values.mean().item(), values.std(correction=0).item()
    ends = [channel - 0.2, channel + 0.2]
    axes.fill_between(ends, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    axes.plot(ends, [mean, mean], color=colour, linewidth=2)
    axes.scatter([channel] * len(values), values, color=colour, marker=MARKS[channel], s=32, zorder=3, alpha=0.85)
    # Beside the mean, but never on the line of zeros below it.
    label = f"mean {mean:.2f}\nvar {std**2:.4f}" if std < 1 else f"mean {mean:.2f}\nvar {std**2:.2f}"
    axes.annotate(label, (channel + 0.2, mean), (4, 2), textcoords="offset points", fontsize=9, va="bottom", color=DARK)


def _draw_modes(figure: Any) -> None:
    """Draw running mean, running variance and one person's output against the number of batches seen."""
    steps, history = numbers.take_steps(), numbers.follow_running(tuple(range(71)))
    n = len(PEOPLE)
    rule = f"running = {1 - MOMENTUM:g} × running + {MOMENTUM:g} × new"
    _heading(figure, f"2  Training and evaluation: {rule}, after every batch")
    batches = [running.batches for running in history]
    mean, var, y = figure.subplots(1, 3)
    tidy(mean, "running mean of height")
    mean.plot(batches, [running.mean[0] for running in history], color=BLUE, linewidth=2, label="running mean")
    _level(mean, steps.mean[0].item(), "mean of the batch")
    tidy(var, "running variance of height")
    var.plot(batches, [running.var[0] for running in history], color=BLUE, linewidth=2, label="running variance")
    var.set_yscale("log")
    _level(var, (steps.var[0] * n / (n - 1)).item(), "with n - 1: stored")
    _level(var, steps.var[0].item(), f"with n = {n}: in training", style=":")
    tidy(y, "output of person 1 (height)")
    outputs = [numbers.evaluate(running)[0, 0] for running in history]
    y.plot(batches, outputs, color=BLUE, linewidth=2, label="in evaluation")
    _level(y, steps.y[0, 0].item(), "in training", style=":")
    for axes, place in ((mean, "lower right"), (var, "upper right"), (y, "upper right")):
        axes.set_xlabel("batches seen", fontsize=9, color=DARK)
        axes.margins(y=0.08)
        if axes is var:
            axes.set_ylim(top=20.0)  # room for the legend above the curve
        axes.legend(loc=place, fontsize=9, frameon=False, labelcolor=DARK)


def _level(axes: Any, value: float, label: str, style: str = "--") -> None:
    """Draw a level that the curve may approach, named with its number in the legend."""
    text = f"{label}, {value:.4f}" if abs(value) < 0.1 else f"{label}, {value:.2f}"
    axes.axhline(value, color=ORANGE, linewidth=1.6, linestyle=style, label=text)


def _draw_family(figure: Any) -> None:
    """Draw the same small tensor once per norm, cells coloured by the mean they share."""
    _heading(figure, "3  Who shares a mean? Cells with the same letter and colour share mean and variance")
    for axes, norm in zip(figure.subplots(2, 2).flat, SHOWN):
        pools = numbers.find_pools(norm)
        axes.set_title(f"{norm.capitalize()} norm: {SENTENCES[norm]}", fontsize=11, loc="left", color=DARK)
        draw_cells(axes, pools)


def draw_cells(axes: Any, pools: Pools, x: torch.Tensor = SMALL) -> None:
    """Draw x with samples side by side, channels as rows; to the right, each pool's mean and variance."""
    samples, channels, positions = x.shape
    for sample in range(samples):
        left = sample * (positions + 0.5)
        axes.text(left + positions / 2, -0.2, f"sample {sample + 1}", ha="center", va="bottom", fontsize=9, color=DARK)
        for channel in range(channels):
            for position in range(positions):
                pool = int(pools.label[sample, channel, position])
                text = rf"{x[sample, channel, position]:.0f}$\,$" + rf"$_\mathrm{{{LETTERS[pool]}}}$"
                _draw_cell(axes, left + position, channel, COLOURS[pool], text)
    for channel in range(channels):
        axes.text(-0.15, channel + 0.5, f"channel {channel + 1}", ha="right", va="center", fontsize=9, color=DARK)
    start = samples * (positions + 0.5) + 0.2
    for pool in range(pools.count):
        column, row = divmod(pool, channels)
        left = start + 3.5 * column
        _draw_cell(axes, left, row, COLOURS[pool], rf"$\mathrm{{{LETTERS[pool]}}}$", width=0.7)
        text = f"mean {pools.mean[pool]:.2f}\nvar {pools.var[pool]:.2f}"
        axes.text(left + 0.85, row + 0.5, text, ha="left", va="center", fontsize=8.5, color=DARK)
    axes.set_xlim(-1.9, start + 6.8)
    axes.set_ylim(channels + 0.1, -0.8)
    axes.axis("off")


def _draw_cell(axes: Any, left: float, top: float, colour: str, text: str, width: float = 1.0) -> None:
    """Draw one coloured cell with its text in the middle."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, top), width, 1.0, facecolor=colour, edgecolor="white", linewidth=1.5))
    axes.text(left + width / 2, top + 0.5, text, ha="center", va="center", fontsize=11, color="black")


def _heading(figure: Any, text: str) -> None:
    """Print the title of a part at its left."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=13, fontweight="bold", color=DARK)


def draw_layer(out: Path, observed: Any, title: str, names: list[str]) -> None:
    """Draw the values of a layer's first pools before and after, each as a histogram with its mean.

    Args:
        out: the file.
        observed: a `anynorm.apps.explain.layer.ObservedLayer`.
        title: names the model and the layer.
        names: what to call the pools, the first ones first.
    """
    from matplotlib import pyplot

    figure = new_figure(10, 1.2 + 1.7 * len(names))
    # A name may hold a $, which matplotlib takes for mathematics.
    heading = f"{title} ({type(observed.norm).__name__})"
    figure.suptitle(heading, fontsize=13, fontweight="bold", color=DARK, parse_math=False)
    panels = figure.subplots(len(names), 2, squeeze=False, sharex="col")
    for side, (what, values) in enumerate((("before (x)", observed.x), ("after (y), in training", observed.y))):
        shared = _pool_values(observed, values)
        for row, name in enumerate(names):
            _draw_histogram(panels[row, side], f"{name}, {what}", shared[row], (BLUE, ORANGE)[side])
    save(figure, out)
    pyplot.close(figure)


def _pool_values(observed: Any, values: torch.Tensor) -> torch.Tensor:
    """Return the values as (pools, values of a pool)."""
    view = observed.pooling.open(values)
    kept = [axis for axis in range(view.dim()) if axis not in observed.pooling.pooled]
    size = observed.pooling.count(view)
    y: torch.Tensor = view.permute(*kept, *observed.pooling.pooled).reshape(-1, size)
    return y


def _draw_histogram(axes: Any, title: str, values: torch.Tensor, colour: str) -> None:
    """Draw one pool's values, with its mean as a line and its mean and variance in words."""
    tidy(axes, title)
    values = values[values.isfinite()]
    bins = max(5, min(40, int(len(values) ** 0.5)))
    axes.hist(values.tolist(), bins=bins, color=colour, alpha=0.45)
    axes.axvline(values.mean().item(), color=DARK, linewidth=1.4)
    axes.axvline(0, color=PALE, linewidth=0.8, linestyle=":")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    mean, std = values.mean().item(), values.std(correction=0).item()
    # A mean of 1e-10 standard deviations is rounding, not news.
    label = f"mean {mean if abs(mean) > 1e-6 * std else 0.0:.3g}\nvar {std**2:.3g}"
    axes.text(0.99, 0.92, label, transform=axes.transAxes, ha="right", va="top", fontsize=9, color=DARK)
