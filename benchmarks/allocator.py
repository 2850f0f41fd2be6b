"""Measure what `anynorm.tune_allocator` gains in time and costs in memory: `python -m benchmarks.allocator`.

What it does lasts as long as the process. So every measurement is a process of its own, and untouched, tuned and tuned
with keep_large follow each other in turn, as often as --pairs says. Time is the processor's, user and system together,
on one thread: on a machine with other work it is steadier than the clock on the wall, and page faults are part of it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

import anynorm
from anynorm.apps.zoo import ResNet18

from .machine import Watch, describe_load, find_facts

PAGE = Path(__file__).parents[1] / "docs" / "allocator.md"
COMMAND = [sys.executable, "-m", "benchmarks.allocator"]
SETTINGS = ("untouched", "tune_allocator()", "tune_allocator(keep_large=True)")
WARM_UP, SECONDS, FEWEST = 4.0, 2.0, 3  # for each process
THREAD = "in a thread of its own"
MEGA = 1 << 20
Call = Callable[[], object]


def make_layer_norm(rows: int, backward: bool) -> Call:
    """Layer norm of a transformer of width 4096; 64 positions are one MB."""
    norm, x = anynorm.LayerNorm(4096), torch.randn(rows, 4096)
    if not backward:
        return torch.no_grad()(lambda: norm(x))
    x.requires_grad_()
    g = torch.randn_like(x)
    inputs = [x, *norm.parameters()]
    return lambda: torch.autograd.grad(norm(x), inputs, g)


def make_resnet(images: int, side: int) -> Call:
    """A training step of ResNet-18, accelerated."""
    model = ResNet18()
    anynorm.accelerate(model)
    x, labels = torch.randn(images, 3, side, side), torch.randint(0, 1000, (images,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def fill_and_free() -> None:
    """Sixteen tensors of 64 MB, freed together."""
    made = [torch.ones(64 * MEGA // 4) for _ in range(16)]
    del made


def grow() -> list[torch.Tensor]:
    """Outputs of 33 to 96 MB, one at a time, of each of which one MB stays: a freed piece does not fit the next."""
    parts: list[torch.Tensor] = []
    for size in range(33, 97):
        output = torch.ones(size * MEGA // 4)
        parts.append(output[: MEGA // 4].clone())
        del output
    return parts


TIMED: dict[str, Callable[[], Call]] = {
    "layer norm, 34 MB, forward": lambda: make_layer_norm(34 * 64, False),
    "layer norm, 34 MB, forward and backward": lambda: make_layer_norm(34 * 64, True),
    "layer norm, 100 MB, forward": lambda: make_layer_norm(100 * 64, False),
    f"layer norm, 100 MB, forward, {THREAD}": lambda: make_layer_norm(100 * 64, False),
    "ResNet-18, 8 images of 96x96, step": lambda: make_resnet(8, 96),
    "ResNet-18, 32 images of 96x96, step": lambda: make_resnet(32, 96),
    "ResNet-18, 32 images of 224x224, step": lambda: make_resnet(32, 224),
}
KEPT: dict[str, Call] = {
    "16 tensors of 64 MB, freed together": fill_and_free,
    "outputs of 33 to 96 MB, one at a time, 1 MB of each stays": grow,
}


def read_memory(name: str) -> float:
    """A line of the process's status in MB: VmRSS what is resident, VmHWM the most that was."""
    return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def find_faults() -> int:
    """Page faults of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def run_child(setting: str, case: str) -> dict[str, float]:
    """Tune as asked, then measure one case."""
    torch.set_num_threads(1)
    if setting != SETTINGS[0]:
        anynorm.tune_allocator(keep_large=setting == SETTINGS[2])
    found = {"start": read_memory("VmRSS")}
    if case in TIMED:
        call = TIMED[case]()
        with ThreadPoolExecutor(1) as another:
            found |= another.submit(time_calls, call).result() if case.endswith(THREAD) else time_calls(call)
        del call
    else:
        kept = KEPT[case]()
        del kept
    gc.collect()
    found |= {"peak": read_memory("VmHWM"), "freed": read_memory("VmRSS")}
    ctypes.CDLL(None).malloc_trim(0)
    return found | {"trimmed": read_memory("VmRSS")}


def time_calls(call: Call) -> dict[str, float]:
    """Processor time and page faults of a call in the long run: memory that is kept grows with the first calls."""
    started = time.perf_counter()
    call()
    while time.perf_counter() < started + WARM_UP:
        call()
    times: list[float] = []
    faults, end = find_faults(), time.perf_counter() + SECONDS
    while len(times) < FEWEST or time.perf_counter() < end:
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return {"ms": 1e3 * statistics.median(times), "faults": (find_faults() - faults) / len(times)}


def measure(cases: list[str], pairs: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Every case in every setting, in turn."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {case: {name: [] for name in SETTINGS} for case in cases}
    for number in range(pairs):
        for case in cases:
            for setting in SETTINGS:
                done = subprocess.run([*COMMAND, "--child", setting, case], capture_output=True, text=True, check=True)
                found[case][setting].append(json.loads(done.stdout))
            print(f"{number + 1} of {pairs}: {case}", file=sys.stderr)
    return found


def write_times(found: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """A row for each case and setting: medians, and the extremes of the ratio to its untouched neighbour."""
    rows = ["| case | setting | ms | time untouched / time (least to most) | page faults | peak, MB |"]
    rows.append("|---|---|---|---|---|---|")
    for case, settings in found.items():
        for name, runs in settings.items():
            ratios = [plain["ms"] / run["ms"] for plain, run in zip(settings[SETTINGS[0]], runs, strict=True)]
            low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
            ratio = "" if name == SETTINGS[0] else f"**{middle:.2f}** ({low:.2f} to {high:.2f})"
            ms, faults, peak = (statistics.median(run[key] for run in runs) for key in ("ms", "faults", "peak"))
            label = name if name == SETTINGS[0] else f"`{name}`"
            rows.append(f"| {case} | {label} | {say(ms)} | {ratio} | {faults:,.0f} | {peak:,.0f} |")
    return "\n".join(rows)


def say(ms: float) -> str:
    """Milliseconds with three digits at least."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def write_memory(found: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """What is resident beyond the start: at most, when everything is freed, and after malloc_trim."""
    rows = ["| what was done | setting | peak, MB | freed, MB | after malloc_trim, MB |", "|---|---|---|---|---|"]
    for case, settings in found.items():
        for name, runs in settings.items():
            cells = [
                f"{statistics.median(run[key] - run['start'] for run in runs):,.0f}"
                for key in ("peak", "freed", "trimmed")
            ]
            label = name if name == SETTINGS[0] else f"`{name}`"
            rows.append(f"| {case} | {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


def write_facts(pairs: int, share: float | None) -> str:
    """The machine, and how it was measured."""
    facts = find_facts()
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    chosen = re.search(r"\[(\w+)\]", pages)
    named = [facts[name] for name in ("date", "cpu", "cores", "system")] + [f"torch {facts['torch']}"]
    words = [*named, f"kernels {facts['kernels']}", f"glibc {find_glibc_version()}"]
    words += [f"transparent huge pages: {chosen[1] if chosen else 'unknown'}", f"medians of {pairs} processes each"]
    return "; ".join([*words, f"other work meanwhile: {describe_load(share)}"]) + "."


def find_glibc_version() -> str:
    """As glibc states it."""
    function = ctypes.CDLL(None).gnu_get_libc_version
    function.restype = ctypes.c_char_p
    return function().decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--pairs", type=int, default=5, help="processes for each case and setting")
    parser.add_argument("--only", default="", help="cases whose name contains this; nothing is written then")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(run_child(*given.child)))
        return
    watch = Watch()
    timed, kept = ([case for case in cases if given.only in case] for cases in (TIMED, KEPT))
    tables = {"times": write_times(measure(timed, given.pairs)), "memory": write_memory(measure(kept, given.pairs))}
    tables["facts"] = write_facts(given.pairs, watch.find_share())
    print("\n\n".join(tables.values()))
    if not given.only:
        text = PAGE.read_text()
        for name, table in tables.items():
            text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", rf"\g<1>{table}\n\g<2>", text, flags=re.DOTALL)
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
