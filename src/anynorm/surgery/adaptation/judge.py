"""Does it help to adapt? What can be seen without labels of a batch that is too small, or of one class.

    noise = (n / (N + n))^2 * e^2 / v                 e: standard error of the batch's mean, v: running variance + eps
    gain = (1 - (N / (N + n))^2) * (d^2 - e^2) / v    d: batch mean - running mean

are what the blend adds to the squared error of a norm's mean, and what it takes away, each as a mean over channels and
norms. Limits are where accuracy was seen to fall: on MNIST images a network of 3 x 100 lost 6 points by noise of 0.064
(batches of 16) and 2 by 0.032; on batches of one class it lost 78, and predicted that class 9 times of 10 before.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from ...randomness import keep_randomness
from ...sources import OVERRIDE

if TYPE_CHECKING:
    from .statistics import Seen

MOST_NOISE = 0.05
MOST_OF_ONE_CLASS = 0.9
LEAST_SAMPLES = 8  # fewer are of one class by chance
DEPTH = 8  # frames from the warning to the call of the model, where torch calls its hooks


class Judge:
    """Looks at the batches of one adaptation, and warns once of either fault.

    Attributes:
        batches: calls of the model so far.
    """

    def __init__(self) -> None:
        self.norms: dict[Any, tuple[float, float, int]] = {}
        self.said: set[str] = set()
        self.batches: int = 0

    def see_norm(self, layer: Any, seen: Seen, weight: float) -> None:
        """Note what a batch says of a norm; `weight` is that of the running averages."""
        if "noise" in self.said:
            return
        error, var = seen.find_mean_error(), layer.running_var + layer.eps
        noise = float(((1 - weight) ** 2 * error / var).mean())
        gain = float(((1 - weight**2) * ((seen.moments.mean - layer.running_mean).square() - error) / var).mean())
        self.norms[layer] = noise, gain, seen.samples

    def see_call(self, model: nn.Module, args: Any, named: Any, output: Any) -> None:
        """Judge a batch when the model has returned."""
        self.batches += 1
        if self.norms:
            self.judge_noise()
        logits = find_logits(output)
        if logits is None or logits.dim() != 2 or len(logits) < LEAST_SAMPLES or "class" in self.said:
            return
        self.judge_classes(logits, "with")
        # Adapted statistics hide that a batch is of one class: the predictions without them show it. They cost another
        # forward, which is why few batches are looked at.
        if self.batches & (self.batches - 1) == 0 and not any(module.training for module in model.modules()):
            with torch.no_grad(), keep_randomness():
                token = OVERRIDE.set(None)
                try:
                    plain = find_logits(model(*args, **named))
                finally:
                    OVERRIDE.reset(token)
            if plain is not None:
                self.judge_classes(plain, "without")

    def judge_noise(self) -> None:
        """Warn where the batch's statistics are rather noise than news."""
        noise, gain, _ = (sum(values) / len(self.norms) for values in zip(*self.norms.values(), strict=True))
        samples = min(samples for _, _, samples in self.norms.values())
        self.norms.clear()
        if noise > max(gain, MOST_NOISE):
            self.warn(
                "noise",
                f"adapt: a batch of {samples} says too little: its means are off by {noise**0.5:.2f} std (standard "
                f"error, over all norms), and the shift that they mend is {max(gain, 0) ** 0.5:.2f} std; use larger "
                "batches, or a prior such as prior=16",
            )

    def judge_classes(self, logits: Tensor, how: str) -> None:
        """Warn where nearly all of a batch is predicted to be of one class."""
        if not logits.isfinite().all():  # argmax would say nothing
            return
        counts = logits.detach().argmax(1).bincount()
        share = float(counts.max()) / len(logits)
        if logits.shape[1] > 1 and share >= MOST_OF_ONE_CLASS and "class" not in self.said:
            self.warn(
                "class",
                f"adapt: a batch should hold all classes, since what its samples have in common is taken away; {how} "
                f"adaptation class {int(counts.argmax())} is predicted for {share:.0%} of {len(logits)} samples; "
                "shuffle the data, or collect larger batches; no fault where the training data are as uneven",
            )

    def warn(self, fault: str, message: str) -> None:
        """Say it once."""
        self.said.add(fault)
        warnings.warn(message, stacklevel=DEPTH)


def find_logits(output: Any) -> Tensor | None:
    """The outputs of a classifier, (N, classes, ...): the tensor itself, or what is called logits."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    is_usable = isinstance(output, Tensor) and output.dim() > 1 and output.is_floating_point() and output.numel() > 0
    return output if is_usable else None
