"""Batch norm over ranks, by real processes that meet by gloo: equals one process on the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn as nn

import anynorm
import rank_tasks
from gloo import Processes
from rank_tasks import draw, make, one_layer

EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4}


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[[int], Processes]]:
    """Processes by their number, started at first use."""
    worlds: dict[int, Processes] = {}

    def find(world: int) -> Processes:
        if world not in worlds:
            worlds[world] = Processes(world)
        return worlds[world]

    yield find
    for processes in worlds.values():
        processes.close()


def whole(kind, shape, dtype, how):
    """One process on the whole batch, by the plain norm in float64."""
    plain = {"SyncBatchNorm": {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(shape)]}
    kind = plain.get(kind, "BatchNormAct2d")
    norm = make(kind, shape[1], how.get("parameters", dtype), **how.get("options", {})).double()
    x, g = draw(shape, dtype, 1, how.get("mean", 3.0)).double(), draw(shape, dtype, 2, 0.0).double()
    given = {name: how[name] for name in ("mask", "lengths", "residual") if name in how}
    if "residual" in given:
        given["residual"] = given["residual"].double()
    return rank_tasks.run(norm, x, g, **given)


def check(found, expected, dtype, k=4):
    """The ranks' shares together equal the whole: k eps of the largest term, and state to the bit on all ranks.

    The kernels' sums are good to 1e-6 of the largest; k = 4 covers the rounding of the result, twice in dx.
    """
    for name in ("y", "dx"):
        together = torch.cat([part[name] for part in found]).double()
        scale = float(expected[name].abs().max())
        assert float((together - expected[name]).abs().max()) <= (k * EPS[dtype] + 1e-9) * scale, name
    for name in ("dweight", "dbias"):
        together = sum(part[name].double() for part in found)
        scale = max(float(part[name].abs().max()) for part in found)
        assert float((together - expected[name]).abs().max()) <= 8 * max(EPS[dtype], 1e-12) * scale * len(found), name
    for name, value in expected["state"].items():
        assert all(torch.equal(part["state"][name], found[0]["state"][name]) for part in found), name
        torch.testing.assert_close(found[0]["state"][name].to(value), value, rtol=2 * EPS[dtype] + 1e-12, atol=0)


HOLES = torch.arange(7 * 5 * 6).reshape(7, 5, 6) % 3 != 1
HOLES[5] = False  # A sample that is all padding.
CASES = {
    "even": (2, (6, 3, 4, 5), [3, 3], torch.float32, {}),
    "uneven": (2, (8, 3, 4, 5), [3, 5], torch.float32, {}),
    "rows": (2, (9, 7), [1, 8], torch.float32, {}),
    "one value on each rank": (2, (2, 7), [1, 1], torch.float64, {}),
    "sequences": (2, (5, 4, 9), [2, 3], torch.float32, {}),
    "volumes": (2, (5, 3, 2, 3, 4), [4, 1], torch.float32, {}),
    "channels_last": (2, (8, 6, 4, 5), [3, 5], torch.float32, {"channels_last": True}),
    "double": (2, (8, 3, 4, 5), [3, 5], torch.float64, {}),
    "bfloat16": (2, (8, 3, 4, 5), [3, 5], torch.bfloat16, {"parameters": torch.float32}),
    "float16": (2, (8, 3, 4, 5), [3, 5], torch.float16, {"parameters": torch.float32}),
    "far from zero": (2, (8, 3, 4, 5), [3, 5], torch.float32, {"mean": 1e6}),
    "cumulative": (2, (8, 3, 4, 5), [3, 5], torch.float32, {"options": {"momentum": None}}),
    "no averages": (2, (8, 3, 4, 5), [3, 5], torch.float32, {"options": {"track_running_stats": False}}),
    "empty rank": (3, (7, 3, 4, 5), [4, 0, 3], torch.float32, {}),
    "one rank has all": (3, (5, 3), [0, 5, 0], torch.float32, {}),
    "many channels": (3, (5, 700), [2, 2, 1], torch.float32, {}),
    "mask": (3, (7, 4, 5, 6), [3, 2, 2], torch.float32, {"mask": HOLES}),
    "mask, channels_last": (3, (7, 4, 5, 6), [3, 2, 2], torch.float32, {"mask": HOLES, "channels_last": True}),
    "all padding on a rank": (3, (7, 4, 5, 6), [5, 1, 1], torch.float32, {"mask": HOLES}),
    "mask, empty rank": (3, (7, 4, 5, 6), [3, 0, 4], torch.float32, {"mask": HOLES}),
    "lengths": (2, (5, 4, 9), [2, 3], torch.float32, {"lengths": torch.tensor([9, 1, 4, 0, 7])}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process_on_the_whole_batch(start, name):
    world, shape, sizes, dtype, how = CASES[name]
    found = start(world).run(one_layer, "SyncBatchNorm", shape, sizes, dtype, how)
    # A float32 input at 1e6 has itself been rounded; y comes from x - mean, which is exact.
    check(found, whole("SyncBatchNorm", shape, dtype, how), dtype)
    if how.get("channels_last"):
        assert all(part["channels_last"] for part in found)


@pytest.mark.parametrize("sizes", [[3, 4], [7, 0]], ids=str)
def test_activation_and_residual_stay_fused(start, sizes):
    shape = (7, 4, 5, 6)
    how = {"mask": HOLES, "residual": draw(shape, seed=9, mean=0.0), "options": {"activation": "silu"}}
    found = start(2).run(one_layer, "SyncBatchNormAct", shape, sizes, torch.float32, how)
    check(found, whole("SyncBatchNormAct", shape, torch.float32, how), torch.float32, k=8)


def test_equals_torch_in_one_process(start):
    """By a norm that is not ours: outputs, gradients and averages in float64."""
    found = start(3).run(one_layer, "SyncBatchNorm", (9, 4, 3, 5), [2, 3, 4], torch.float64, {})
    norm = nn.BatchNorm2d(4).double()
    norm.load_state_dict(make("SyncBatchNorm", 4, torch.float64).state_dict())
    x, g = (draw((9, 4, 3, 5), torch.float64, seed, mean) for seed, mean in ((1, 3.0), (2, 0.0)))
    check(found, rank_tasks.run(norm, x, g), torch.float64, k=64)


def test_ranks_count_by_their_real_positions(start):
    """flax with mask and axis_name weighs every device the same: its mean is off here by more than 0.1."""
    x, sizes = draw((4, 3, 50), seed=1), [2, 2]
    lengths = torch.tensor([50, 50, 2, 1])
    counted = torch.arange(50) < lengths[:, None]
    each = [x[part].transpose(1, 2)[counted[part]].mean(0) for part in (slice(0, 2), slice(2, 4))]
    true = x.double().transpose(1, 2)[counted].mean(0)
    assert float(((each[0] + each[1]) / 2 - true).abs().max()) > 0.1
    found = start(2).run(one_layer, "SyncBatchNorm", (4, 3, 50), sizes, torch.float32, {"lengths": lengths})
    torch.testing.assert_close(found[0]["state"]["running_mean"].double(), 0.1 * true, rtol=1e-6, atol=0)


def test_nothing_real_moves_nothing(start):
    """A batch that is all padding moves Keras's averages towards 0."""
    how = {"mask": torch.zeros(4, 3, 3, dtype=torch.bool)}
    for part in start(2).run(one_layer, "SyncBatchNorm", (4, 3, 3, 3), [2, 2], torch.float32, how):
        state = part["state"]
        assert state["num_batches_tracked"] == 0
        assert not part["y"].any() and not part["dx"].any() and not state["running_mean"].any()
        assert (state["running_var"] == 1).all()


