"""Does padding matter on real recordings? JapaneseVowels with norms that count the padding and norms that do not.

270 utterances to train on and 370 to test, of 7 to 29 steps and 12 channels, by 9 speakers. A convolutional and a
recurrent network are trained with each norm from the same weights in the same order of the data; then the test
utterances are padded further, and what should not change is watched. `make vowels` runs it: two minutes on two cores.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from typing import Annotated

import torch
import typer

from anynorm.apps.studies.intervals import Interval, find_interval
from anynorm.apps.terminal import heading, open_console, plain_table, say
from anynorm.errors import UserError
from vowels_data import check_packages
from vowels_models import ARMS
from vowels_run import SIZES, Job, Outcome, run_job

RATES = (3e-3, 1e-2, 3e-2, 1e-1)  # of Adam; every arm chooses from the same, on utterances held out of training
RATE_SEEDS = (1001, 1002)  # not among the seeds that are reported
# Which pairs are judged: written before the first run.
PAIRS = (
    ("conv: batch, masked", "conv: batch, padding counted"),
    ("conv: layer", "conv: batch, masked"),
    ("gru: batch, sequence", "gru: batch, sequence, counted"),
    ("gru: batch, per step", "gru: batch, sequence"),
    ("gru: layer", "gru: batch, sequence"),
    ("gru: layer", "gru: no norm"),
)


ROUNDING = 1e-5  # of a logit; what is larger is no matter of rounding


@dataclass(frozen=True, eq=False)
class Result:
    """An arm with its rate and what each seed gave, in the order of the seeds."""

    arm: str
    rate: float
    outcomes: list[Outcome]

    @property
    def accuracy(self) -> Interval:
        """Mean test accuracy over the seeds, in percent."""
        interval = find_interval([outcome.accuracy for outcome in self.outcomes])
        assert interval is not None
        return interval

    def change(self, mode: str, size: int) -> float:
        """The largest change of a logit over utterances and seeds, padded to so many steps."""
        return max(outcome.changes[mode, size] for outcome in self.outcomes)

    @property
    def alone(self) -> float:
        """The largest change that the norms themselves made, given the same real inputs."""
        return max(outcome.alone for outcome in self.outcomes)


def run_study(seeds: int, rates: tuple[float, ...], epochs: int, workers: int, tested: int) -> list[Result]:
    """Choose every arm's rate, then train and measure every arm with every seed."""
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        chosen = dict.fromkeys(ARMS, rates[0])
        if len(rates) > 1:
            trials = [
                Job(arm, rate, seed, epochs, held_out=True) for arm in ARMS for rate in rates for seed in RATE_SEEDS
            ]
            losses = dict.fromkeys(product(ARMS, rates), 0.0)
            for job, outcome in zip(trials, pool.map(run_job, trials), strict=True):
                losses[job.arm, job.rate] += outcome.loss
            chosen = {arm: min(rates, key=lambda rate: losses[arm, rate]) for arm in ARMS}
        jobs = [Job(arm, chosen[arm], seed, epochs, tested) for arm in ARMS for seed in range(seeds)]
        outcomes = list(pool.map(run_job, jobs))
    return [Result(arm, chosen[arm], outcomes[i * seeds : (i + 1) * seeds]) for i, arm in enumerate(ARMS)]


def tell_change(change: float) -> str:
    """0 only where no bit differs."""
    return "0" if change == 0 else f"{change:.0e}" if change < 0.01 else f"{change:.2f}"


def tell_interval(interval: Interval) -> str:
    """The ends of an interval, where there are two seeds or more."""
    return "-" if interval.low is None else f"{interval.low:.1f} to {interval.high:.1f}"


def print_tables(results: list[Result]) -> None:
    """What each arm reaches, and what further padding does to it."""
    console = open_console()
    heading(console, "Test accuracy, %")
    table = plain_table("network and norm", "rate", "mean", "95 % t-interval")
    for result in results:
        accuracy = result.accuracy
        table.add_row(result.arm, f"{result.rate:g}", f"{accuracy.mean:.1f}", tell_interval(accuracy))
    console.print(table)
    heading(console, "Largest change of a logit when the same utterances are padded to more steps")
    titles = [f"{mode}\n{size}" for mode, size in product(("eval", "train"), SIZES)]
    table = plain_table("network and norm", *titles, "norm\nalone")
    for result in results:
        cells = [tell_change(result.change(mode, size)) for mode, size in product(("eval", "train"), SIZES)]
        table.add_row(result.arm, *cells, tell_change(result.alone))
    console.print(table)
    say(
        console,
        "eval: against no padding at all, in batches of one length.",
        "train: statistics of the batch; against the same batch padded to its longest.",
        "norm alone: its own output (the GRU's, which has it inside) at train 120, given the same real inputs.",
    )


def judge(first: Result, second: Result) -> str:
    """One pair, seed by seed, as a sentence that the numbers can turn either way."""
    pairs = zip(first.outcomes, second.outcomes, strict=True)
    gap = find_interval([a.accuracy - b.accuracy for a, b in pairs])
    assert gap is not None
    names = f"{first.arm} against {second.arm}"
    if gap.low is None:
        return f"{names}: {gap.mean:+.1f} points with one seed: not judged."
    seen = {"higher": "better", "lower": "worse"}.get(gap.verdict, "no difference seen")
    return f"{names}: {gap.mean:+.1f} points ({gap.low:+.1f} to {gap.high:+.1f}): {seen}."


def read_padding(results: list[Result]) -> list[str]:
    """Which arms padding reaches, and which it does not reach to the bit."""
    worst = {r: max(r.change(mode, size) for mode, size in product(("eval", "train"), SIZES)) for r in results}
    groups = (
        ("Further padding changes", [r for r in results if worst[r] > ROUNDING]),
        (
            "Only rounded differently, and not by the norm:",
            [r for r in results if 0 < worst[r] <= ROUNDING and not r.alone],
        ),
        ("Only rounded differently:", [r for r in results if 0 < worst[r] <= ROUNDING and r.alone]),
        ("Not a bit changes in", [r for r in results if worst[r] == 0]),
    )
    return [
        f"{words} {'; '.join(f'{r.arm} ({tell_change(worst[r])})' if worst[r] else r.arm for r in found)}."
        for words, found in groups
        if found
    ]


def print_reading(results: list[Result], seeds: int) -> None:
    """What the numbers say."""
    console = open_console()
    heading(console, f"Reading: differences over {seeds} paired seeds, 95 % t-interval each")
    named = {result.arm: result for result in results}
    say(console, *(judge(named[first], named[second]) for first, second in PAIRS), *read_padding(results))


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Trained networks per arm.")] = 8,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training utterances.")] = 25,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    quick: Annotated[bool, typer.Option(help="2 seeds, 1 epoch, one rate, 37 test utterances: does it run?")] = False,
) -> None:
    """Compare norms on JapaneseVowels with padding counted and masked."""
    if quick:
        seeds, epochs = 2, 1
    try:
        check_packages()
    except UserError as problem:
        typer.echo(problem, err=True)
        raise typer.Exit(1) from None
    results = run_study(seeds, RATES[:1] if quick else RATES, epochs, workers, 37 if quick else 370)
    print_tables(results)
    print_reading(results, seeds)


if __name__ == "__main__":
    typer.run(main)
