"""tune_allocator: fewer page faults where it can help, a plain word where it cannot; nothing else changes.

What it does lasts as long as the process, so that each case is a process of its own. Faults are counted, not timed.
"""

import json
import os
import subprocess
import sys
import types

import pytest
from typer.testing import CliRunner

import anynorm
from anynorm.apps import cli
from anynorm.engine import allocator

glibc_only = pytest.mark.skipif(allocator.find_obstacle() is not None, reason=f"{allocator.find_obstacle()}")

MEGA = 1 << 20
PAGES = 64 * MEGA // 4096  # small pages of the largest tensor below
SCRIPT = """
import ctypes, json, os, resource, sys, warnings
import anynorm.engine.allocator, torch
torch.set_num_threads(1)
case = sys.argv[1]
anynorm.engine.allocator.describe()  # As anynorm env asks; it must not make a tensor.
if case in ("late", "asked"):
    torch.ones(1)
reports = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    if case == "keep":
        reports.append(anynorm.tune_allocator(keep_large=True))
    if case != "untouched":
        reports += [anynorm.tune_allocator(), anynorm.tune_allocator()]

def count(call):  # page faults of a call, once it has been made often enough
    for _ in range(3):
        call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5

def make_large():
    torch.ones(64 << 18)

# By the C functions themselves: a small object of torch's on top of the heap would keep glibc from giving it back.
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def make_middle():
    places = [libc.malloc(20 << 20) for _ in range(5)]
    for place in places:
        ctypes.memset(place, 0, 20 << 20)
    for place in places:
        libc.free(ctypes.c_void_p(place))

def resident():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS"))) / 1024

found = {"large": count(make_large), "middle": count(make_middle), "start": resident()}
made = [torch.ones(64 << 18) for _ in range(4)]
del made
found["freed"] = resident()
libc.malloc_trim(0)
found["trimmed"] = resident()
found["reports"] = [[bool(r), r.settings, r.huge_pages, str(r)] for r in reports]
found["warnings"] = [str(w.message) for w in caught]
found["line"] = anynorm.engine.allocator.describe()["allocator"]
found["variable"] = os.environ.get("THP_MEM_ALLOC_ENABLE")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    """What each case measured; `asked` has set torch's variable itself, and makes a tensor first as `late` does."""
    clean = {name: value for name, value in os.environ.items() if name != allocator.HUGE_PAGES}
    processes = {}
    for case in ("untouched", "tuned", "keep", "late", "asked"):
        given = {**clean, allocator.HUGE_PAGES: "1"} if case == "asked" else clean
        command = [sys.executable, "-c", SCRIPT, case]
        processes[case] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=given)
    results = {case: json.loads(process.communicate(timeout=600)[0]) for case, process in processes.items()}
    assert all(process.returncode == 0 for process in processes.values())
    return results


@glibc_only
def test_tensors_up_to_32_mb_find_their_pages_ready(found):
    assert found["untouched"]["middle"] > 100, "glibc gives the top of its heap back"
    for case in ("tuned", "keep", "late", "asked"):
        assert found[case]["middle"] < 10


@glibc_only
def test_large_tensors_come_in_huge_pages_or_it_is_said_that_they_do_not(found):
    for case in ("tuned", "late", "asked"):
        *_, huge_pages, _ = found[case]["reports"][0]
        assert huge_pages == (found[case]["large"] < PAGES / 4)
        said = [text for text in found[case]["warnings"] if "mapped in small pages as before" in text]
        assert len(said) == (0 if huge_pages else 2), "each call says it"


@glibc_only
def test_huge_pages_can_still_be_had_after_import_and_env(found):
    assert found["tuned"]["reports"][0][2] == found["asked"]["reports"][0][2]


@glibc_only
def test_the_example_of_the_docstring_is_what_is_said(found):
    *_, huge_pages, text = found["tuned"]["reports"][0]
    assert text.replace("small", "huge") in " ".join(anynorm.tune_allocator.__doc__.split())
    assert ("huge" in text) == huge_pages


@glibc_only
def test_kept_large_tensors_cost_next_to_no_faults(found):
    assert found["keep"]["large"] < PAGES / 100
    assert found["keep"]["warnings"] == []


@glibc_only
def test_a_second_call_changes_nothing_and_takes_nothing_back(found):
    for case in ("tuned", "late", "asked", "keep"):
        reports = found[case]["reports"]
        assert all(report == reports[0] for report in reports)
        assert reports[0][0]
    assert found["keep"]["reports"][-1][1] == {"M_TRIM_THRESHOLD": -1, "M_MMAP_THRESHOLD": 32 * MEGA, "M_MMAP_MAX": 0}
    assert "M_MMAP_MAX" not in found["tuned"]["reports"][-1][1]


@glibc_only
def test_memory_that_is_kept_can_be_given_back(found):
    """As the docs say: large tensors leave nothing behind unless they are kept, and malloc_trim returns that too."""
    for case in ("untouched", "tuned"):
        assert found[case]["freed"] < found[case]["start"] + 32
    assert found["keep"]["freed"] > found["keep"]["start"] + 64
    assert found["keep"]["trimmed"] < found["keep"]["freed"] - 256


@glibc_only
def test_the_environment_stays(found):
    assert found["tuned"]["variable"] is None
    assert found["asked"]["variable"] == "1"


@glibc_only
def test_env_says_whether_it_is_on(found):
    assert found["untouched"]["line"] == "glibc as it is; tune_allocator was not called"
    for case in ("tuned", "keep", "late"):
        assert found[case]["line"] == found[case]["reports"][-1][3]
    printed = CliRunner().invoke(cli.app, ["env"]).stdout
    assert "\nallocator " in printed


def no_library(*_):
    raise OSError("libc.so.6: cannot open shared object file")


STRANGE = {
    "macOS": ({"sys.platform": "darwin"}, "this system is darwin"),
    "Windows": ({"sys.platform": "win32"}, "this system is win32"),
    "no libc.so.6": ({"load_glibc": no_library}, "the C library is not glibc"),
    "no mallopt": ({"load_glibc": types.SimpleNamespace}, "the C library is not glibc"),
    "LD_PRELOAD": ({"find_address": id}, "another allocator was loaded"),
    "built in": ({"find_stranger": lambda: "this build of torch has an allocator of its own"}, "allocator of its own"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_where_it_can_do_nothing_it_says_so(monkeypatch, case):
    changes, reason = STRANGE[case]
    for name, value in changes.items():
        monkeypatch.setattr(f"anynorm.engine.allocator.{name}", value)
    before = allocator.done
    with pytest.warns(UserWarning, match=f"tune_allocator: nothing was done, because .*{reason}"):
        report = anynorm.tune_allocator()
    assert not report
    assert report.settings == {}
    assert reason in str(report)
    assert allocator.done is before
    assert allocator.HUGE_PAGES not in os.environ


@glibc_only
def test_a_refusal_is_said(monkeypatch):
    """As on 32 bits, where glibc takes a smaller threshold only."""
    glibc = types.SimpleNamespace(mallopt=lambda number, value: number != allocator.NUMBERS["M_MMAP_THRESHOLD"])
    monkeypatch.setattr(allocator, "load_glibc", lambda: glibc)
    monkeypatch.setattr(allocator, "find_obstacle", lambda: None)
    monkeypatch.setattr(allocator, "comes_in_huge_pages", lambda: True)  # Not asked for in the tests' own process.
    with pytest.warns(UserWarning, match="glibc does not take M_MMAP_THRESHOLD here"):
        assert not anynorm.tune_allocator()
