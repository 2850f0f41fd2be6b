"""How long and with which random numbers: rounds of hypothesis, each with a seed of its own, until the time is over.

FUZZ_SEED and the number of a round fix what is drawn. `make test` runs FUZZ_ROUNDS rounds of a fixed seed, fewer where
that takes more than FUZZ_SECONDS, so it tries the same on every machine, or less; `make fuzz` goes on until the time is
over.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from time import monotonic
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.strategies import SearchStrategy

from fuzz.script import write_script

SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS = float(os.environ.get("FUZZ_SECONDS", "4"))
ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "3"))  # 0: until the time is over
EXAMPLES = 25  # of a round
STEPS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,  # a seed alone says what is tried
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)


def add_note(error: Exception, note: str) -> None:
    """What the report of an error shows below it; before Python 3.11 it is printed."""
    getattr(error, "add_note", print)(note)


def drive(check: Callable[[Any], None], cases: SearchStrategy[Any], least: int = 0) -> None:
    """check(case) for case after case; what fails is made as simple as can be and shown as a script.

    Args:
        least: without a number of rounds, so many cases at least, however long they take.
    """

    def run(case: Any) -> None:
        try:
            check(case)
        except Exception as error:
            add_note(error, f"\n{'-' * 20} a script of it\n\n{write_script(check, case)}")
            raise

    end = monotonic() + SECONDS
    for turn in count() if ROUNDS == 0 else range(ROUNDS):
        if turn and monotonic() > end and (ROUNDS or turn * EXAMPLES >= least):
            return
        try:
            hypothesis.seed(f"{SEED} {turn}")(STEPS(hypothesis.given(cases)(run)))()
        except Exception as error:
            add_note(error, f"found by FUZZ_SEED={SEED} in round {turn}")
            raise
