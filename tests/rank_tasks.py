"""What the ranks of test_sync.py and test_faults.py run; every function is called as function(rank, world, ...)."""

from __future__ import annotations

import copy
import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import anynorm
from anynorm.errors import SyncError
from anynorm.ranks.exchange import Ranks

Sizes = list[int]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, mean: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + mean).to(dtype)


def make(kind: str, channels: int, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A norm with a gamma and a beta of its own for each channel."""
    norm = getattr(anynorm, kind)(channels, dtype=dtype, **options)
    with torch.no_grad():
        for name, tensor in norm.named_parameters():
            tensor.copy_(draw(tensor.shape, dtype, len(name), 0.5))
    return norm


def cut(t: Any, sizes: Sizes, rank: int) -> Any:
    return None if t is None else t.split(sizes)[rank]


def run(norm: nn.Module, x: torch.Tensor, g: torch.Tensor, **given: Any) -> dict[str, Any]:
    """Forward and backward."""
    x = x.requires_grad_()
    y = norm(x, **given)
    y.backward(g)
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dweight": norm.weight.grad,
        "dbias": norm.bias.grad,
        "state": norm.state_dict(),
    }


def one_layer(
    rank: int, world: int, kind: str, shape: tuple[int, ...], sizes: Sizes, dtype: torch.dtype, how: dict[str, Any]
) -> dict[str, Any]:
    """A rank's share of a batch; with world 1 the whole of it."""
    x, g = draw(shape, dtype, 1, how.get("mean", 3.0)), draw(shape, dtype, 2, 0.0)
    share = cut(x, sizes, rank).clone()
    if how.get("channels_last"):
        share = share.to(memory_format=torch.channels_last)
    norm = make(kind, shape[1], how.get("parameters", dtype), **how.get("options", {}))
    given = {name: cut(how[name], sizes, rank) for name in ("mask", "lengths", "residual") if name in how}
    found = run(norm, share, cut(g, sizes, rank), **given)
    return {**found, "channels_last": found["y"].is_contiguous(memory_format=torch.channels_last)}


def jagged(rank: int, world: int, rows: torch.Tensor, lengths: list[int], sizes: Sizes) -> dict[str, Any]:
    """Sequences of a rank, as a jagged tensor."""
    first = sum(sizes[:rank])
    parts = list(rows.split(lengths))[first : first + sizes[rank]]
    norm = make("SyncBatchNorm", rows.shape[1])
    y = norm(torch.nested.nested_tensor(parts, layout=torch.jagged))
    return {"y": y.values().detach(), "state": norm.state_dict()}


def take_over(rank: int, world: int) -> tuple[str, torch.Tensor]:
    """torch's SyncBatchNorm on the CPU, then ours in its place."""
    norm, error = nn.SyncBatchNorm(3), ""
    try:
        norm(draw((4, 3), seed=rank))
    except ValueError as found:
        error = str(found)
    anynorm.sync(norm)
    norm(draw((4, 3), seed=rank))
    anynorm.sync(norm, undo=True)
    assert type(norm) is nn.SyncBatchNorm
    return error, norm.running_mean


def subgroup(rank: int, world: int, members: list[int]) -> dict[str, Any]:
    """Ranks of a group share, the others are alone."""
    group = dist.new_group(members)
    norm = anynorm.SyncBatchNorm(3, process_group=group if rank in members else None)
    if rank in members:
        norm(draw((4, 3), seed=rank))
        assert copy.deepcopy(norm).process_group is group
    return norm.state_dict()


def batched(rank: int, world: int) -> str:
    """Several gradients at once, then one."""
    norm, x = anynorm.SyncBatchNorm(2), draw((4, 2), seed=rank).requires_grad_()
    y = norm(x)
    try:
        torch.autograd.grad(y, x, torch.ones(3, 4, 2), is_grads_batched=True, retain_graph=True)
    except RuntimeError as error:
        y.sum().backward()
        return str(error)
    return ""


def refusing(rank: int, world: int, choice: str) -> dict[str, Any]:
    """Rank 1 has a NaN."""
    norm = anynorm.SyncBatchNorm(2, on_nonfinite=choice)
    norm(draw((4, 2), seed=rank))
    before = copy.deepcopy(norm.state_dict())
    x = draw((4, 2), seed=rank)
    x[0, 0] = float("nan") if rank == 1 else 0.0
    error = ""
    try:
        norm(x)
    except FloatingPointError as found:
        error = str(found)
    return {"before": before, "after": norm.state_dict(), "count": norm.nonfinite_batches, "error": error}


def single(rank: int, world: int, choice: str, sizes: Sizes) -> str:
    """What becomes of few values."""
    norm = anynorm.SyncBatchNorm(2, on_single=choice)
    try:
        y = norm(draw((sizes[rank], 2), seed=rank))
    except ValueError as error:
        return str(error)
    return f"{int(norm.num_batches_tracked)} {tuple(y.shape)}"


def messages(rank: int, world: int, channels: int) -> list[int]:
    """Collectives of forward, backward, forward, backward; then in evaluation, and forward without gradients."""
    norm = anynorm.SyncBatchNorm(channels)
    ranks, found = Ranks.find(None), []
    assert ranks is not None
    for _ in range(2):
        before = ranks.sent
        y = norm(draw((4, channels), seed=rank).requires_grad_())
        found.append(ranks.sent - before)
        before = ranks.sent
        y.sum().backward()
        found.append(ranks.sent - before)
    for training in (False, True):
        before = ranks.sent
        with torch.no_grad():
            norm.train(training)(draw((4, channels)))
        found.append(ranks.sent - before)
    return found


def recomputed(rank: int, world: int, reentrant: bool) -> dict[str, Any]:
    """Activation checkpointing, and a repeat that is not to count."""
    found = {}
    for name, wrap in (("plain", False), ("checkpoint", True)):
        norm = make("SyncBatchNorm", 3)
        x = draw((2 + rank, 3), seed=rank).requires_grad_()
        block = nn.Sequential(norm, nn.Tanh())
        y = checkpoint(block, x, use_reentrant=reentrant) if wrap else block(x)
        y.square().sum().backward()
        found[name] = {"state": norm.state_dict(), "dx": x.grad, "dweight": norm.weight.grad}
    norm = make("SyncBatchNorm", 3)
    with anynorm.update_once():
        norm(draw((2, 3), seed=rank))
        norm(draw((2, 3), seed=rank + 5))
    return {**found, "repeats": int(norm.num_batches_tracked)}


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 4, 3), nn.BatchNorm1d(3)).double()


