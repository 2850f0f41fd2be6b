"""A whole model as built, the same once more, accelerated, and fused, timed in turn."""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import anynorm
from anynorm.apps.timing.disturbance import time_undisturbed
from anynorm.apps.timing.interleaved import FEWEST_VALUES, InterleavedTimings, TimedCall, time_interleaved
from anynorm.apps.timing.steps import take_step
from anynorm.doctor.call import Call
from anynorm.randomness import keep_randomness

BUILT, AGAIN, ACCELERATED, FUSED = "torch.nn", "torch.nn again", "accelerate", "accelerate, fuse=True"


@dataclasses.dataclass(frozen=True)
class Forms:
    """A model's forms by name, with the same parameters; the second is a copy of the first, to know the machine by.

    Attributes:
        models: by BUILT, AGAIN and ACCELERATED, and by FUSED where an activation could be fused.
        norms, fused: how many norms were changed, and how many of them fused with what follows.
    """

    models: dict[str, nn.Module]
    call: Call
    norms: int
    fused: int

    def time(self, names: Sequence[str], seconds: float, training: bool = True) -> InterleavedTimings:
        """Time forward and backward of these forms in turn, or forward in evaluation, in about `seconds`.

        Their running averages move in training.
        """
        run = self._step if training else self._evaluate
        for name in names:
            self.models[name].train(training)
        calls: dict[str, TimedCall] = {name: _bind(run, self.models[name]) for name in names}
        with keep_randomness():
            return time_interleaved(calls, 0.8 * seconds, fewest=FEWEST_VALUES, longest=seconds)

    def time_undisturbed(
        self, names: Sequence[str], seconds: float, training: bool = True, attempts: int = 2, longest: float = math.inf
    ) -> tuple[InterleavedTimings, str]:
        """Time these forms, BUILT and AGAIN among them; again, in half of `seconds`, where other work disturbed it.

        Also return what disturbed it, in words. `attempts` and `longest` as in `disturbance.time_undisturbed`.
        """

        def measure(attempt: int) -> InterleavedTimings:
            return self.time(names, seconds / (2 if attempt else 1), training)

        return time_undisturbed(measure, BUILT, AGAIN, attempts, longest)

    def _step(self, model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        take_step(model, self.call)

    def _evaluate(self, model: nn.Module) -> None:
        with torch.no_grad():
            self.call.of(model)


def _bind(run: Callable[[nn.Module], None], model: nn.Module) -> TimedCall:
    return lambda: run(model)


def make_forms(model: nn.Module, *inputs: Tensor) -> Forms:
    """Return the forms of a model of torch.nn's norms, and the call that they are timed with."""
    accelerated = copy.deepcopy(model)
    anynorm.accelerate(accelerated)
    report = anynorm.accelerate(copy.deepcopy(model), fuse=True)
    models = {BUILT: model, AGAIN: copy.deepcopy(model), ACCELERATED: accelerated}
    if report.fused:
        models[FUSED] = report.model
    return Forms(models, Call(inputs), len(report.changed), len(report.fused))
