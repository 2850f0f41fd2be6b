"""What do few images for each set of statistics cost? Errors on MNIST against the size, for five ways to normalize.

SGD takes 32 images a step, always. Batch norm's statistics are over 32, 16, 8, 4 or 2 of them, as on GPUs with that
many images each. A fully connected and a convolutional network are trained with each norm from the same weights in
the same order of the data. `make batchsize` runs it and writes the table and the picture of docs/small-batch.md.
"""

from __future__ import annotations

import json
import platform
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer

from anynorm.apps.studies.intervals import Interval, find_interval
from anynorm.apps.terminal import heading, open_console, plain_table, say
from anynorm.errors import UserError
from batch_size_run import BATCH, NETWORKS, Job, Outcome, load, run_job

SIZES = (32, 16, 8, 4, 2)
RATES = (0.003, 0.01, 0.03)  # of SGD; every arm and size chooses from the same, by validation loss
RATE_SEED = 1001  # not among the seeds that are reported
# What is trained, and at which sizes: group and layer norm do not depend on them.
TRAINED = {"ghost": SIZES, "renorm": SIZES, "group": (BATCH,), "layer": (BATCH,)}
LINES = {
    "batch, running averages": "ghost",
    "batch, recalibrated": "ghost",
    "batch renormalization": "renorm",
    "group": "group",
    "layer": "layer",
}
ROOT = Path(__file__).parents[1]
PAGE, PICTURE, NUMBERS = ROOT / "docs/small-batch.md", ROOT / "docs/small-batch.svg", ROOT / "examples/batch_size.json"
MARKS = "<!-- batchsize -->\n", "<!-- /batchsize -->"


@dataclass(frozen=True)
class Cell:
    """A trained arm at a size, with its rate and what each seed gave, in the order of the seeds."""

    network: str
    arm: str
    size: int
    rate: float
    outcomes: tuple[Outcome, ...]


Results = dict[tuple[str, str, int], Cell]


def run_study(seeds: int, rates: tuple[float, ...], epochs: int, workers: int) -> Results:
    """Choose every cell's rate, then train and measure every cell with every seed."""
    cells = [(network, arm, size) for network in NETWORKS for arm, sizes in TRAINED.items() for size in sizes]
    cells.sort(key=lambda cell: cell[2])  # The longest first, so that no worker waits for another at the end.
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        trials = [Job(*cell, rate, RATE_SEED, epochs, held_out=True) for cell, rate in product(cells, rates)]
        found = iter(list(pool.map(run_job, trials)) if len(rates) > 1 else ())
        losses = {cell: {rate: next(found).loss if len(rates) > 1 else 0.0 for rate in rates} for cell in cells}
        # A loss that is not a number loses.
        chosen = {
            cell: min(rates, key=lambda r: (losses[cell][r] != losses[cell][r], losses[cell][r])) for cell in cells
        }
        outcomes = list(pool.map(run_job, [Job(*c, chosen[c], seed, epochs) for c in cells for seed in range(seeds)]))
    parts = (tuple(outcomes[i * seeds : (i + 1) * seeds]) for i in range(len(cells)))
    return {cell: Cell(*cell, chosen[cell], part) for cell, part in zip(cells, parts, strict=True)}


def find_errors(results: Results, network: str, line: str, size: int) -> list[float]:
    """Test errors in percent, in the order of the seeds."""
    arm = LINES[line]
    cell = results[network, arm, size if size in TRAINED[arm] else BATCH]
    if line == "batch, recalibrated":
        return [outcome.recalibrated for outcome in cell.outcomes if outcome.recalibrated is not None]
    return [outcome.error for outcome in cell.outcomes]


def find_interval_of(values: list[float]) -> Interval:
    interval = find_interval(values)
    assert interval is not None
    return interval


def write_table(results: Results) -> str:
    """Errors as a table in Markdown."""
    rows = [f"| network and norm | {' | '.join(map(str, SIZES))} |", "|---" * (len(SIZES) + 1) + "|"]
    for network, line in product(NETWORKS, LINES):
        cells = [tell(find_interval_of(find_errors(results, network, line, size))) for size in SIZES]
        rows.append(f"| {network}: {line} | {' | '.join(cells)} |")
    return "\n".join(rows)


