"""`anynorm explain`: a small batch in real numbers, in the terminal and, where asked, as a picture."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.columns import Columns
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from anynorm.apps.explain import numbers
from anynorm.apps.explain.notation import COLOURS, FORMULA, LETTERS, SENTENCES, SHOWN, write_vector
from anynorm.apps.explain.numbers import BETA, GAMMA, MOMENTUM, PEOPLE, SMALL, Pools, Running, Steps
from anynorm.apps.terminal import heading, join_words, open_console, plain_table, say
from anynorm.errors import UserError


def print_explanation(
    out: Path | None = None, model: str | None = None, layer: str | None = None, console: Console | None = None
) -> None:
    """Print the explanation, on the library's own small batch or on a layer of a model.

    Args:
        out: also draw a picture there (.png, .svg or .pdf).
        model: a built-in model or module:factory whose layer is shown instead.
        layer: name of that layer; where None, the first norm.
        console: where to print; where None, standard output.
    """
    if layer is not None and model is None:
        raise UserError("explain: --layer names a layer of your model; give the model too, with --mine module:factory.")
    if out is not None:
        from anynorm.apps.explain.picture import check_picture

        check_picture(out)
    console = console or open_console()
    if model is None:
        explain_family(console, out)
    else:
        from anynorm.apps.explain.layer import explain_layer

        explain_layer(console, model, layer, out)


def explain_family(console: Console, out: Path | None) -> None:
    """Print, and where asked draw, three steps, training against evaluation, and who shares a mean."""
    # Drawn first: a disk that fails ends the command before anything is printed.
    if out is not None:
        from anynorm.apps.explain.picture import draw_explanation

        draw_explanation(out)
    console.print(FORMULA, style="bold")
    console.print("One line normalizes. Three steps make it up.")
    explain_steps(console)
    explain_modes(console)
    explain_pools(console)
    if out is not None:
        console.print(f"\nThe same as a picture: {out}")


def number(value: float, digits: int = 3) -> str:
    """Return a number with a fixed number of decimals, and zero without a sign."""
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def explain_steps(console: Console) -> None:
    """Show the three steps on four people with two channels."""
    steps = numbers.take_steps()
    heading(console, "1  The three steps")
    say(
        console,
        f"A batch: {len(PEOPLE)} people. Two channels: height in metres, weight in kilograms.",
        f"Weights are about {steps.mean[1] / steps.mean[0]:.0f} times the heights, so a sum of both would hear",
        "the weights only. Normalization puts the channels on one scale.\n",
    )
    console.print(_tabulate_steps(steps))
    say(
        console,
        "",
        "Step 1. Take mean and variance of each channel, over the people.",
        f"        The variance is the population's: a sum of squares, divided by n = {len(PEOPLE)}.",
        "Step 2. Subtract the mean. Divide by sqrt(var + eps).",
        "        Every channel now has mean 0 and variance 1.",
        f"        (Just below 1: eps = {numbers.EPS:g} keeps the root away from 0.)",
        f"Step 3. Multiply by gamma = {write_vector(GAMMA)}. Add beta = {write_vector(BETA)}.",
        "        Training learns both, one of each per channel.",
        "        So the layer can undo its own work where that helps.",
        "        Now beta is the mean, and gamma squared the variance.",
    )


def _tabulate_steps(steps: Steps) -> Table:
    """Return x, normalized and y of each person, with mean and variance of each column below."""
    table = plain_table("", *(f"{what}\n{name}" for what in ("x", "normalized", "y") for name in ("height", "weight")))
    columns = torch.cat([steps.x, steps.normalized, steps.y], dim=1)
    digits = (2, 1, 3, 3, 3, 3)
    for row, values in enumerate(columns):
        table.add_row(f"person {row + 1}", *map(number, values.tolist(), digits), end_section=row == len(columns) - 1)
    var = columns.var(dim=0, correction=0)
    table.add_row("mean", *map(number, columns.mean(dim=0).tolist(), digits), style="bold")
    table.add_row("var", *map(number, var.tolist(), (4, 1, 4, 4, 4, 4)), style="bold")
    return table


def explain_modes(console: Console) -> None:
    """Show the running averages filling up, and what evaluation makes of them."""
    n = len(PEOPLE)
    heading(console, "2  Training and evaluation")
    say(
        console,
        "In training, mean and variance come from the batch. A person's output then",
        "depends on who else is there. Evaluation must not: it uses running averages.",
        "Every training batch moves them a little:\n",
        f"    running = {1 - MOMENTUM:g} * running + {MOMENTUM:g} * new        ({MOMENTUM:g} is the momentum)\n",
    )
    console.print(_tabulate_running(numbers.take_steps(), numbers.follow_running()))
    say(
        console,
        "",
        "At first evaluation is far off: the averages still remember where they began,",
        "at mean 0 and variance 1. Early evaluation can therefore be wrong.",
        "In the end they arrive. But the stored variance is divided by n-1, not by n:",
        f"{n}/{n - 1} = {n / (n - 1):.3f} times larger here, {256 / 255:.3f} times in a batch of 256.",
        "So training and evaluation differ for ever, by little unless n is small.",
    )


def _tabulate_running(steps: Steps, history: Sequence[Running]) -> Table:
    """Return the running averages and one output after some batches, with those of the batch itself below."""
    n = len(PEOPLE)
    table = plain_table("after", "running mean\nheight", "running var\nheight", "y of person 1,\nevaluation")
    for row, running in enumerate(history):
        name = f"{running.batches} batch{'' if running.batches == 1 else 'es'}"
        values = (running.mean[0].item(), running.var[0].item(), numbers.evaluate(running)[0, 0].item())
        table.add_row(name, *map(number, values, (4, 4, 3)), end_section=row == len(history) - 1)
    unbiased = (steps.var * n / (n - 1))[0].item()
    table.add_row("this batch, n", *map(number, (steps.mean[0].item(), steps.var[0].item()), (4, 4)), "", style="bold")
    table.add_row("this batch, n-1", "", number(unbiased, 4), "", style="bold")
    table.add_row("training", "", "", number(steps.y[0, 0].item()), style="bold")
    return table


def explain_pools(console: Console) -> None:
    """Show which elements share a mean under each norm."""
    samples, channels, positions = SMALL.shape
    heading(console, "3  Who shares a mean?")
    say(
        console,
        f"The other norms are the same line. Here are {samples} samples, {channels} channels, {positions} positions.",
        "Cells with the same letter and colour share one mean and one variance.",
    )
    for norm in SHOWN:
        pools = numbers.find_pools(norm)
        console.print()
        console.print(_title(pools))
        console.print(Columns([draw_cells(pools), _statistics(pools)], padding=(0, 4)))
    moved = [norm for norm in SHOWN if numbers.depends_on_others(norm)]
    kept = [norm for norm in SHOWN if norm not in moved]
    console.print()
    say(
        console,
        f"Replace sample 2, and sample 1's output changes under {join_words(moved)} norm.",
        f"Under {join_words(kept)} norm it stays the same, bit for bit.",
        "They need no running averages: training and evaluation are alike.",
        "",
        "Layer norm in a transformer: each position is a sample, its features are pooled.",
        f"Group norm with 1 group is layer norm here; with {channels} groups it is instance norm.",
        "RMS norm pools the same cells, but subtracts no mean: x / sqrt(mean(x^2) + eps).",
    )


def _title(pools: Pools) -> Text:
    """Return the norm's name and what it averages over."""
    title = Text(f"{pools.norm.capitalize()} norm", style="bold")
    rest = f": {SENTENCES[pools.norm]}. {pools.count} means of {pools.size} cells."
    return title.append(rest, style="not bold")