def test_jagged_sequences(start):
    lengths, rows = [3, 1, 5, 2], draw((11, 4), seed=3)
    found = start(2).run(rank_tasks.jagged, rows, lengths, [1, 3])
    norm = make("BatchNorm1d", 4)
    expected = norm(rows)
    torch.testing.assert_close(torch.cat([part["y"] for part in found]), expected.detach())
    torch.testing.assert_close(found[0]["state"], norm.state_dict())


def test_process_groups(start):
    alone, *others = start(3).run(rank_tasks.subgroup, [1, 2])
    norm = anynorm.BatchNorm1d(3)
    norm(torch.cat([draw((4, 3), seed=rank) for rank in (1, 2)]))
    torch.testing.assert_close(others[0], norm.state_dict())
    torch.testing.assert_close(others[1], others[0], rtol=0, atol=0)
    assert not alone["running_mean"].any()


def test_a_batch_of_gradients_is_refused_before_anything_is_sent(start):
    for error in start(2).run(rank_tasks.batched):
        assert "takes one gradient at a time" in error


@pytest.mark.parametrize("choice", ["skip", "error"])
def test_nan_on_one_rank_is_refused_on_all(start, choice):
    for part in start(2).run(rank_tasks.refusing, choice):
        torch.testing.assert_close(part["after"], part["before"], rtol=0, atol=0)
        assert part["count"] == (choice == "skip")
        assert ("NaN or Inf" in part["error"]) == (choice == "error")


