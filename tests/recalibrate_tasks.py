"""What the ranks of test_recalibrate_ranks.py run; every function is called as function(rank, world, ...)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

import anynorm

GROUPS: dict[tuple[int, ...], Any] = {}


def draw(rank: int, count: int) -> list[Tensor]:
    """`count` batches of a rank, of unlike sizes and means."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(3 + rank + n, 3, 5, generator=generator) + 4 * rank + n for n in range(count)]


def make(kind: str = "plain") -> nn.Module:
    torch.manual_seed(3)
    norms = {
        "plain": lambda c: nn.BatchNorm1d(c),
        "ours": lambda c: anynorm.BatchNorm1d(c),
        "torch sync": lambda c: nn.SyncBatchNorm(c),
        "our sync": lambda c: anynorm.SyncBatchNorm(c),
    }
    model = nn.Sequential(norms[kind](3), nn.ReLU(), nn.Conv1d(3, 4, 2), norms[kind](4))
    return model


def find_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def run(rank: int, world: int, kind: str, counts: list[int], earlier: str, **options: Any) -> dict[str, Any]:
    """Recalibrate with a rank's share of the batches."""
    model = make(kind)
    report = anynorm.recalibrate(model, draw(rank, counts[rank]), earlier=earlier, **options)
    entry = report.moved[0]
    told = {"count": entry.count, "error": entry.error, "batches": report.batches, "passes": report.passes}
    return {"state": find_state(model), **told}


def run_rtol(rank: int, world: int, rtol: float) -> tuple[int, float]:
    """Take batches until the error is small enough."""
    generator = torch.Generator().manual_seed(rank)
    model = nn.BatchNorm1d(4)
    report = anynorm.recalibrate(model, [torch.randn(32, 4, generator=generator) for _ in range(200)], rtol=rtol)
    return report.batches, report.moved[0].error


def run_wrapped(rank: int, world: int) -> dict[str, Tensor]:
    """Under DistributedDataParallel, whose forward would wait for the other ranks."""
    model = nn.parallel.DistributedDataParallel(make())
    anynorm.recalibrate(model, draw(rank, 1 + 2 * rank))
    return find_state(model.module)


def run_failing(rank: int, world: int, where: str, earlier: str) -> tuple[str, str, tuple[int, ...], bool]:
    """Rank 1 fails; what is raised here, and whether anything changed."""
    model = make()
    if where == "model" and rank == 1:
        model = nn.Linear(2, 2)
    if where == "norms" and rank == 1:
        model = nn.Sequential(model, nn.BatchNorm1d(4))
    before = find_state(model)

    class Loader:
        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            Loader.passes += 1
            first, second = draw(rank, 2)
            yield first
            if rank == 1 and where == f"loader {Loader.passes}":
                raise KeyboardInterrupt("enough")
            yield second

    loader: Any = [] if where == "empty" else Loader()
    try:
        anynorm.recalibrate(model, loader, earlier=earlier)
    except BaseException as error:
        same = all(torch.equal(before[name], t) for name, t in find_state(model).items())
        return type(error).__name__, str(error), getattr(error, "ranks", ()), same
    return "", "", (), False


def run_group(rank: int, world: int, ranks: tuple[int, ...]) -> dict[str, Tensor] | str:
    """Only some of the ranks."""
    if ranks not in GROUPS:
        GROUPS[ranks] = dist.new_group(list(ranks))
    model = make()
    try:
        anynorm.recalibrate(model, draw(rank, 2), process_group=GROUPS[ranks])
    except ValueError as error:
        return str(error)
    return find_state(model)


def run_argument(rank: int, world: int) -> tuple[str, str]:
    """Rank 1 gives no loader."""
    loader: Any = None if rank == 1 else draw(rank, 2)
    try:
        anynorm.recalibrate(make(), loader)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def run_late(rank: int, world: int, seconds: float) -> tuple[str, str, bool]:
    """Rank 1 is late by so many seconds, or dies where they are negative."""

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            if rank == 1 and seconds < 0:
                os._exit(1)
            if rank == 1:
                time.sleep(seconds)
            yield from draw(rank, 2)

    model = make()
    before = find_state(model)
    try:
        anynorm.recalibrate(model, Loader())
    except Exception as error:
        same = all(torch.equal(before[name], t) for name, t in find_state(model).items())
        return type(error).__name__, str(error), same
    return "", "", False


def run_left(rank: int, world: int, kind: str, earlier: str, counts: list[int]) -> tuple[dict[str, Tensor], bool]:
    """One norm keeps no averages, so it is left and takes the batch; and whether it is afterwards as before."""
    torch.manual_seed(3)
    left = {
        "ours": lambda: anynorm.SyncBatchNorm(3, track_running_stats=False),
        "fused": lambda: anynorm.SyncBatchNormAct(3, activation="relu", track_running_stats=False),
        "torch": lambda: nn.SyncBatchNorm(3, track_running_stats=False),
    }[kind]()
    model = nn.Sequential(left, nn.Conv1d(3, 4, 2), anynorm.SyncBatchNorm(4))
    before = dict(vars(left))
    anynorm.recalibrate(model, draw(rank, counts[rank]), earlier=earlier)
    return find_state(model), vars(left) == before and type(left).__name__.startswith("SyncBatchNorm")
