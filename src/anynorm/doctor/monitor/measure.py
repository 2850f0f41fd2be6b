"""What one call of a norm is, measured: the moments of its input by channel, and how noisy they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...engine import paths
from ...family import FAMILY
from ...modules.norm import Norm
from ...padding.context import may_be_masked
from ...padding.masks import find_mask
from ...padding.ragged import is_ragged, open_rows
from ...sources import OVERRIDE
from ...statistics import Moments
from ...surgery.recalibration.norms import find_input, find_signature
from ...surgery.report import describe
from .norms import count_parts, find_gamma, keeps_averages, list_nonfinite
from .record import NAN, Record

HARDLY_VARIES = 0.01  # of eps: such a variance is a hundredth of what it is added to
ROUNDING = 1e-12  # of the squared mean: a variance below it may be rounding alone
NEAR_ZERO = 0.01  # a gamma


@dataclass
class Evidence:
    """What the alarms need of a batch norm beside its record, by channel.

    Attributes:
        gap: batch mean less running mean, in standard deviations of the batch.
        spread: logarithm of batch std over running std.
        error: standard error of the mean, in standard deviations.
    """

    gap: Tensor
    spread: Tensor
    error: Tensor


class Tally:
    """What reached one norm in one step, all its calls together.

    Attributes:
        averages: running mean and variance before this step moved them; None where there are none.
        moments: (C,) of a batch norm's input, float64 on the CPU; of other norms' input one number.
        error2: squared standard error of the mean of each call, added up.
    """

    averages: tuple[Tensor, Tensor] | None

    def __init__(self, norm: Any) -> None:
        self.norm = norm
        self.calls = 0
        self.moments: Moments | None = None
        self.error2: Tensor | None = None
        self.is_finite: bool = True
        self.counter: int = read_counter(norm)
        known = keeps_averages(norm)
        self.averages = (widen(norm.running_mean), widen(norm.running_var)) if known else None

    def add(self, args: Any, kwargs: Any) -> None:
        """One call."""
        self.calls += 1
        found = self.measure(args, kwargs)
        if found is None:
            return
        moments, error2 = found
        assert moments.mean is not None
        if not bool(moments.mean.isfinite().all() and moments.m2.isfinite().all()):
            self.is_finite = False
            return
        self.moments = moments if self.moments is None else self.moments.merge(moments)
        if error2 is not None:
            self.error2 = error2 if self.error2 is None else self.error2 + error2

    def measure(self, args: Any, kwargs: Any) -> tuple[Moments, Tensor | None] | None:
        if self.averages is not None:
            x, mask = find_input(self.norm, args, kwargs)
            found = find_channel_moments(len(self.averages[0]), x, mask)
            if found is None:
                return None
            moments, error2 = found
            if OVERRIDE.get() is not None:  # it normalizes by more than this call, as in `anynorm.accumulate`
                return moments, None
            return moments, error2 * count_parts(self.norm, x.shape[0] if isinstance(x, Tensor) else 1)
        return find_whole_moments(self.norm, args, kwargs)

    def finish(self, step: int, layer: str) -> tuple[Record, Evidence | None]:
        """The record, without a gradient, and what the alarms need."""
        record = Record(step, layer, describe(type(self.norm)), self.calls)
        for name in ([] if self.is_finite else ["input"]) + list(list_nonfinite(self.norm)):
            record.note("nonfinite", name)
        write_gamma(record, *find_gamma(self.norm))
        if not self.calls:
            self.moments = self.recover()
        if self.moments is None or self.moments.mean is None:
            return record, None
        count = float(self.moments.count)
        mean, var = self.moments.mean, self.moments.m2 / max(count, 1.0)
        record.mean = float(mean.mean())
        record.std = float((var.mean() + mean.var(correction=0)).sqrt())
        if self.averages is None:
            return record, None
        return record, self.compare(record, mean, var)

    def has_moved(self) -> bool:
        """Whether its averages have counted a batch since."""
        return read_counter(self.norm) > self.counter

    def recover(self) -> Moments | None:
        """Moments of the batch of a call that no hook saw, from how the running averages moved; None where unknown.

        running = (1 - momentum) * before + momentum * batch
        """
        norm = self.norm
        if self.averages is None or not norm.momentum or read_counter(norm) != self.counter + 1:
            return None
        now = norm.running_mean, norm.running_var
        if any(t.dtype not in (torch.float32, torch.float64) for t in now):
            return None
        mean, var = (old + (widen(new) - old) / norm.momentum for old, new in zip(self.averages, now, strict=True))
        if not bool(mean.isfinite().all() and var.isfinite().all()):
            return None
        return Moments(1, mean, var.clamp(min=0))

    def compare(self, record: Record, mean: Tensor, var: Tensor) -> Evidence | None:
        """Batch against running statistics, over the channels that vary."""
        assert self.averages is not None
        eps = float(self.norm.eps)
        varies = var > torch.clamp(ROUNDING * mean.square(), min=HARDLY_VARIES * eps)
        record.constant = int((~varies).sum())
        if not bool(varies.any()):
            return None
        std = (var + eps).sqrt()
        running_mean, running_var = self.averages
        gap = (mean - running_mean) / std
        ratio = (var + eps) / (running_var + eps)
        error = torch.full_like(std, NAN) if self.error2 is None else (self.error2 / self.calls).sqrt() / std
        record.noise = float(error[varies].square().mean().sqrt())
        if not (gap.isfinite().all() and (ratio > 0).all() and ratio.isfinite().all()):
            return None
        size = torch.where(varies, gap.abs(), 0)
        record.gap, record.gap_worst = float(size[varies].median()), float(size.max())
        record.channel = int(size.argmax())
        record.ratio = float(ratio[varies].median())
        return Evidence(gap.where(varies, 0), ratio.log().where(varies, 0) / 2, error.where(varies, 0))


def read_counter(norm: Any) -> int:
    """How many batches its averages have seen; 0 where it does not count."""
    counter = getattr(norm, "num_batches_tracked", None)
    return 0 if counter is None else int(counter)


def widen(t: Tensor) -> Tensor:
    """A copy in float64 on the CPU."""
    return t.detach().to("cpu", torch.float64, copy=True)


def find_channel_moments(channels: int, x: Any, mask: Tensor | None) -> tuple[Moments, Tensor] | None:
    """Moments (C,) in float64 on the CPU, and the squared standard error of their mean; None where nothing counts.

    One pass takes the moments of each sample. Merged they are those of the batch, and how they differ says how far
    the mean of another batch would lie: values of one sample are alike, so their number alone would say too little.

        error^2 = N / (N - 1) * sum_n (count_n / count)^2 (mean_n - mean)^2
    """
    if is_ragged(x):
        x = open_rows("batch_norm", x)
    if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[1] != channels or not x.is_floating_point() or not x.numel():
        return None
    if x.dim() == 2 or len(x) == 1:  # a sample is one value, or there is one sample
        found = paths.find_moments(x, FAMILY["batch"].pool(x), mask)
        assert found.mean is not None
        mean, m2 = (t.flatten().cpu().double() for t in (found.mean, found.m2))
        count = float(found.count)
        return (Moments(int(count), mean, m2), m2 / count / max(count - 1, 1.0)) if count else None
    found = paths.find_moments(x, FAMILY["instance"].pool(x), mask)
    assert found.mean is not None
    means, m2s = (t.reshape(len(x), -1).cpu().double() for t in (found.mean, found.m2))
    counts = torch.as_tensor(found.count, dtype=torch.float64, device="cpu")
    counts = counts.reshape(-1, 1).expand(len(x), 1) if counts.numel() in (1, len(x)) else counts.reshape(len(x), -1)
    return merge_samples(counts, means, m2s)


def merge_samples(counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[Moments, Tensor] | None:
    """The batch, of the moments of its samples (N, C); counts (N, 1) or (N, C)."""
    total = counts.sum(0)
    if not bool(total.max()):
        return None
    weights = counts / total
    mean = (weights * means).sum(0)
    apart = (means - mean).square()
    m2 = (m2s + counts * apart).sum(0)
    number = int((counts.amax(1) > 0).sum())
    moments = Moments(int(total.max()), mean, m2)
    if number < 2:
        return moments, m2 / total / (total - 1).clamp(min=1)
    return moments, (weights.square() * apart).sum(0) * (number / (number - 1))


def find_whole_moments(norm: Any, args: Any, kwargs: Any) -> tuple[Moments, None] | None:
    """One mean and m2 of everything that reached a norm without running averages, padding left out."""
    given = find_signature(norm.__class__).bind(norm, *args, **kwargs).arguments
    x = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
    if x is None or not x.is_floating_point() or x.is_nested or not x.numel():
        return None
    x = x.detach()
    if isinstance(norm, Norm):
        mask, lengths = given.get("mask"), given.get("lengths")
        if mask is None and lengths is None and may_be_masked():
            mask = norm.find_mask(x)
        found = find_mask("monitor", x, norm.find_channel_axes(x), mask, lengths)
        if found is not None:
            x = x[(found > 0).expand_as(x)]
            if not x.numel():
                return None
    var, mean = torch.var_mean(x if x.dtype == torch.float64 else x.float(), correction=0)
    return Moments(x.numel(), mean.cpu().double().view(1), var.cpu().double().view(1) * x.numel()), None


def write_gamma(record: Record, weight: Tensor | None, offset: float) -> None:
    """Range and shares of gamma."""
    if weight is None or torch.nn.parameter.is_lazy(weight) or not weight.numel():
        return
    gamma = weight.detach().double() + offset
    record.gamma_min, record.gamma_max = float(gamma.min()), float(gamma.max())
    record.gamma_zero = float((gamma.abs() < NEAR_ZERO).double().mean())
    record.gamma_negative = float((gamma < 0).double().mean())
