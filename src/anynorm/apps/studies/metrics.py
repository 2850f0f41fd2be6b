"""What a run is judged by: a score of outputs and targets, how it is named and printed, and what guessing reaches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A score as reports name and print it. All numbers here are as printed: shares in percent.

    Attributes:
        name: in sentences: accuracy.
        higher: whether higher is better.
        percent: whether it is a share, printed in percent, its differences in points.
        guessing: score on the test samples of the best answer that is always the same; None where it has none.
        margin: how far above guessing a score may come by chance, three standard errors.
        weight: the most that one sample can change the score, times the number of samples; 0 where that is not known.
    """

    name: str = "accuracy"
    higher: bool = True
    percent: bool = True
    guessing: float | None = 0.0
    margin: float = 0.0
    weight: float = 100.0

    @property
    def scale(self) -> float:
        """From a measured score to one that is printed."""
        return 100.0 if self.percent else 1.0

    @property
    def title(self) -> str:
        """Name with its unit, as over a table."""
        return f"{self.name}, %" if self.percent else f"{self.name} ({'higher' if self.higher else 'lower'} is better)"

    @property
    def negligible(self) -> float | None:
        """A difference that is no reason to prefer a norm; None where it is a share of the scores themselves."""
        return 1.0 if self.percent else None

    def gain(self, first: float, second: float) -> float:
        """How much better the first score is than the second."""
        return first - second if self.higher else second - first

    def resolution(self, samples: int) -> float:
        """What one sample can change: differences over seeds are no more certain."""
        return self.weight / max(samples, 1)

    def write(self, value: float) -> str:
        """A score as a number."""
        return f"{value:.1f}" if self.percent else f"{value:.4g}"

    def write_half(self, half: float, value: float) -> str:
        """Half of an interval, with as many decimals as the value that it belongs to."""
        return f"{half:.{len(self.write(value).partition('.')[2].partition('e')[0])}f}"

    def say(self, value: float) -> str:
        """A score with its unit."""
        return f"{self.write(value)} %" if self.percent else f"{self.name} {self.write(value)}"

    def write_gain(self, value: float) -> str:
        """A difference with its sign, a true minus; positive is better."""
        text = (f"{value:+.1f}" if self.percent else f"{value:+.3g}").replace("-", "−")
        return f"{0.0:.1f}" if text in ("+0.0", "−0.0") else text

    def say_gain(self, value: float) -> str:
        """A difference with its sign and unit."""
        return f"{self.write_gain(value)} points" if self.percent else self.write_gain(value)


def accuracy(outputs: Tensor, y: Tensor) -> float:
    """Share of right answers; NaN outputs answer nothing, so they are never right."""
    return float(((outputs.argmax(1) == y) & outputs.isfinite().all(1)).double().mean())


def explained(outputs: Tensor, y: Tensor) -> float:
    """R²: the share of the variance of the targets that outputs explain, mean over the values that vary.

    No less than -1 each, which is also what outputs that are not finite get: how much worse than the mean a network
    is would otherwise hide every other number.
    """
    outputs, y = outputs.double(), y.double()
    total = (y - y.mean(0)).square().sum(0)
    share = 1 - (outputs - y).square().sum(0) / total
    share = torch.nan_to_num(share, nan=-1.0).clamp(-1.0, 1.0)[total > 0]
    return float(share.mean())


def mean_auc(outputs: Tensor, y: Tensor) -> float:
    """Mean over labels of the area under the ROC curve: how often a sample that has the label is ranked before one
    that has not.

    Labels that all or none of the samples have are left out; outputs that are not finite get 0.
    """
    areas = []
    for scores, label in zip(outputs.double().unbind(1), y.unbind(1), strict=True):
        positive, negative = scores[label > 0.5], scores[label <= 0.5].sort().values
        if len(positive) and len(negative):
            below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
            finite = bool(scores.isfinite().all())
            areas.append(below.double().mean().item() / (2 * len(negative)) if finite else 0.0)
    return sum(areas) / len(areas) if areas else float("nan")
