"""What does `anynorm.accumulate` cost, in time and memory, and how far is its estimate from the large batch?

`python -m benchmarks.accumulate` prints the table and writes it into docs/accumulate.md.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import anynorm
from anynorm.apps.timing.interleaved import time_interleaved
from anynorm.apps.zoo import ResidualBlock

from .allocator import read_memory
from .machine import Watch, describe_load, find_facts

PAGE = Path(__file__).parents[1] / "docs" / "accumulate.md"
NORMS = (3, 20)
SAMPLES, PART, CHANNELS, SIDE = 64, 8, 16, 32
SECONDS = 10.0  # for a network, over all ways
SEEDS = 4
WAYS = ("large batch", "plain", "lockstep", "sweep", "estimate")
Batch = tuple[Tensor, Tensor]


def make(norms: int, seed: int = 0) -> nn.Module:
    """One or two convolutions, then residual blocks of two norms each."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for place in range(2 - norms % 2):
        convolution = nn.Conv2d(CHANNELS if place else 3, CHANNELS, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True)]
    layers += [ResidualBlock(CHANNELS, CHANNELS, 1) for _ in range((norms - 1) // 2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10))
    anynorm.accelerate(model)
    return model


def draw(seed: int = 0) -> Batch:
    """Images whose means differ, and classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, 3, SIDE, SIDE, generator=generator)
    return x + torch.randn(SAMPLES, 3, 1, 1, generator=generator), torch.randint(10, (SAMPLES,), generator=generator)


def find_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, and logits."""
    y = model(batch[0])
    return F.cross_entropy(y, batch[1]), y


def step(model: nn.Module, batch: Batch, way: str, find_loss: Any = find_loss) -> Tensor:
    """Forward and backward; the logits."""
    if way == "large batch":
        loss, y = find_loss(model, batch)
        loss.backward()
        return y.detach()
    parts = list(zip(*(t.split(PART) for t in batch)))
    if way != "plain":
        return torch.cat(anynorm.accumulate(model, parts, find_loss, mode=way).outputs)
    outputs = []
    for part in parts:
        loss, y = find_loss(model, part)
        (loss * (PART / SAMPLES)).backward()
        outputs.append(y.detach())
    return torch.cat(outputs)


def find_error(norms: int, way: str) -> tuple[float, float]:
    """Of outputs and gradients, relative to the large batch's norm, on average over seeds."""
    errors = []
    for seed in range(SEEDS):
        found = []
        for one in (way, "large batch"):
            model = make(norms, seed)
            y = step(model, draw(seed), one)
            found.append((y, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(*found)])
    return statistics.mean(e[0] for e in errors), statistics.mean(e[1] for e in errors)


def find_work(norms: int, way: str) -> float:
    """Operations of convolutions and products in a step, on a corner of the images."""
    threads = [FlopCounterMode(display=False) for _ in range(SAMPLES // PART)]
    turn = iter(threads)

    def count(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        with next(turn):  # What counts belongs to a thread.
            return find_loss(model, batch)

    images, classes = draw()
    model, batch, whole = make(norms), (images[..., :4, :4], classes), FlopCounterMode(display=False)
    with whole:
        step(model, batch, way, count if way == "lockstep" else find_loss)
    return whole.get_total_flops() + sum(counter.get_total_flops() for counter in threads)


def find_peak(norms: int, way: str) -> float:
    """MB that a first step adds to a process of its own; every tensor comes from the system and goes back to it."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.accumulate", "--peak", str(norms), way]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def print_peak(norms: int, way: str) -> None:
    """What the process of `find_peak` does."""
    model, batch = make(norms), draw()
    small = tuple(t[:2] for t in batch)
    find_loss(model, small)[0].backward()  # code and threads that every way needs
    before = read_memory("VmRSS")
    step(model, batch, way)
    print(json.dumps(read_memory("VmHWM") - before))


def measure(norms: int) -> list[str]:
    """The rows of one network."""
    batch = draw()
    calls: dict[str, Callable[[], object]] = {}
    for way in WAYS:
        calls[way] = partial(step, make(norms), batch, way)
    rounds = time_interleaved(calls, SECONDS, fewest=3)
    rows = []
    for way in WAYS:
        outputs, gradients = (0.0, 0.0) if way == "large batch" else find_error(norms, way)
        errors = [f"{e:.1e}" if 0 < e < 1e-3 else f"{e:.2g}" for e in (outputs, gradients)]
        time = f"{rounds.ratio(way, 'plain'):.2f}" if way != "plain" else f"1 ({1e3 * rounds.median(way):.0f} ms)"
        work = f"{find_work(norms, way) / find_work(norms, 'plain'):.2f}"
        rows.append(f"| {norms} | {way} | {work} | {time} | {find_peak(norms, way):.0f} | {errors[0]} | {errors[1]} |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, print, and write the page."""
    if sys.argv[1:2] == ["--peak"]:
        print_peak(int(sys.argv[2]), sys.argv[3])
        return
    watch = Watch()
    lines = [
        "| norms | way | operations / plain | time / plain | peak, MB | error of outputs | error of gradients |",
        "|---|---|---|---|---|---|---|",
    ]
    for norms in NORMS:
        lines += measure(norms)
    facts = find_facts()
    lines += [
        "",
        f"{facts['date']}, {facts['cpu']}, {facts['threads']} threads; other work meanwhile: "
        f"{describe_load(watch.find_share())}.",
    ]
    print(lines[-1])
    page = re.sub(
        r"(<!-- accumulate -->\n).*?(<!-- /accumulate -->)",
        lambda match: f"{match[1]}" + "\n".join(lines) + f"\n{match[2]}",
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
