"""The compiled kernels in a process: threads, forks, Python's lock, pages, caches and instruction sets."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from anynorm.engine import kernels
from kernel_cases import LARGE, compute_all, make_large, run_python

pytestmark = pytest.mark.skipif(bool(kernels.OFF), reason=f"kernels are off: {kernels.OFF}")


@pytest.mark.parametrize("name", LARGE)
def test_any_number_of_threads_gives_the_same_bits(name):
    norms, x, g = make_large(name)
    before = torch.get_num_threads()
    try:
        for norm in norms:
            found = []
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                found.append(compute_all(norm, x, g))
            assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))
    finally:
        torch.set_num_threads(before)


def test_several_python_threads_at_once():
    cases = [make_large(name) for name in LARGE]
    expected = [[compute_all(norm, x, g) for norm in norms] for norms, x, g in cases]
    wrong: list[str] = []

    def work(index: int) -> None:
        norms, x, g = cases[index % len(cases)]
        for _ in range(3):
            for norm, want in zip(norms, expected[index % len(cases)], strict=True):
                if not all(torch.equal(a, b) for a, b in zip(compute_all(norm, x, g), want, strict=True)):
                    wrong.append(type(norm).__name__)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_the_gil_is_released():
    """Nobody is ever made to give the lock away, so the second thread runs only while a kernel has released it; were it
    held, the first would call kernels for ever."""
    source = """
import sys, threading, torch, anynorm
sys.setswitchinterval(1e6)
x, norm, done = torch.randn(64, 64, 56, 56), anynorm.BatchNorm2d(64).requires_grad_(False), threading.Event()
leaf = x.clone().requires_grad_()
threading.Thread(target=done.set).start()
calls = 0
while not done.is_set():
    norm(x)
    calls += 1
print("released")
"""
    assert run_python(source) == "released"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_works_alone():
    """Its parent's threads are not there; to wait for them would be for ever."""
    source = """
import os, torch, anynorm
from anynorm.engine import kernels
from anynorm.engine.request import Request
from anynorm.pooling import find_pooling
torch.set_num_threads(2)
x, norm = torch.randn(64, 64, 40, 40), anynorm.BatchNorm2d(64).requires_grad_(False)
pooling = find_pooling("n c s -> c", "c", True, 4)
plan = kernels.find_plan(x, pooling)
statistics = kernels.forward(x, norm.weight, norm.bias, None, Request(), plan, keep=True)[1]

def both():
    # Autograd itself refuses to run backward in a child, so the kernel is called.
    needs = (True, True, True, False)
    dx = kernels.backward(x, kernels.Saved(x, norm.weight, None, None, None, statistics), plan, 1e-5, None, needs)[0]
    return norm(x).numpy().tobytes() + dx.numpy().tobytes()

expected = both()
child = os.fork()
if child == 0:  # Nothing of torch's own that would wait for its threads.
    os._exit(0 if both() == expected else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(source) == "0"


def test_one_openmp_runtime_is_mapped_and_it_is_torchs():
    maps = Path("/proc/self/maps")
    if not maps.exists() or not kernels.compiled.thread_runtime():
        pytest.skip("not on Linux, or torch without OpenMP")
    text = run_python(
        "import torch, anynorm, os; torch.randn(2000, 2000).sum(); anynorm.LayerNorm(500)(torch.randn(900, 500));"
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'omp' in os.path.basename(l.split()[-1])}));"
        "print(anynorm.engine.kernels.compiled.thread_runtime())"
    )
    count, path = text.splitlines()
    assert count == "1"
    assert str(Path(torch.__file__).parent) in path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_results_that_bypass_the_caches_have_the_same_bits(name, dtype):
    norms, x, g = make_large(name)
    x, g, holds = x.to(dtype), g.to(dtype), kernels.compiled.last_cache()
    try:
        for norm in norms:
            found = []
            for size in (holds, 1 << 40, 0):
                kernels.compiled.set_last_cache(size)
                found.append(compute_all(norm.to(dtype if dtype == torch.float64 else torch.float32), x, g))
            assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))
    finally:
        kernels.compiled.set_last_cache(holds)


def lends_huge_pages() -> bool:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return enabled.exists() and "[never]" not in enabled.read_text()


@pytest.mark.skipif(not lends_huge_pages(), reason="this system lends no huge pages")
def test_a_large_result_costs_few_page_faults():
    """67 MB are 16,385 pages of 4 KB, or 32 of 2 MB and some at both ends."""
    source = """
import resource, torch, anynorm
x = torch.zeros(1 << 14, 1 << 10)
anynorm.functional.layer_norm(x[:8], [1 << 10])
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
y = anynorm.functional.layer_norm(x, [1 << 10])
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    assert int(run_python(source)) < 4000


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_of_this_machine(isa):
    if isa not in kernels.compiled.instruction_sets():
        pytest.skip(f"no {isa} here")
    source = """
import torch, anynorm
from anynorm import reference
from anynorm.engine import kernels
assert not kernels.OFF, kernels.OFF
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    x = (torch.randn(6, 8, 5, 7, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = anynorm.GroupNorm(2, 8, affine=False)(x.to(memory_format=layout)).double()
        true = reference.forward(x.double().reshape(6, 2, 4, 5, 7).numpy(), (2, 3, 4)).reshape(x.shape)
        assert abs(y.numpy() - true).max() < 3 * torch.finfo(dtype).eps * abs(true).max()
print(kernels.compiled.instruction_set())
"""
    assert run_python(source, ANYNORM_ISA=isa) == isa


def test_an_unknown_instruction_set_is_said_aloud():
    text = run_python("from anynorm.engine import kernels; print(kernels.OFF)", ANYNORM_ISA="mmx")
    assert text.startswith("ANYNORM_ISA=mmx: this machine has")


def test_kernels_can_be_turned_off():
    assert (
        run_python("from anynorm.engine import kernels; print(kernels.OFF)", ANYNORM_KERNELS="0") == "ANYNORM_KERNELS=0"
    )
