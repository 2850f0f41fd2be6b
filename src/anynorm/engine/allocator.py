"""`tune_allocator`: memory that a tensor gives back stays with the process, so that the next output finds it ready.

On Linux torch takes its CPU memory from the C library's allocator. glibc's gives what is free at the top of its heap
back to the system, and maps a tensor above 32 MB anew at every call; each page that comes back costs a page fault, in
which the system fills it with zeros. A large normalization can spend most of its time there: docs/allocator.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# glibc's numbers for mallopt.
NUMBERS = {"M_TRIM_THRESHOLD": -1, "M_MMAP_THRESHOLD": -3, "M_MMAP_MAX": -4}
# The largest M_MMAP_THRESHOLD that glibc takes: tensors above it are mapped, unless M_MMAP_MAX forbids it.
LARGE = 32 << 20
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # read by torch once, when it makes its first tensor

TOO_LATE = (
    "tensors above 32 MB are mapped in small pages as before, because torch had made a tensor already or the system "
    f"gives no huge pages; call it before the first tensor, set {HUGE_PAGES}=1, or pass keep_large=True"
)


@dataclass(frozen=True)
class AllocatorReport:
    """What `tune_allocator` did; false where that is nothing.

    Attributes:
        settings: what glibc's `mallopt` was given, by name.
        huge_pages: whether new tensors above 32 MB come in huge pages.
        text: the same as sentences.
    """

    settings: dict[str, int]
    huge_pages: bool
    text: str

    def __bool__(self) -> bool:
        return bool(self.settings)

    def __str__(self) -> str:
        return self.text


done: AllocatorReport = AllocatorReport({}, False, "glibc as it is; tune_allocator was not called")


def tune_allocator(keep_large: bool = False) -> AllocatorReport:
    """Have the C allocator keep the memory of freed tensors: fewer page faults, for more resident memory.

    Call it before the first tensor is made: only then can tensors above 32 MB get huge pages. It holds for this process
    and those forked from it, and cannot be undone there.

    Args:
        keep_large: keep the memory of tensors above 32 MB too, instead of mapping them anew. Fastest where every step
            has the same shapes; where shapes vary, freed pieces may fit nothing, and memory grows.

    Returns:
        A report that prints what was set. It is false, and a warning says why, where nothing could be done: outside
        Linux, with another C library than glibc, or with another allocator in its place (jemalloc, tcmalloc).

    Note:
        Memory that is kept can be given back by hand: ``ctypes.CDLL(None).malloc_trim(0)``. Gain and cost, measured:
        docs/allocator.md.

    Example:
        The first lines of a program, ``import anynorm`` and ``print(anynorm.tune_allocator())``, print
        "glibc keeps the memory of freed tensors up to 32 MB; larger ones are mapped anew, in huge pages".
    """
    global done
    settings = {"M_TRIM_THRESHOLD": -1, "M_MMAP_THRESHOLD": LARGE, **done.settings}
    if keep_large:
        settings["M_MMAP_MAX"] = 0
    with huge_pages_asked_for():
        obstacle = find_obstacle() or find_stranger()
        # Looked at before anything is kept: afterwards the probe could meet pages that are there already.
        huge_pages = done.huge_pages if done or obstacle else comes_in_huge_pages()
    obstacle = obstacle or find_refusal(settings)
    if obstacle:
        warnings.warn(f"tune_allocator: nothing was done, because {obstacle}", stacklevel=2)
        return AllocatorReport({}, False, f"nothing was done, because {obstacle}")
    done = AllocatorReport(settings, huge_pages, describe_settings("M_MMAP_MAX" in settings, huge_pages))
    if not huge_pages and "M_MMAP_MAX" not in settings:
        warnings.warn(f"tune_allocator: {TOO_LATE}", stacklevel=2)
    return done


def describe() -> dict[str, str]:
    """The line that `anynorm env` prints; no tensor is made for it, or huge pages could not be asked for any more."""
    obstacle = find_obstacle()
    return {"allocator": f"tune_allocator does nothing here, because {obstacle}" if obstacle else done.text}


def describe_settings(keep_large: bool, huge_pages: bool) -> str:
    """What was set, in words."""
    pages = "huge pages" if huge_pages else "small pages"
    if keep_large:
        return f"glibc keeps the memory of freed tensors of any size, in {pages}"
    return f"glibc keeps the memory of freed tensors up to 32 MB; larger ones are mapped anew, in {pages}"


def load_glibc() -> Any:
    """glibc itself, whatever stands before it in the order of symbols."""
    return ctypes.CDLL("libc.so.6")


def find_obstacle() -> str | None:
    """Why nothing can be done here, as the end of a sentence; None where it can."""
    if sys.platform != "linux":
        return f"it knows glibc's allocator only, and this system is {sys.platform}"
    try:
        glibc = load_glibc()
        glibc.mallopt, glibc.gnu_get_libc_version
    except (OSError, AttributeError):
        return "the C library is not glibc"
    if find_address(ctypes.CDLL(None).posix_memalign) != find_address(glibc.posix_memalign):
        return "another allocator was loaded in the place of glibc's; it has settings of its own"
    return None


def find_refusal(settings: dict[str, int]) -> str | None:
    """Pass the settings to glibc; why it does not take them, None where it does."""
    refused = [name for name, value in settings.items() if not load_glibc().mallopt(NUMBERS[name], value)]
    return f"glibc does not take {' and '.join(refused)} here" if refused else None


def find_address(function: Any) -> int | None:
    """Where a C function lies."""
    return ctypes.cast(function, ctypes.c_void_p).value


class Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`: in bytes, `hblkhd` is what is mapped, `uordblks` what is used in heaps."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")] + [
        (name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def find_stranger() -> str | None:
    """Why glibc's settings would not reach torch; None where what glibc holds grows by a new tensor."""
    glibc = load_glibc()
    if not hasattr(glibc, "mallinfo2"):
        return None  # Before glibc 2.33 it could only be counted up to 2 GB.
    glibc.mallinfo2.restype = Mallinfo
    before = glibc.mallinfo2()
    probe = torch.UntypedStorage(LARGE // 2)
    after = glibc.mallinfo2()
    del probe
    # A half of it, because other threads may free something meanwhile.
    grown = after.uordblks + after.hblkhd - before.uordblks - before.hblkhd > LARGE // 4
    return None if grown else "this build of torch has an allocator of its own"


@contextlib.contextmanager
def huge_pages_asked_for() -> Iterator[None]:
    """While this lasts torch would decide for huge pages, if it has not decided yet and the user has not."""
    chosen = HUGE_PAGES in os.environ
    os.environ.setdefault(HUGE_PAGES, "1")
    try:
        yield
    finally:
        if not chosen:
            del os.environ[HUGE_PAGES]


def comes_in_huge_pages() -> bool:
    """Whether a new large tensor needs far fewer page faults than it has small pages."""
    import resource  # Windows has none.

    touched = LARGE // 4
    probe = torch.UntypedStorage(LARGE + touched)
    memory = (ctypes.c_char * touched).from_address(probe.data_ptr())
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for place in range(0, touched, mmap.PAGESIZE):
        memory[place] = b"\0"
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
    # A quarter may lie before the first border of a huge page; half leaves room for faults of Python's own.
    return faults < touched // mmap.PAGESIZE // 2
