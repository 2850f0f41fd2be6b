"""What does synchronization cost? A batch norm by itself and over 2 and 4 ranks, beside the bare messages.

`python -m benchmarks.sync` prints the table and writes it into docs/sync.md.
"""

from __future__ import annotations

import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import anynorm
from anynorm.ranks.exchange import Ranks
from anynorm.ranks.frames import FRAME, HEADER

from .machine import Watch, describe_load, find_facts

PAGE = Path(__file__).parents[1] / "docs" / "sync.md"
WORLDS = (2, 4)
# Name, and the shape of the batch of one rank.
CASES = (
    ("rows", (64, 512)),
    ("early maps", (8, 64, 56, 56)),
    ("middle maps", (8, 256, 14, 14)),
    ("late maps", (8, 2048, 7, 7)),
)
ROUNDS, CALLS = 30, 5


def make_step(norm: torch.nn.Module, x: Tensor, g: Tensor) -> Callable[[], Any]:
    """Forward and backward."""

    def step() -> None:
        y = norm(x)
        y.backward(g)
        x.grad = None

    return step


def make_messages(words: int, world: int) -> dict[str, Callable[[], Any]]:
    """What cannot be less: two gathers of such frames; and what a layer costs that trusts everybody: two sums."""
    frame = torch.zeros(max(FRAME, HEADER + words), dtype=torch.int64)
    room = [torch.empty_like(frame) for _ in range(world)]
    sums = torch.zeros(words, dtype=torch.float64)

    def gather() -> None:
        for _ in range(2):
            dist.all_gather(room, frame)

    def add() -> None:
        for _ in range(2):
            dist.all_reduce(sums)

    return {"gathers": gather, "sums": add}


def serve(rank: int, world: int, place: str, results: Any) -> None:
    """What each rank does; rank 0 tells its times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=world)
    found = []
    for name, shape in CASES:
        torch.manual_seed(rank)
        x, g = torch.randn(shape).requires_grad_(), torch.randn(shape)
        alone = anynorm.BatchNorm1d(shape[1]) if len(shape) == 2 else anynorm.BatchNorm2d(shape[1])
        synced = anynorm.SyncBatchNorm(shape[1])
        calls = {"alone": make_step(alone, x, g), "sync": make_step(synced, x, g)}
        calls |= make_messages(1 + 2 * shape[1], world)
        times: dict[str, list[float]] = {key: [] for key in calls}
        for turn in range(-3, ROUNDS):
            for key, call in calls.items():
                dist.barrier()
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                if turn >= 0:
                    times[key].append((time.perf_counter() - start) / CALLS)
        ranks = Ranks.find(None)
        assert ranks is not None
        before = ranks.sent
        calls["sync"]()
        found.append((name, shape, {key: statistics.median(t) for key, t in times.items()}, ranks.sent - before))
    if rank == 0:
        results.put(found)
    dist.barrier()


def measure(world: int) -> list[Any]:
    """All cases on so many processes."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=serve, args=(r, world, f"{folder}/store", results)) for r in range(world)]
        for process in ranks:
            process.start()
        found: list[Any] = results.get(timeout=600)
        for process in ranks:
            process.join()
    return found


def main() -> None:
    """Measure, print, and write the page."""
    watch = Watch()
    lines = [
        "| ranks | a rank's batch | alone, ms | synchronized, ms | more, ms | two gathers, ms | two sums, ms | sent |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for world in WORLDS:
        for name, shape, times, messages in measure(world):
            ms = {key: 1e3 * seconds for key, seconds in times.items()}
            more = ms["sync"] - ms["alone"]
            numbers = (ms["alone"], ms["sync"], more, ms["gathers"], ms["sums"])
            cells = [str(world), f"{name} {shape}", *(f"{n:.2f}" for n in numbers), str(messages)]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    facts = find_facts()
    lines += [
        "",
        f"Medians of {ROUNDS} rounds, forward and backward, one thread a rank. {facts['date']}, {facts['cpu']}, "
        f"{facts['threads']} cores; other work meanwhile: {describe_load(watch.find_share())}.",
    ]
    print(lines[-1])
    block = "\n".join(lines)
    text = re.sub(
        r"(<!-- sync -->\n).*?(<!-- /sync -->)",
        lambda match: f"{match[1]}{block}\n{match[2]}",
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