def test_one_value_is_one_on_all_ranks_together(start):
    for part in start(2).run(rank_tasks.single, "error", [1, 0]):
        assert "more than 1 value per channel on all ranks together" in part
    assert start(2).run(rank_tasks.single, "skip", [1, 0]) == ["0 (1, 2)", "0 (0, 2)"]
    assert start(2).run(rank_tasks.single, "error", [1, 1]) == ["1 (1, 2)", "1 (1, 2)"]
    assert start(2).run(rank_tasks.single, "error", [0, 0]) == ["0 (0, 2)", "0 (0, 2)"]


def test_collectives():
    """One forward, one backward; two forward where a layer has more channels than any before; none in evaluation."""
    processes = Processes(2)
    try:
        assert processes.run(rank_tasks.messages, 512) == [[1, 1, 1, 1, 0, 1]] * 2
        assert processes.run(rank_tasks.messages, 513) == [[2, 1, 1, 1, 0, 1]] * 2
        assert processes.run(rank_tasks.messages, 64) == [[1, 1, 1, 1, 0, 1]] * 2
    finally:
        processes.close()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_does_not_count(start, reentrant):
    """pytorch#96136."""
    for part in start(2).run(rank_tasks.recomputed, reentrant):
        assert part["repeats"] == 1
        assert part["checkpoint"]["state"]["num_batches_tracked"] == 1
        torch.testing.assert_close(part["checkpoint"], part["plain"], rtol=0, atol=0)


@pytest.mark.parametrize("twice", [False, True], ids=["one forward", "two forwards before a backward"])
@pytest.mark.parametrize("sizes", [[3, 4], [6, 1], [2, 0, 3]], ids=str)
def test_data_parallel_gives_the_weights_of_one_process(start, sizes, twice):
    """pytorch#175024, with torch's SyncBatchNorm: two forwards fail. Weights and averages, to 1e-12 of the largest."""
    found = start(len(sizes)).run(rank_tasks.data_parallel, sizes, twice)
    for part in found:
        torch.testing.assert_close(part, rank_tasks.whole_batch(sizes, twice), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(part, found[0], rtol=0, atol=0)


def test_compiled(start):
    """torch.compile breaks the graph at the norms; the rest, and DistributedDataParallel around it, go on."""
    for part in start(2).run(rank_tasks.data_parallel, [3, 4], True, "aot_eager"):
        torch.testing.assert_close(part, rank_tasks.whole_batch([3, 4], True), rtol=1e-10, atol=1e-12)


def test_torch_refuses_a_cpu(start):
    """pytorch#78081: ours takes over where it stands."""
    for theirs, ours in start(2).run(rank_tasks.take_over):
        assert "SyncBatchNorm expected input tensor to be on" in theirs
        torch.testing.assert_close(ours, 0.1 * torch.cat([draw((4, 3), seed=rank) for rank in (0, 1)]).mean(0))
