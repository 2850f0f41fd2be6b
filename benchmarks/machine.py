"""The facts of the machine and of the run, without which a time means nothing."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from anynorm.apps.timing.limits import ASSUMED_CACHE, find_caches, find_cpu, find_last_level
from anynorm.engine.paths import describe_environment

BUSY = 0.05  # of the processors; beyond it threads wait for their turn, and that is what would be measured
STAT = Path("/proc/stat")
ALLOCATOR_VARIABLES = ("THP_MEM_ALLOC_ENABLE", "LD_PRELOAD", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES")


def find_version(package: str) -> str:
    """The version of an installed package, or that it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def find_facts() -> dict[str, str]:
    """Processor, caches, versions, threads, instruction set and allocator; no name and no path of this machine."""
    caches = find_caches()
    sizes = ", ".join(f"{level} {size >> 10} KiB" for level, size in caches.items())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = describe_environment()
    given = [f"{name}={os.environ[name]}" for name in ALLOCATOR_VARIABLES if os.environ.get(name)]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": find_cpu(),
        "cores": f"{cores} usable of {os.cpu_count()}",
        "caches": sizes or f"not stated by the system; a last level of {ASSUMED_CACHE >> 20} MiB is assumed",
        "last-level cache bytes": str(find_last_level(caches)),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "kernels": environment["kernels"],
        "allocator": ", ".join(given) or "the system's default",
        "anynorm": environment["anynorm"],
        "torch": environment["torch"],
        "jax": find_version("jax"),
        "python": environment["python"],
    }


class Watch:
    """How much of the processors other work takes while this process runs; Linux tells, elsewhere nothing is known."""

    def __init__(self) -> None:
        self.before = self.read()

    @staticmethod
    def read() -> tuple[float, float, float] | None:
        """Seconds of all processors together, those of them not idle, and those of this process and its children."""
        if not STAT.exists():
            return None
        ticks = [int(word) for word in STAT.read_text().split("\n", 1)[0].split()[1:9]]  # user ... steal
        busy = sum(ticks) - ticks[3] - ticks[4]  # idle, waiting for a disk
        own = os.times()
        hertz = os.sysconf("SC_CLK_TCK")
        return sum(ticks) / hertz, busy / hertz, own.user + own.system + own.children_user + own.children_system

    def find_share(self) -> float | None:
        """The share of the processors' time that other work took since the start."""
        after = self.read()
        if self.before is None or after is None:
            return None
        total, busy, own = (now - then for now, then in zip(after, self.before, strict=True))
        return min(max(busy - own, 0.0) / total, 1.0) if total else 0.0  # sums of seconds round


def describe_load(share: float | None) -> str:
    """The share in words, with a warning where it spoils the times."""
    if share is None:
        return "unknown"
    warning = ": the times mean little, repeat on a quiet machine" if share > BUSY else ""
    return f"{100 * share:.0f} % of the processors{warning}"
