"""Where an adapted norm takes its statistics from: the test batch, and the running averages as a prior.

mean = N / (N + n) * running mean + n / (N + n) * batch mean          N: samples that the averages count for
var  = N / (N + n) * running var  + n / (N + n) * batch var           n: samples in the batch
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ...engine import paths
from ...errors import UserError
from ...family import FAMILY
from ...functional.ghost import GHOST
from ...padding.masks import find_mask
from ...padding.ragged import is_ragged, open_rows
from ...sources import BATCH, Given, Override, Source
from ...statistics import Moments, find_wide_dtype

if TYPE_CHECKING:
    from .judge import Judge


@dataclass(frozen=True)
class Seen:
    """What a norm is called with.

    Attributes:
        x: (N, C, *), of a ragged input its rows.
        mask: as the engine takes it, or None.
        samples: in which anything counts.
        moments: of each channel, flat, float64 where the device has it.
    """

    x: Tensor
    mask: Tensor | None
    samples: int
    moments: Moments

    def find_mean_error(self) -> Tensor:
        """(C,), the squared standard error of the mean.

        It goes by how far the samples' means are apart: the positions of one sample resemble each other, and are worth
        less than as many samples.
        """
        assert self.moments.mean is not None
        counts, means = find_sample_means(self.x, self.mask)
        share, real = counts / counts.sum(), int((counts > 0).sum())
        if real == 1:  # Nothing tells how far another sample would be.
            return self.moments.var
        return (share.square() * (means - self.moments.mean).square()).sum(0) * (real / (real - 1))


def look_at(x: Any, mask: Any, lengths: Any) -> Seen | None:
    """None where nothing counts, or where the norm will refuse the input."""
    samples = None
    if is_ragged(x):
        samples = int(x.batch_sizes[0]) if isinstance(x, PackedSequence) else x.size(0)
        x = open_rows("batch_norm", x)
    if not isinstance(x, Tensor) or x.dim() < 2 or not x.numel() or not x.is_floating_point():
        return None
    x, opened = x.detach(), find_mask("batch_norm", x, (1,), mask, lengths)
    found = paths.find_moments(x, FAMILY["batch"].pool(x), opened)
    if not found.count:
        return None
    assert found.mean is not None
    if samples is None:
        samples = len(x) if opened is None else int(opened.flatten(1).any(1).sum())
    return Seen(x, opened, samples, Moments(int(found.count), found.mean.flatten(), found.m2.flatten()))


def find_sample_means(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """How many positions of each sample count, (N, 1), and its means, (N, C)."""
    wide = find_wide_dtype(x)
    counts = x.new_ones(len(x), 1, dtype=wide) if mask is None else mask.flatten(1).sum(1, keepdim=True).to(wide)
    if x.dim() == 2:
        return counts, x.to(wide)
    found = paths.find_moments(x, FAMILY["instance"].pool(x), mask)
    assert found.mean is not None
    return counts, found.mean.reshape(x.shape[:2])


class AdaptedStatistics(Override):
    """Gives the batch norms of a model the statistics of their input, blended with their running averages.

    Args:
        names: the norms, and what they are called in messages.
        prior: N above. With 0 gradient flows through the statistics of the batch; with more they are constants.
        judge: is told what the batches say of the norms.
    """

    in_evaluation = True
    names: dict[Any, str]
    prior: float
    judge: Judge

    def __init__(self, names: dict[Any, str], prior: float, judge: Judge) -> None:
        self.names, self.prior, self.judge = names, prior, judge
        self.smallest: dict[Any, int] = {}  # batch that the judge was told of

    def find_source(self, layer: Any, input: Any, mask: Any, lengths: Any) -> Source | None:
        """One call; a norm that the model does not hold is left alone."""
        if layer not in self.names:
            return None
        by_batch = not self.prior and layer.front is not GHOST
        if by_batch and mask is None and lengths is None and type(input) is Tensor:
            if len(input) >= self.smallest.get(layer, inf):
                return BATCH
        seen = look_at(input, mask, lengths)
        running = Given(layer.running_mean, layer.running_var)
        if seen is None or seen.moments.m2.shape != running.mean.shape:
            return running
        if seen.moments.count == 1:
            raise UserError(
                f"adapt: {self.names[layer]} ({type(layer).__name__}) must get more than 1 value per channel, or every "
                "output is beta; got 1; use a larger batch, or leave the context for a single sample"
            )
        weight = self.prior / (self.prior + seen.samples)
        if seen.samples < self.smallest.get(layer, inf):
            self.smallest[layer] = seen.samples
            self.judge.see_norm(layer, seen, weight)
        if by_batch:
            return BATCH
        assert seen.moments.mean is not None
        mean = weight * running.mean + (1 - weight) * seen.moments.mean
        var = weight * running.var + (1 - weight) * seen.moments.var
        return Given(mean.to(running.mean), var.to(running.var))
