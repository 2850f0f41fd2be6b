"""What goes wrong on one rank ends on the others as an error in time, with nothing changed (`make faults`: often)."""

from __future__ import annotations

import os

import pytest

import rank_tasks
from gloo import Processes

SECONDS = 3.0  # the timeout of the process group
TIMES = int(os.environ.get("FAULTS", "0"))  # how often; 0 is once, and fewer ranks
WORLDS = [2, 3] if TIMES else [3]
MISSES = [(2, 1, True), (3, 1, False), (3, 0, True), (3, 2, True)] if TIMES else [(3, 1, True)]
# What happens, and what the error says of it: the layer that the others wait in, and whether they must wait.
DIFFER = {
    "skips a layer": "rank 1 is at forward of 1, call 0",
    "skips backward": "rank 1 is at forward of 0, call 1",
    "has another dtype": "rank 1 is at forward of 0, call 0: 4 channels, bfloat16",
    "has other channels": "rank 1 is at forward of 0, call 0: 5 channels",
    "calls another model": "layer 2 of those synchronized",
    "has another mode": "not a gradient for its input",
    "does not move averages": "not moves its running averages",
}
MISSING = (
    "skips all",
    "is slow",
    "is interrupted",
    "dies before the header",
    "dies after the header",
    "dies in backward",
)
LAYER = {"dies in backward": "1", "skips backward": "1"}


@pytest.fixture(params=range(max(TIMES, 1)), ids=lambda i: f"time{i}")
def time_tried(request):
    return request.param


def check(found, kind, culprit, world):
    survivors = [part for rank, part in enumerate(found) if rank != culprit]
    assert len(survivors) == world - 1 and all(survivors)
    for part in survivors:
        assert part["error"] is not None, "no error"
        assert part["layer"] == LAYER.get(kind, "0")
        assert part["ranks"] == (culprit,), part
        assert part["seconds"] < SECONDS + 5
        assert "cannot be used any more" in part["again"]
        assert part["seconds again"] < 0.5
        moved = {name for name, same in part["unchanged"].items() if not same}
        allowed = {"0", "1"} if "backward" in kind else set()  # whose forward was done before
        assert {name.split(".")[0] for name in moved} == allowed
    return survivors


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", DIFFER)
def test_ranks_that_differ(kind, world, time_tried):
    processes = Processes(world)
    try:
        found = processes.run(rank_tasks.fault, kind, 1, True, SECONDS)
    finally:
        processes.close()
    for part in check(found, kind, 1, world):
        assert DIFFER[kind] in part["error"]
        assert part["seconds"] < SECONDS  # nobody waits
    assert found[1]["error"] is not None  # the culprit is told, too


@pytest.mark.parametrize(("world", "culprit", "warm"), MISSES)
@pytest.mark.parametrize("kind", MISSING)
def test_ranks_that_are_missing(kind, world, culprit, warm, time_tried):
    processes = Processes(world)
    try:
        found = processes.run(rank_tasks.fault, kind, culprit, warm, SECONDS)
    finally:
        processes.close()
    for part in check(found, kind, culprit, world):
        assert f"missing ranks: {culprit}," in part["error"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", [kind for kind in MISSING if kind.startswith("dies")])
def test_the_store_dies(kind, world, time_tried):
    """Nobody can say who is missing where rank 0 held the store; the error comes in time."""
    processes = Processes(world, tcp=True)
    try:
        found = processes.run(rank_tasks.fault, kind, 0, True, SECONDS)
    finally:
        processes.close()
    for part in found[1:]:
        assert part["ranks"] in ((), (0,))
        assert part["layer"] == LAYER.get(kind, "0")
        assert part["seconds"] < SECONDS + 5
        assert "cannot be used any more" in part["again"]
