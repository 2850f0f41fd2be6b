"""What guessing reaches on the test samples of a task, and how far from it chance may lead."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from anynorm.errors import UserError

from .data import Data
from .metrics import Metric
from .task import DEFAULTS, Task, split_direction

STANDARD_ERRORS = 3.0  # above guessing, before a network has learned something
DRAWS = 100
PULLS = (1.0, 0.3, 0.1)


def find_metric(task: Task) -> Metric:
    """The metric of a task with what guessing reaches on its test samples, and how far from it chance may lead."""
    y = task.data.test_y
    if task.metric:
        return find_own_metric(task)
    metric = DEFAULTS[task.data.kind][2]
    if task.data.kind == "classes":
        share = float(np.bincount(y).max()) / len(y)
        return replace(metric, guessing=100 * share, margin=300 * (share * (1 - share) / len(y)) ** 0.5)
    if task.data.kind == "labels":
        check_labels(task.data)
        ones = y.sum(0)
        both = ones * (len(y) - ones)
        errors = ((len(y) + 1) / (12 * both[both > 0])) ** 0.5
        return replace(metric, margin=100 * STANDARD_ERRORS * float(errors.mean()), weight=100 / y.shape[1])
    # Outputs unrelated to n targets reach s² - 2 s z / sqrt(n) below 0, z a standard normal: at best (3 / sqrt(n))².
    return replace(metric, margin=100 * STANDARD_ERRORS**2 / len(y))


def check_labels(data: Data) -> None:
    """Raise where no label can be judged, because all samples of a part have it or none has."""
    for name, y in (("validation", data.validation_y), ("test", data.test_y)):
        if not np.any((y.sum(0) > 0) & (y.sum(0) < len(y))):
            raise UserError(
                f"compare --data: no label of {data.name!r} both holds and fails among its {len(y):,} {name} samples; "
                f"give more samples."
            )


def find_own_metric(task: Task) -> Metric:
    """The user's metric, with what guessing reaches as it is found by trying.

    Guessing is the answer that is always the same and suits the training targets. Its margin is the larger of two:
    three standard errors of that answer's score, bootstrapped; and the best that three standard errors give outputs
    that have nothing to do with the targets, which are the targets themselves, shuffled, and drawn towards the guess.
    """
    spec, higher = split_direction(task.metric)
    metric = Metric(spec.rpartition(":")[2], higher, percent=False, guessing=None, weight=0.0)
    y, generator = torch.from_numpy(task.data.test_y), np.random.default_rng(0)
    constant, informed = find_constant(task.data).expand(len(y), -1), find_outputs(task.data, y)
    drawn = [torch.from_numpy(generator.integers(len(y), size=len(y))) for _ in range(DRAWS)]
    shuffled = [torch.from_numpy(generator.permutation(len(y))) for _ in range(DRAWS)]
    same = find_score(task, constant, y)
    errors = [find_spread([find_score(task, constant, y[draw]) for draw in drawn])[1]]
    chances = [
        find_spread([find_score(task, torch.lerp(constant, informed[draw], pull), y) for draw in shuffled])
        for pull in PULLS
    ]
    # Some metrics, such as a correlation, have no value for outputs that are all the same.
    guessing = same if np.isfinite(same) else chances[0][0]
    errors += [chances[0][1]]
    if not (np.isfinite(guessing) and np.isfinite(errors).any()):
        return metric
    best = [metric.gain(mean, guessing) + STANDARD_ERRORS * error for mean, error in chances]
    margin = float(np.nanmax([STANDARD_ERRORS * errors[0], *best, 0.0]))
    guessing = 0.0 if abs(guessing) < 1e-4 * margin else guessing
    return replace(metric, guessing=guessing, margin=margin, weight=float(np.nanmax(errors)) * len(y) ** 0.5)


def find_score(task: Task, outputs: Tensor, y: Tensor) -> float:
    """A score, or NaN where the user's metric has none for such outputs."""
    try:
        return task.score_function(outputs, y)
    except UserError:
        raise
    except Exception:
        return float("nan")


def find_spread(scores: list[float]) -> tuple[float, float]:
    """Mean and standard deviation, NaN where any score is."""
    return float(np.mean(scores)), float(np.std(scores))


def find_constant(data: Data) -> Tensor:
    """The output (1, outputs) that suits all training samples at once."""
    if data.kind == "classes":
        shares = np.bincount(data.train_y, minlength=data.classes) / len(data.train_y)
        return torch.from_numpy(shares).log()[None].float()
    mean = torch.from_numpy(data.train_y).mean(0, keepdim=True)
    return mean.logit() if data.kind == "labels" else mean


def find_outputs(data: Data, y: Tensor) -> Tensor:
    """Outputs that answer targets rightly."""
    if data.kind == "values":
        return y
    sure = 4.0  # a logit
    right = functional.one_hot(y, data.classes).float() if data.kind == "classes" else y
    return sure * (2 * right - 1)
