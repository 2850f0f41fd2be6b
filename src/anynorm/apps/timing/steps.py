"""Time a training step of two models in turn, so that a noisy machine disturbs both alike."""

import dataclasses
import statistics
import time

import torch
from torch import nn

from anynorm.apps.timing.interleaved import FEWEST_VALUES, find_interval
from anynorm.doctor.call import Call, find_tensors
from anynorm.randomness import keep_randomness

FEWEST_PAIRS = FEWEST_VALUES
MOST_PAIRS = 2000


@dataclasses.dataclass(frozen=True)
class PairedTimings:
    """Seconds of forward and backward: before[i] and after[i] ran one right after the other, on so many threads."""

    before: list[float]
    after: list[float]
    threads: int = 1

    @property
    def ratios(self) -> list[float]:
        """Return before / after per pair, sorted; above 1 the second model is the faster one."""
        return sorted(first / second for first, second in zip(self.before, self.after))

    @property
    def ratio(self) -> float:
        """Return the median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def middle_half(self) -> tuple[float, float]:
        """Return the quartiles of the ratios: half of the pairs lie between."""
        first, _, third = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return first, third

    @property
    def is_noisy(self) -> bool:
        """Return whether other work on the machine disturbed the steps: the same step took very different times."""
        first, _, third = statistics.quantiles(self.before, n=4, method="inclusive")
        return third > 1.3 * first or self.middle_half[1] > 1.3 * self.middle_half[0]

    @property
    def interval(self) -> tuple[float, float]:
        """Return a 95 % interval of the median ratio."""
        return find_interval(self.ratios)


def time_steps(before: nn.Module, after: nn.Module, call: Call, seconds: float) -> PairedTimings:
    """Time forward and backward of both models in turn, for about this many seconds.

    The models take part in training mode and their running averages move: pass copies.
    """
    with keep_randomness():
        before.train()
        after.train()
        for model in (before, after, before, after):  # the first calls allocate memory and choose algorithms
            _time_step(model, call)
        first: list[float] = []
        second: list[float] = []
        start = time.perf_counter()
        while _goes_on(len(first), time.perf_counter() - start, seconds):
            # Who goes first alternates: the second of a pair finds warmer caches.
            if len(first) % 2:
                second.append(_time_step(after, call))
                first.append(_time_step(before, call))
            else:
                first.append(_time_step(before, call))
                second.append(_time_step(after, call))
    return PairedTimings(first, second, torch.get_num_threads())


def _goes_on(pairs: int, spent: float, seconds: float) -> bool:
    """Return whether to time another pair: up to the limit, up to three times that for the fewest, at least two."""
    if pairs < FEWEST_PAIRS:
        return pairs < 2 or spent < 3.0 * seconds
    return spent < seconds and pairs < MOST_PAIRS


def _time_step(model: nn.Module, call: Call) -> float:
    """Return the seconds of one forward and backward."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    take_step(model, call)
    return time.perf_counter() - start


def take_step(model: nn.Module, call: Call) -> None:
    """Run forward and backward; gradients are added to those that are there."""
    outputs = [t for t in find_tensors(call.of(model)) if t.requires_grad and t.is_floating_point()]
    if outputs:
        # Squares, not a sum: a plain sum behind a norm has a gradient of zero everywhere.
        torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
