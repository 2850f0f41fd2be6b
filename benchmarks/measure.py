"""The measurement: case by case, mode by mode, all peers and a copy in turn; then what runs in a process of its own."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor

import torch
from torch import Tensor

from anynorm.apps.timing.cases import MODES, Case, needs_grad
from anynorm.apps.timing.interleaved import InterleavedTimings, time_interleaved
from anynorm.doctor.call import in_one_line

from .peers import make_contest
from .results import TUNED, Row, make_rows

FOR_TUNED = 0.4  # of a case's seconds, for the two peers of the second process


def measure(
    cases: list[Case],
    peers: list[str],
    seconds: float,
    cache: int,
    complain: Callable[[str], None],
    *,
    process: Executor | None = None,
    sparing: bool = False,
) -> Iterator[list[Row]]:
    """The rows of each case, as they come.

    Args:
        seconds: for each case in each mode, over all peers; five rounds are made even if they take longer.
        cache: bytes of the last-level cache.
        complain: is told where peers do not compute the same, and of other failures; such a comparison has no rows.
        process: where anynorm and torch are timed once more; see `tuned`.
        sparing: whether to spend less on what compiles; see `spare`.
    """
    for case in cases:
        torch.compiler.reset()
        gc.collect()
        rows: list[Row] = []
        drawn = case.draw()
        for mode in MODES:
            try:
                chosen = spare(peers, case, mode) if sparing else peers
                rounds, kept = time_mode(case, chosen, mode, drawn, seconds)
                rows += make_rows(case, mode, rounds, kept, cache)
                if process is not None:
                    again = process.submit(time_tuned, case, mode, FOR_TUNED * seconds).result()
                    rows += make_rows(case, mode, again, {}, cache, suffix=TUNED)
            except BrokenExecutor as problem:
                complain(f"the second process ended: {in_one_line(problem)}; the rest is timed without it")
                process = None
            except Exception as problem:  # one case must not end a run of half an hour
                complain(f"{case.name} {case.layout} ({mode}) was not timed: {in_one_line(problem)}")
        yield rows


def spare(peers: list[str], case: Case, mode: str) -> list[str]:
    """Without torch.compile and JAX, but with a backward pass, where a goal is, and in float32 on the quick cases.

    Compiling takes them a second and more each time: for every case and mode two thirds of a whole run.
    """
    if needs_grad(mode) or (case.quick and case.dtype == torch.float32):
        return peers
    return [peer for peer in peers if peer != "jax" and not peer.endswith("compile")]


def time_mode(
    case: Case, peers: list[str], mode: str, drawn: tuple[Tensor, Tensor], seconds: float
) -> tuple[InterleavedTimings, dict[str, int]]:
    """The rounds of one case in one mode, and the bytes that peers keep for backward."""
    with warnings.catch_warnings(), torch.set_grad_enabled(needs_grad(mode)):
        warnings.simplefilter("ignore")  # torch.compile's advice on how to compile
        contest = make_contest(peers, case, mode, drawn)
        return time_interleaved(contest.calls, seconds, apart={"jax"}), contest.kept


def time_tuned(case: Case, mode: str, seconds: float) -> InterleavedTimings:
    """What the second process does."""
    return time_mode(case, ["anynorm", "torch"], mode, case.draw(), seconds)[0]