def draw_cells(pools: Pools, x: torch.Tensor = SMALL) -> Group:
    """Return the tensor as cells, samples side by side, each cell with its value and its pool's letter and colour."""
    samples, channels, positions = x.shape
    lines = [Text(" " * 10 + "   ".join(f"{f'sample {n + 1}':<{4 * positions}}" for n in range(samples)))]
    for channel in range(channels):
        line = Text(f"channel {channel + 1} ")
        for sample in range(samples):
            line.append("   " if sample else "")
            for position in range(positions):
                pool = int(pools.label[sample, channel, position])
                cell = f" {x[sample, channel, position]:.0f}{LETTERS[pool]} "
                line.append(cell, style=f"#000000 on {COLOURS[pool]}")
        lines.append(line)
    return Group(*lines)


def _statistics(pools: Pools) -> Group:
    """Return mean and variance of every pool, in two columns where there are more than four."""
    cells = []
    for pool, (mean, var) in enumerate(zip(pools.mean.tolist(), pools.var.tolist())):
        cell = Text(f" {LETTERS[pool]} ", style=f"#000000 on {COLOURS[pool]}")
        cells.append(cell.append(f" {mean:4.2f} {var:5.2f} ", style="default on default"))
    title = Text("    mean   var ")
    halves = [cells[:4], cells[4:]] if len(cells) > 4 else [cells]
    lines = [Text("  ").join([title] * len(halves))]
    lines += [Text("  ").join([half[row] for half in halves if row < len(half)]) for row in range(len(halves[0]))]
    return Group(*lines)
