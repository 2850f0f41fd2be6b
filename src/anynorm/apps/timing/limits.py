"""The bytes that a pass over memory cannot do without; divided by the copy's bandwidth they are a case's limit."""

from __future__ import annotations

import math
import platform
import re
from pathlib import Path

from anynorm.apps.timing.cases import Case, needs_grad

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
ASSUMED_CACHE = 32 << 20  # bytes, where the system does not say how large its last-level cache is
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def find_caches(root: Path = CACHES) -> dict[str, int]:
    """Bytes of each data cache by its level, as the kernel states them; empty where it states none."""
    found = {}
    for index in sorted(root.glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        match = re.fullmatch(r"(\d+)([KMG]?)", size)
        if kind != "Instruction" and match:
            found[f"L{level}"] = int(match[1]) * UNITS[match[2]]
    return found


def find_last_level(caches: dict[str, int]) -> int:
    """Bytes of the last-level cache."""
    return caches[max(caches)] if caches else ASSUMED_CACHE


def find_cpu(path: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system states it."""
    text = path.read_text() if path.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def find_span(case: Case) -> int:
    """Bytes of the stretch of memory that one mean and variance is taken over.

    A batch norm's channel is spread over all of x. Where samples keep statistics of their own it is a row, a channel or
    a group, but in channels_last the whole sample: neighbours in memory belong to different statistics.
    """
    if case.norm == "batch":
        return case.size
    if case.norm in ("layer", "rms"):
        return math.prod(case.arguments) * case.dtype.itemsize
    sample = case.size // case.shape[0]
    if case.channels_last:
        return sample
    pools = case.arguments[0]  # groups of group norm, channels of instance norm
    return sample // pools


def find_bytes(case: Case, mode: str, cache: int) -> int:
    """The fewest bytes between memory and processor.

    Forward reads x and writes y; backward reads x and the gradient and writes another. Statistics must be known before
    they are used, so what a statistic is taken over is read twice where it does not fit in the last-level cache:
    x in forward, x and the gradient in backward. Given statistics need one reading.

    Args:
        cache: bytes of the last-level cache.
    """
    if mode == "evaluation" and case.norm == "batch":
        return 2 * case.size
    again = 1 if find_span(case) > cache else 0
    forward = (2 + again) * case.size
    return forward + (3 + 2 * again) * case.size if needs_grad(mode) else forward


def is_out_of_cache(case: Case, cache: int) -> bool:
    """Whether x alone is larger than the last-level cache."""
    return case.size > cache
