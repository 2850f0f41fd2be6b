"""recalibrate over real processes: all ranks find the same bits, of all the data, and none waits for ever."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import anynorm
from gloo import Processes
from recalibrate_tasks import (
    draw,
    make,
    run,
    run_argument,
    run_failing,
    run_group,
    run_late,
    run_left,
    run_rtol,
    run_wrapped,
)


@pytest.fixture(scope="module", params=[2, 3])
def processes(request: Any) -> Iterator[Processes]:
    found = Processes(request.param)
    yield found
    found.close()


def hold(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same to the bit."""
    assert state.keys() == other.keys()
    for name in state:
        assert torch.equal(state[name], other[name]), name


def find_truth(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    rows = torch.cat([x.double().movedim(1, -1).reshape(-1, x.shape[1]) for x in batches])
    return rows.mean(0), rows.var(0)


@pytest.mark.parametrize("earlier", ["batch", "population"])
@pytest.mark.parametrize("kind", ["plain", "ours", "torch sync", "our sync"])
def test_ranks_with_unlike_numbers_of_batches_equal_one_process(processes, kind, earlier):
    """Equals the reference; equals one process with all batches; the same bits on all ranks. Rank 1 has none."""
    counts = [3, 0, 5][: processes.world]
    found = processes.run(run, kind, counts, earlier)
    for other in found[1:]:
        hold(other["state"], found[0]["state"])
        assert (other["count"], other["error"], other["passes"]) == tuple(
            found[0][name] for name in ("count", "error", "passes")
        )
    assert [each["batches"] for each in found] == counts
    batches = [x for rank in range(processes.world) for x in draw(rank, counts[rank])]
    mean, var = find_truth(batches)
    state = found[0]["state"]
    torch.testing.assert_close(state["0.running_mean"].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state["0.running_var"].double(), var, rtol=1e-6, atol=0)
    assert int(state["0.num_batches_tracked"]) == sum(counts)
    alone = make(kind)
    anynorm.recalibrate(alone, batches, earlier=earlier)
    for name, t in alone.state_dict().items():
        torch.testing.assert_close(state[name], t, rtol=1e-5, atol=1e-6)


def test_rtol_is_about_all_ranks_together(processes):
    """Invariant: more ranks need fewer batches each, and reach what was asked for, to a fifth."""
    found = processes.run(run_rtol, 0.02)
    assert all(8 <= batches < 200 for batches, _ in found)
    assert found[0][1] < 0.024


def test_distributed_data_parallel_is_taken_off(processes):
    """Invariant: ranks with unlike numbers of batches do not wait for each other's buffers."""
    found = processes.run(run_wrapped)
    for other in found[1:]:
        hold(other, found[0])


@pytest.mark.parametrize(
    ("where", "earlier", "own"),
    [
        ("loader 1", "batch", "KeyboardInterrupt"),
        ("loader 2", "population", "KeyboardInterrupt"),
        ("model", "batch", "ValueError"),
    ],
)
def test_a_rank_that_fails_tells_the_others(processes, where, earlier, own):
    """Invariant: nobody hangs, nothing changed on any rank; and the ranks go on working together."""
    found = processes.run(run_failing, where, earlier)
    assert all(unchanged for *_, unchanged in found)
    for rank, (kind, message, ranks, _) in enumerate(found):
        if rank == 1:
            assert kind == own
        else:
            assert kind == "SyncError" and ranks == (1,)
            assert message.startswith(f"recalibrate: rank 1 failed with {own}: ")
            assert "nothing was changed on any rank" in message
    assert len(processes.run(run, "plain", [1] * processes.world, "batch")) == processes.world


def test_an_argument_that_one_rank_refuses_is_told_to_the_others(processes):
    """Invariant: nobody hangs; and the ranks go on working together."""
    for rank, (kind, message) in enumerate(processes.run(run_argument)):
        if rank == 1:
            assert kind == "TypeError" and message.startswith("recalibrate: loader must give batches one by one")
        else:
            assert kind == "SyncError" and message.startswith(
                "recalibrate: rank 1 failed with TypeError: recalibrate: l"
            )
    assert len(processes.run(run, "plain", [1] * processes.world, "batch")) == processes.world


@pytest.mark.parametrize("seconds", [-1.0, 5.0], ids=["dead", "late"])
def test_a_rank_that_is_dead_or_late_is_an_error_on_the_others(seconds):
    """Invariant: it ends within the timeout of the group, and nothing was changed."""
    processes = Processes(2, seconds=2.0)
    try:
        processes.run(draw_nothing)
        start = time.monotonic()
        first, second = processes.run(run_late, seconds)
        assert time.monotonic() - start < 12
    finally:
        processes.close()
    for rank, found in ((0, first), (1, second)):
        if rank == 1 and seconds < 0:
            assert found is None
            continue
        kind, message, unchanged = found
        assert kind == "SyncError" and unchanged, message
        assert message.startswith(
            "recalibrate: a rank did not come to the end of the pass within the timeout of 2 s of "
        )
        assert f"seen by rank {rank}" in message and "nothing was changed on this rank" in message


def draw_nothing(rank: int, world: int) -> None:
    """So that all have met."""


@pytest.mark.parametrize("earlier", ["batch", "population"])
@pytest.mark.parametrize("kind", ["ours", "fused", "torch"])
def test_synchronized_norms_that_are_left_wait_for_nobody(processes, kind, earlier):
    """Equals one process with all batches, whose norms have nobody to wait for; what is left is as before."""
    counts = [2, 4, 1][: processes.world]
    found = processes.run(run_left, kind, earlier, counts)
    assert all(untouched for _, untouched in found)
    for other, _ in found[1:]:
        hold(other, found[0][0])
    batches = [x for rank in range(processes.world) for x in draw(rank, counts[rank])]
    torch.manual_seed(3)
    plain = anynorm.BatchNorm1d(3, track_running_stats=False)
    alone = torch.nn.Sequential(plain, *([torch.nn.ReLU()] if kind == "fused" else []), torch.nn.Conv1d(3, 4, 2))
    alone.append(anynorm.BatchNorm1d(4))
    anynorm.recalibrate(alone, batches, earlier=earlier)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(found[0][0][f"2.{name}"], getattr(alone[-1], name), rtol=1e-5, atol=1e-6)


def test_what_all_ranks_see_is_raised_on_all(processes):
    """Invariant: other norms on rank 1, and no data anywhere."""
    for kind, message, _, unchanged in processes.run(run_failing, "norms", "batch"):
        assert kind == "SyncError" and "all ranks must have the same batch norms" in message and unchanged
    for kind, message, _, unchanged in processes.run(run_failing, "empty", "batch"):
        assert kind == "ValueError" and "got 0 batches" in message and unchanged


def test_a_group_of_some_ranks(processes):
    """Equals the reference of those ranks alone; another rank is refused."""
    ranks = tuple(range(processes.world - 1))
    found = processes.run(run_group, ranks)
    mean, _ = find_truth([x for rank in ranks for x in draw(rank, 2)])
    torch.testing.assert_close(found[0]["0.running_mean"].double(), mean, rtol=1e-6, atol=1e-6)
    assert "every rank that calls it must be in process_group" in found[-1]


def test_defect_timm_drops_the_variance_between_ranks(processes):
    """timm's distribute_bn(reduce=True), written out: the mean over ranks of each rank's running_var."""
    counts = [2] * processes.world
    ours = processes.run(run, "plain", counts, "batch")[0]["state"]["0.running_var"]
    shares = [draw(rank, 2) for rank in range(processes.world)]
    theirs = torch.stack([find_truth(share)[1] for share in shares]).mean(0)
    _, var = find_truth([x for share in shares for x in share])
    assert float((theirs / var).max()) < 0.5
    torch.testing.assert_close(ours.double(), var, rtol=1e-6, atol=0)
