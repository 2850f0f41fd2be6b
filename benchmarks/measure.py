"""The measurement: case by case, mode by mode, all peers and a copy in turn."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from anynorm.apps.timing.cases import MODES, Case, needs_grad
from anynorm.apps.timing.interleaved import time_interleaved

from .peers import Mismatch, make_contest
from .results import Row, make_rows


def measure(
    cases: list[Case], peers: list[str], seconds: float, cache: int, complain: Callable[[str], None]
) -> Iterator[list[Row]]:
    """The rows of each case, as they come.

    Args:
        seconds: for each case in each mode, over all peers; five rounds are made even if they take longer.
        cache: bytes of the last-level cache.
        complain: is told where peers do not compute the same; such a comparison has no rows.
    """
    for case in cases:
        torch.compiler.reset()
        gc.collect()
        rows: list[Row] = []
        drawn = case.draw()
        for mode in MODES:
            try:
                rows += measure_mode(case, peers, mode, drawn, seconds, cache)
            except Mismatch as problem:
                complain(f"{problem} ({mode}); not timed")
        yield rows


def measure_mode(
    case: Case, peers: list[str], mode: str, drawn: tuple[Tensor, Tensor], seconds: float, cache: int
) -> list[Row]:
    """The rows of one case in one mode."""
    with warnings.catch_warnings(), torch.set_grad_enabled(needs_grad(mode)):
        warnings.simplefilter("ignore")  # torch.compile's advice on how to compile
        contest = make_contest(peers, case, mode, drawn)
        rounds = time_interleaved(contest.calls, seconds, apart={"jax"})
    return make_rows(case, mode, rounds, contest.kept, cache)
