"""Made-up rows of the benchmark, whose verdicts are known."""

from __future__ import annotations

import dataclasses

from anynorm.apps.timing.forms import ACCELERATED
from benchmarks import verdicts
from benchmarks.results import Row
from benchmarks.steps import ModelRow


def make_row(ratio: float = 1.0, peer: str = "torch", **changes) -> Row:
    """A row in which everything but the ratio is plausible."""
    row = Row(
        *("ResNet-50", "batch", "8x4x2x2", "contiguous", "float32", "forward+backward", peer),
        *(5, 10.0, 9.0, 12.0, ratio, ratio, ratio, 2.0, 640, 4.0, 0.4, 128, False),
    )
    return dataclasses.replace(row, **changes)


def find_verdict(rows: list[Row], start: str) -> verdicts.Verdict:
    return next(verdict for verdict in verdicts.judge(rows, []) if verdict.goal.startswith(start))


def make_model_row(ratio: float, form: str = ACCELERATED, **changes) -> ModelRow:
    """A step of a model with two norms, whose parts are 2, 3 and 5 us; its interval reaches 0.02 to each side."""
    times = (100.0 / ratio, 90.0, 110.0, ratio, ratio - 0.02, ratio + 0.02)
    row = ModelRow("net", "2x3", "step", form, 2, 0, 9, *times, "", 8.0, 2.0, 3.0, 5.0)
    return dataclasses.replace(row, **changes)