def tell(interval: Interval) -> str:
    """Mean and half of the 95 % interval."""
    half = "" if interval.high is None else f"±{interval.high - interval.mean:.1f}"
    return f"{interval.mean:.1f}{half}"


def judge(results: Results) -> list[str]:
    """What size 2 costs each norm against 32, and each norm against group norm at 2, seed by seed."""
    sentences = []
    for network, line in product(NETWORKS, LINES):
        few, many, group = (find_errors(results, network, *p) for p in ((line, 2), (line, BATCH), ("group", 2)))
        gaps = [find_interval_of([a - b for a, b in zip(few, other, strict=True)]) for other in (many, group)]
        words = [
            f"{gap.mean:+.1f}" + ("" if gap.low is None else f" ({gap.low:+.1f} to {gap.high:+.1f}), {gap.verdict}")
            for gap in gaps
        ]
        own = "does not depend on the size" if LINES[line] in ("group", "layer") else f"2 against 32: {words[0]}"
        sentences.append(f"{network}: {line}: {own}" + (";" if line != "group" else "."))
        if line != "group":
            sentences[-1] += f" at 2 against group norm: {words[1]}."
    return sentences


def write_numbers(results: Results, seeds: int, epochs: int, workers: int) -> None:
    """Everything that was measured, as JSON."""
    record = {
        "versions": {name: version(name) for name in ("anynorm", "torch", "numpy")}
        | {"python": platform.python_version()},
        "machine": f"{platform.system()} {platform.machine()}",
        "workers": workers,
        "threads_per_worker": 1,
        "seeds": list(range(seeds)),
        "rate_seed": RATE_SEED,
        "rates": RATES,
        "epochs": epochs,
        "cells": [asdict(cell) for cell in results.values()],
    }
    NUMBERS.write_text(json.dumps(record, indent=1) + "\n")


def write_page(results: Results) -> None:
    """The table and the sentences between the page's marks, and the picture."""
    from batch_size_plot import draw

    text = PAGE.read_text()
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    rates = ", ".join(f"{c.network} {c.arm} {c.size}: {c.rate:g}" for c in results.values())
    lines = "\n".join(f"- {sentence}" for sentence in judge(results))
    PAGE.write_text(f"{before}{MARKS[0]}{write_table(results)}\n\n{lines}\n\nRates: {rates}.\n{MARKS[1]}{after}")
    curves = {
        network: {line: [find_interval_of(find_errors(results, network, line, s)) for s in SIZES] for line in LINES}
        for network in NETWORKS
    }
    PICTURE.write_text(draw(curves, SIZES))


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Trained networks per arm and size.")] = 5,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 6,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    quick: Annotated[bool, typer.Option(help="2 seeds, 1 epoch, one rate: does it run?")] = False,
    write: Annotated[bool, typer.Option(help="Write the numbers, the table and the picture of the page.")] = False,
) -> None:
    """Compare norms on MNIST with statistics over fewer and fewer images."""
    if quick:
        seeds, epochs = 2, 1
    try:
        load()
    except UserError as problem:
        typer.echo(str(problem).replace("compare --data", "batch_size"), err=True)
        raise typer.Exit(1) from None
    results = run_study(seeds, RATES[:1] if quick else RATES, epochs, workers)
    console = open_console()
    heading(console, f"Test error, % (mean±half of the 95 % t-interval, {seeds} seeds)")
    table = plain_table("network and norm", *map(str, SIZES))
    for row in write_table(results).splitlines()[2:]:
        table.add_row(*row.strip("| ").split(" | "))
    console.print(table)
    heading(console, "Reading: paired differences in points of error, 95 % t-interval")
    say(console, *judge(results))
    if write:
        write_numbers(results, seeds, epochs, workers)
        write_page(results)


if __name__ == "__main__":
    typer.run(main)