def train(model: Any, shares: list[torch.Tensor], whole: int, world: int, twice: bool) -> list[torch.Tensor]:
    """Three steps of the mean loss over the whole batch; times the world, for DistributedDataParallel divides by it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for x in shares:
        optimizer.zero_grad()
        y = model(x).sin()
        if twice:
            y = y + 0.5 * model(x.flip(-1)).cos()
        (y.sum() * world / whole).backward()
        optimizer.step()
    return [t.detach().clone() for t in model.state_dict().values()]


def data_parallel(rank: int, world: int, sizes: Sizes, twice: bool, backend: str = "") -> list[torch.Tensor]:
    """Training by DistributedDataParallel, each rank with its share of the batch."""
    model = make_model()
    anynorm.sync(model)
    whole = [draw((sum(sizes), 2, 6, 6), torch.float64, step) for step in range(3)]
    shares = [cut(x, sizes, rank) for x in whole]
    wrapped = DistributedDataParallel(model)
    return train(torch.compile(wrapped, backend=backend) if backend else wrapped, shares, sum(sizes), world, twice)


def whole_batch(sizes: Sizes, twice: bool) -> list[torch.Tensor]:
    """The same in one process, by torch's batch norm."""
    whole = [draw((sum(sizes), 2, 6, 6), torch.float64, step) for step in range(3)]
    return train(make_model(), whole, sum(sizes), 1, twice)


class Absent(Exception):
    """This rank does not go on."""


def fault(rank: int, world: int, kind: str, culprit: int, warm: bool, seconds: float) -> dict[str, Any]:
    """A step in which the rank `culprit` misbehaves: what each rank saw, how long it took, and its state."""
    channels = 600 if kind == "dies after the header" else 4
    model = nn.Sequential(nn.BatchNorm1d(channels), nn.BatchNorm1d(channels), nn.Linear(channels, channels))
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    anynorm.sync(model, process_group=group)
    if kind == "calls another model":
        twin = nn.Sequential(nn.BatchNorm1d(channels), nn.Identity())
        anynorm.sync(twin, process_group=group)
        for each in (model, twin):
            step(each, channels)
        model.other = (twin[0],)
    dist.barrier()  # From here on all are awake, on a busy machine, too.
    if warm:  # The ranks have met; else they meet in the fault.
        step(nn.Sequential(anynorm.SyncBatchNorm(4, process_group=group)), 4)
        dist.barrier()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    start, error = time.monotonic(), None
    try:
        misbehave(kind, model, channels, seconds) if rank == culprit else step(model, channels)
    except SyncError as found:
        error = found
    except Absent:
        pass
    took = time.monotonic() - start
    again, start = "", time.monotonic()
    try:
        step(model, channels)
    except SyncError as found:
        again = str(found)
    after = {name: bool(torch.equal(t, before[name])) for name, t in model.state_dict().items()}
    return {
        "error": None if error is None else str(error),
        "layer": getattr(error, "layer", None),
        "ranks": getattr(error, "ranks", None),
        "seconds": took,
        "again": again,
        "seconds again": time.monotonic() - start,
        "unchanged": after,
    }


def step(model: nn.Module, channels: int, dtype: torch.dtype = torch.float32) -> None:
    x = draw((3, channels), dtype).requires_grad_()
    model(x).sum().backward()


def misbehave(kind: str, model: Any, channels: int, seconds: float) -> None:
    """What goes wrong on one rank, where others wait for it for `seconds`."""
    first, second, _ = model
    x = draw((3, channels)).requires_grad_()
    if kind == "skips a layer":
        second(x)
    elif kind == "skips all":
        time.sleep(seconds + 4)
        raise Absent
    elif kind == "is slow":
        time.sleep(seconds + 1.5)
        first(x)
    elif kind == "is interrupted":

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        gather, Ranks.gather = Ranks.gather, interrupt
        try:
            first(x)
        except KeyboardInterrupt:
            raise Absent from None
        finally:
            Ranks.gather = gather
    elif kind == "dies before the header":
        os._exit(1)
    elif kind == "dies after the header":
        gather = Ranks.gather

        def die(self: Ranks, message: torch.Tensor) -> torch.Tensor:
            Ranks.gather = lambda *_: os._exit(1)
            return gather(self, message)

        Ranks.gather = die
        first(x)
    elif kind == "dies in backward":
        model(x)
        os._exit(1)
    elif kind == "skips backward":
        model(x)
        first(x)
    elif kind == "has another dtype":
        first(x.bfloat16())
    elif kind == "has other channels":
        other = anynorm.SyncBatchNorm(channels + 1, process_group=first.process_group)
        other.label = "0"
        other(draw((3, channels + 1)))
    elif kind == "calls another model":  # whose layer has the same name; both had been called by all ranks
        model.other[0](x)
    elif kind == "has another mode":
        with torch.no_grad():
            first(x)
    elif kind == "does not move averages":
        first.track_running_stats = False
        first(x)
    else:
        raise AssertionError(kind)
