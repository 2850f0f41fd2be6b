"""What do the batches that a layer has seen say together, over all ranks, and how well do they say it?

    mean = sum_b n_b mean_b / n                                     n = sum_b n_b, the values per channel
    var = m2 / (n - 1)                                              m2 merged over batches, about the mean of all
    error of the mean, in std = sqrt(B / (B - 1) * sum_b (n_b / n)^2 (mean_b - mean)^2) / std
    error of the variance, relative = sqrt(B / (B - 1) * sum_b (n_b / n)^2 (s_b - s)^2) / s
    where s_b = var_b + (mean_b - mean)^2, the mean square of group b about the mean of all, and s that of all

B counts groups of successive batches, one batch each until there are more than `KEPT` and neighbours are merged: so
memory does not grow, and batches that resemble their neighbours do not look like more than they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import reduce
from math import inf
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import SyncError
from ...ranks.group import find_timeout
from ...statistics import Moments

KEPT = 32  # groups of batches for each layer; even


class Tally:
    """The moments of one layer's batches, on one rank, in at most `KEPT` groups.

    Attributes:
        groups: moments of successive batches together, (C,) in float64 on the CPU.
        total: of all together; None before the first.
        batches: how many came in.
    """

    def __init__(self) -> None:
        self.groups: list[Moments] = []
        self.total: Moments | None = None
        self.batches: int = 0
        self._each, self._last = 1, 1  # batches in a full group, and in the last one

    def add(self, moments: Moments) -> None:
        """One batch more."""
        self.batches += 1
        self.total = moments if self.total is None else self.total.merge(moments)
        if self._last < self._each:
            self.groups[-1] = self.groups[-1].merge(moments)
            self._last += 1
            return
        if len(self.groups) == KEPT:
            self.groups = [a.merge(b) for a, b in zip(self.groups[::2], self.groups[1::2], strict=True)]
            self._each *= 2
        self.groups.append(moments)
        self._last = 1


@dataclass(frozen=True)
class Population:
    """What is known of one layer.

    Attributes:
        count: values per channel.
        batches: how many they came in, on all ranks.
        mean, var: (C,), float64; var has n/(n-1).
        mean_error, var_error: (C,), estimated standard errors, in std and relative; inf where one group is all.
    """

    count: int
    batches: int
    mean: Tensor
    var: Tensor
    mean_error: Tensor
    var_error: Tensor


def merge_groups(groups: Sequence[Moments], batches: int) -> Population | None:
    """All groups together, in their order; None where there is no value."""
    if not groups:
        return None
    total = reduce(Moments.merge, groups)
    assert total.mean is not None
    var = total.m2 / max(int(total.count) - 1, 1)
    return Population(int(total.count), batches, total.mean, var, *find_errors(groups, total))


def find_errors(groups: Sequence[Moments], total: Moments) -> tuple[Tensor, Tensor]:
    """The standard errors in the heading of this file; 0 for channels that are constant."""
    assert total.mean is not None
    if len(groups) < 2:
        return torch.full_like(total.mean, inf), torch.full_like(total.mean, inf)
    counts = total.mean.new_tensor([int(group.count) for group in groups])[:, None]
    off = torch.stack([group.mean for group in groups if group.mean is not None]) - total.mean
    squares = torch.stack([group.m2 for group in groups]) / counts + off.square()
    weight = (counts / total.count).square() * (len(groups) / (len(groups) - 1))
    mean_error = ((weight * off.square()).sum(0) / total.var).sqrt()
    var_error = (weight * (squares - total.var).square()).sum(0).sqrt() / total.var
    is_constant = total.m2 == 0
    return mean_error.masked_fill(is_constant, 0), var_error.masked_fill(is_constant, 0)


class Peers:
    """The ranks that recalibrate together, which meet once at the end of each pass.

    Args:
        group: a process group; None for all processes, or for this one alone where there are no others.
    """

    def __init__(self, group: Any) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.group = group
        self.world: int = dist.get_world_size(group) if there else 1
        self.rank: int = dist.get_rank(group) if there else 0
        if self.rank < 0:
            raise ValueError(
                "recalibrate: every rank that calls it must be in process_group; got a group without this one; call it "
                "on the ranks of the group alone"
            )

    def merge(self, tallies: dict[str, Tally]) -> dict[str, Population]:
        """What all ranks have seen, in the order of ranks, so that every rank finds the same bits."""
        own = {name: (tally.batches, tally.groups) for name, tally in tallies.items()}
        everyone = self.exchange(None, own)
        odd = [rank for rank, theirs in enumerate(everyone) if list(theirs) != list(own)]
        if odd:
            raise SyncError(
                f"recalibrate: all ranks must have the same batch norms; got others on {say_ranks(odd)}; "
                "build the same model on every rank",
                ranks=self.name(odd),
            )
        merged = {}
        for name in tallies:
            groups = [group for theirs in everyone for group in theirs[name][1]]
            found = merge_groups(groups, sum(theirs[name][0] for theirs in everyone))
            if found is not None:
                merged[name] = found
        return merged

    @contextmanager
    def sharing_failure(self) -> Iterator[None]:
        """Tell the others, who wait at the end of the pass, what is raised here."""
        try:
            yield
        except BaseException as error:
            with suppress(Exception):  # The first error is the one to read.
                self.exchange(f"{type(error).__name__}: {error}", {})
            raise

    def exchange(self, fault: str | None, content: Any) -> list[Any]:
        """Every rank's content.

        Raises:
            SyncError: another rank has failed, is dead or does not come.
        """
        if self.world == 1:
            return [content]
        found: list[Any] = [None] * self.world
        start = time.monotonic()
        try:
            dist.all_gather_object(found, (fault, content), group=self.group)
        except RuntimeError as error:
            raise self.say_missing(time.monotonic() - start, error) from error
        failed = [rank for rank, (theirs, _) in enumerate(found) if theirs is not None]
        if failed and fault is None:
            raise SyncError(
                f"recalibrate: {say_ranks(failed)} failed with {found[failed[0]][0]}; nothing was changed on any rank; "
                "repair that",
                ranks=self.name(failed),
            )
        return [theirs for _, theirs in found]

    def say_missing(self, waited: float, error: RuntimeError) -> SyncError:
        """What to raise where the ranks could not meet; nobody knows which of them are missing."""
        timeout = find_timeout(dist.group.WORLD if self.group is None else self.group).total_seconds()
        first = str(error).strip().partition("\n")[0]
        return SyncError(
            f"recalibrate: a rank did not come to the end of the pass within the timeout of {timeout:g} s of its "
            f"process group, seen by rank {self.rank} after {waited:.1f} s ({first}); it died, was interrupted or has "
            "much more data: look at its own error first, or raise the timeout; nothing was changed on this rank"
        )

    def name(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Global ranks."""
        members = dist.get_process_group_ranks(dist.group.WORLD if self.group is None else self.group)
        return tuple(members[rank] for rank in ranks)


def say_ranks(ranks: Sequence[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"
