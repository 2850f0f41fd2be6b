"""A short check of speed against torch.nn: ratios, interleaved, and each case as multiples of a copy's time.

`python benchmarks/speed_check.py [part of a name] [threads]`. A ratio above 1 says that anynorm is faster. On a busy
machine take 1 thread: whole teams wait for a turn there, and the waiting is what would be measured.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn

import anynorm

SECONDS = 0.1  # for each measurement of a case


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    arguments: tuple
    shape: tuple[int, ...]
    last: bool = False


def find_cases() -> list[Case]:
    cases = []
    for last in (False, True):
        layout = " channels_last" if last else ""
        for c, side in ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (512, 7), (2048, 7)):
            cases.append(Case(f"batch 8x{c}x{side}x{side}{layout}", "BatchNorm2d", (c,), (8, c, side, side), last))
        cases.append(Case(f"batch 32x64x56x56{layout}", "BatchNorm2d", (64,), (32, 64, 56, 56), last))
        cases.append(Case(f"batch 1x256x56x56{layout}", "BatchNorm2d", (256,), (1, 256, 56, 56), last))
        for n, c, side in ((2, 320, 64), (2, 1280, 16), (8, 256, 32)):
            shape = (n, c, side, side)
            cases.append(Case(f"group {n}x{c}x{side}x{side}{layout}", "GroupNorm", (32, c), shape, last))
        for n, c, side in ((2, 32, 64), (2, 128, 16), (2, 320, 8)):
            shape = (n, c, side, side, side)
            cases.append(Case(f"instance {n}x{c}x{side}^3{layout}", "InstanceNorm3d", (c,), shape, last))
    for rows, size in ((8 * 197, 768), (512, 4096), (4096, 4096), (8, 16)):
        cases.append(Case(f"layer {rows}x{size}", "LayerNorm", (size,), (rows, size)))
        cases.append(Case(f"rms {rows}x{size}", "RMSNorm", (size,), (rows, size)))
    for rows, size in ((256, 1024), (64, 64), (8, 16)):
        cases.append(Case(f"batch {rows}x{size}", "BatchNorm1d", (size,), (rows, size)))
    return cases


def make(case: Case, library: object) -> nn.Module:
    options = {"affine": True} if case.kind.startswith("Instance") else {}
    return getattr(library, case.kind)(*case.arguments, **options)


def find_calls(module: nn.Module, x: torch.Tensor, g: torch.Tensor) -> dict[str, Callable[[], object]]:
    leaf = x.detach().requires_grad_()
    parameters = [leaf, *module.parameters()]

    def evaluate() -> object:
        module.eval()
        with torch.no_grad():
            return module(x)

    def train() -> object:
        module.train()
        with torch.no_grad():
            return module(x)

    def both() -> object:
        module.train()
        return torch.autograd.grad(module(leaf), parameters, g)

    return {"evaluation": evaluate, "training": train, "forward+backward": both}


def measure(calls: list[Callable[[], object]]) -> list[list[float]]:
    """Times of each call, interleaved, at least five rounds."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + SECONDS * len(calls)
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return times


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    if len(sys.argv) > 2:
        torch.set_num_threads(int(sys.argv[2]))
    print(f"{'case':38} " + " ".join(f"{name:>26}" for name in ("evaluation", "training", "forward+backward")))
    print(f"{'':38} " + " ".join(f"{'torch/ours   ours/copy':>26}" for _ in range(3)))
    everything: dict[str, list[float]] = {}
    for case in find_cases():
        if wanted not in case.name:
            continue
        x, g = torch.randn(case.shape), torch.randn(case.shape)
        if case.last:
            layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            x, g = x.to(memory_format=layout), g.to(memory_format=layout)
        room = torch.empty_like(x)
        ours, theirs = find_calls(make(case, anynorm), x, g), find_calls(make(case, nn), x, g)
        cells = []
        for name in ours:
            mine, its, copy = measure([ours[name], theirs[name], lambda room=room, x=x: room.copy_(x)])
            ratio = statistics.median(b / a for a, b in zip(mine, its, strict=True))
            share = statistics.median(mine) / statistics.median(copy)
            everything.setdefault(name, []).append(ratio)
            cells.append(f"{ratio:12.2f} {share:12.1f} ")
        print(f"{case.name:38} " + " ".join(cells), flush=True)
    for name, ratios in everything.items():
        print(f"{name}: geometric mean {statistics.geometric_mean(ratios):.2f}, least {min(ratios):.2f}")
    isa = getattr(anynorm.kernels.compiled, "instruction_set", lambda: "none")() if not anynorm.kernels.OFF else "none"
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, kernels {isa}")


if __name__ == "__main__":
    main()
