"""The compiled kernels: what they serve, sizes about the vectors, threads, forks, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import anynorm
from anynorm import kernels, plain
from anynorm.family import FAMILY
from anynorm.pooling import Pooling, find_pooling
from specimens import assert_close, wide

pytestmark = pytest.mark.skipif(bool(kernels.OFF), reason=f"kernels are off: {kernels.OFF}")


def run(source: str, **environment: str) -> str:
    """What a fresh Python prints."""
    found = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def pool(name: str, x: Tensor, sizes: tuple = ()) -> Pooling:
    scheme = FAMILY[name]
    return find_pooling(scheme.pattern, scheme.affine, scheme.centred, x.dim(), sizes)


def walk_of(name: str, x: Tensor, sizes: tuple = (), given: bool = False) -> tuple[int, ...] | None:
    """n, g, k, s, channels last, pooled over n."""
    plan = kernels.find_plan(pool(name, x, sizes), x.shape, x.stride(), x.dtype, given)
    return None if plan is None else plan.packed[:6]


def test_every_norm_of_the_family_has_a_walk():
    x = torch.empty(5, 6, 4, 3)
    last = x.to(memory_format=torch.channels_last)
    flat = torch.empty(5, 12)
    assert walk_of("batch", x) == (5, 6, 1, 12, 0, 1)
    assert walk_of("batch", last) == (60, 6, 1, 1, 0, 1)
    assert walk_of("batch", flat) == (5, 12, 1, 1, 0, 1)
    assert walk_of("batch", x, given=True) == walk_of("instance", x, given=True) == (5, 6, 1, 12, 0, 1)
    assert walk_of("instance", x) == (5, 6, 1, 12, 0, 0)
    assert walk_of("instance", last) == (5, 6, 1, 12, 1, 0)
    assert walk_of("group", x, (("g", 3),)) == (5, 3, 2, 12, 0, 0)
    assert walk_of("group", last, (("g", 3),)) == (5, 3, 2, 12, 1, 0)
    assert walk_of("layer", flat, (("d", (12,)),)) == (5, 1, 12, 1, 0, 0)
    assert walk_of("rms", x, (("d", (4, 3)),)) == (30, 1, 12, 1, 0, 0)


def test_what_has_no_walk_goes_to_the_plain_path():
    assert walk_of("layer", torch.empty(5, 6, 4, 3).to(memory_format=torch.channels_last), (("d", (6, 4, 3)),)) is None
    assert walk_of("batch", torch.empty(5, 6, 8)[..., ::2]) is None
    norm = anynorm.AnyNorm("n c l -> n l", affine="c", c=6)
    assert norm(torch.randn(5, 6, 8)).shape == (5, 6, 8)


def compare(x: Tensor, pooling: Pooling, channels: int, shape: tuple[int, ...]) -> None:
    """Kernels and plain path agree, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(shape, generator=generator).to(x.dtype) for _ in range(2))
    if not pooling.centred:
        bias = None
    g = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    ours, theirs = (path.forward(x, pooling, weight, bias, 1e-5) for path in (kernels, plain))
    factor = 64 if x.dtype == torch.float64 else 4  # no wider type to compute in: both round as they go
    assert_close(ours[0], wide(theirs[0]), factor, "y", 4.0)
    backs = [
        path.backward(g, x, pooling, weight, moments, 1e-5, given=False, needs=(True, True, True))
        for path, (_, moments) in ((kernels, ours), (plain, theirs))
    ]
    term = float(g.abs().max() * weight.abs().max() * theirs[1].rstd(1e-5).max()) * 4
    assert_close(backs[0][0], wide(backs[1][0]), factor, "dx", term)
    for mine, its in zip(backs[0][1:], backs[1][1:], strict=True):
        assert_close(mine.reshape(-1), wide(its).reshape(-1), factor, "parameters", 8 * float(g.abs().max()))


SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 49, 63, 65, 127, 128, 129)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_about_the_vectors(size, dtype):
    generator = torch.Generator().manual_seed(size)

    def draw(*shape: int) -> Tensor:
        """Values that start in the middle of a vector."""
        count = torch.Size(shape).numel()
        return torch.randn(count + 1, generator=generator, dtype=torch.float64).to(dtype)[1:].view(shape)

    flat, rows, image = draw(9, size), draw(3, 4, size), draw(2, size, 3, 5)
    last = image.to(memory_format=torch.channels_last)
    compare(flat, pool("batch", flat), size, (size,))
    compare(rows, pool("batch", rows), 4, (4,))
    compare(rows, pool("group", rows, (("g", 2),)), 4, (4,))
    for name in ("layer", "rms"):
        compare(flat, pool(name, flat, (("d", (size,)),)), size, (size,))
    for x in (image, last):
        compare(x, pool("batch", x), size, (size,))
        compare(x, pool("instance", x), size, (size,))
        compare(x, pool("group", x, (("g", 1),)), size, (size,))
    if size > 1:
        compare(rows, pool("instance", rows), 4, (4,))


LARGE = {
    "rows, few and long": ((2, 3, 70_000), None),
    "rows, many": ((8, 64, 30, 30), None),
    "columns, few rows": ((30, 600), None),
    "columns, many rows": ((4, 40, 80, 100), torch.channels_last),
}


def everything(norm: torch.nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = norm(leaf)
    return [y, *torch.autograd.grad(y, [leaf, *norm.parameters()], g)]


def find_large(name: str) -> tuple[list[torch.nn.Module], Tensor, Tensor]:
    shape, layout = LARGE[name]
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=generator) for _ in range(2))
    if layout is not None:
        x, g = x.to(memory_format=layout), g.to(memory_format=layout)
    c = shape[1]
    kinds = {2: anynorm.BatchNorm1d, 3: anynorm.BatchNorm1d, 4: anynorm.BatchNorm2d}
    norms = [kinds[len(shape)](c), anynorm.GroupNorm(1, c), anynorm.LayerNorm(shape[-1]), anynorm.RMSNorm(shape[-1])]
    return norms, x, g


@pytest.mark.parametrize("name", LARGE)
def test_any_number_of_threads_gives_the_same_bits(name):
    norms, x, g = find_large(name)
    before = torch.get_num_threads()
    try:
        for norm in norms:
            found = []
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                found.append(everything(norm, x, g))
            assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("ratio", [0.0, 1e4])
def test_large_inputs_equal_the_plain_path(name, ratio):
    """Walks in two passes, and sums that are taken again about the mean."""
    _, x, _ = find_large(name)
    x = x + ratio
    compare(x, pool("batch", x), x.shape[1], (x.shape[1],))
    compare(x, pool("group", x, (("g", 2 - x.shape[1] % 2),)), x.shape[1], (x.shape[1],))


def test_one_openmp_runtime_is_mapped_and_it_is_torchs():
    maps = Path("/proc/self/maps")
    if not maps.exists() or not kernels.compiled.thread_runtime():
        pytest.skip("not on Linux, or torch without OpenMP")
    text = run(
        "import torch, anynorm, os; torch.randn(2000, 2000).sum(); anynorm.LayerNorm(500)(torch.randn(900, 500));"
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'omp' in os.path.basename(l.split()[-1])}));"
        "print(anynorm.kernels.compiled.thread_runtime())"
    )
    count, path = text.splitlines()
    assert count == "1"
    assert str(Path(torch.__file__).parent) in path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_works_alone():
    """Its parent's threads are not there; to wait for them would be for ever."""
    source = """
import os, torch, anynorm
from anynorm import kernels
from anynorm.pooling import find_pooling
torch.set_num_threads(2)
x, norm = torch.randn(64, 64, 40, 40), anynorm.BatchNorm2d(64).requires_grad_(False)
pooling = find_pooling("n c s -> c", "c", True, 4)
moments = kernels.forward(x, pooling, norm.weight, norm.bias, 1e-5)[1]

def both():
    # Autograd itself refuses to run backward in a child, so the kernel is called.
    options = {"given": False, "needs": (True, True, True)}
    dx = kernels.backward(x, x, pooling, norm.weight, moments, 1e-5, **options)[0]
    return norm(x).numpy().tobytes() + dx.numpy().tobytes()

expected = both()
child = os.fork()
if child == 0:  # Nothing of torch's own that would wait for its threads.
    os._exit(0 if both() == expected else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(source) == "0"


def test_the_gil_is_released():
    """While a kernel runs another thread counts; were the lock held, it would count to nothing."""
    x, norm = torch.randn(64, 64, 112, 112), anynorm.BatchNorm2d(64)
    y = torch.empty_like(x)
    plan = kernels.find_plan(pool("batch", x), x.shape, x.stride(), x.dtype, False)
    mean, m2 = torch.empty(64, dtype=torch.float64), torch.empty(64, dtype=torch.float64)
    counted, running = [0], threading.Event()
    stop = threading.Event()

    def count() -> None:
        running.set()
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # Nobody is made to give the lock away.
    thread = threading.Thread(target=count)
    try:
        thread.start()
        running.wait()
        gained = 0
        for _ in range(5):
            before = counted[0]
            kernels.compiled.forward(
                plan.packed, 1e-5, 1, x.data_ptr(), y.data_ptr(), 0, 0, mean.data_ptr(), m2.data_ptr()
            )
            gained += counted[0] - before
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert gained > 50
    assert norm.training


def test_several_python_threads_at_once():
    cases = [find_large(name) for name in LARGE]
    expected = [[everything(norm, x, g) for norm in norms] for norms, x, g in cases]
    wrong: list[str] = []

    def work(index: int) -> None:
        norms, x, g = cases[index % len(cases)]
        for _ in range(3):
            for norm, want in zip(norms, expected[index % len(cases)], strict=True):
                if not all(torch.equal(a, b) for a, b in zip(everything(norm, x, g), want, strict=True)):
                    wrong.append(type(norm).__name__)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_of_this_machine(isa):
    if isa not in kernels.compiled.instruction_sets():
        pytest.skip(f"no {isa} here")
    source = """
import torch, anynorm
from anynorm import kernels, plain, reference
assert not kernels.OFF, kernels.OFF
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    x = (torch.randn(6, 8, 5, 7, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = anynorm.GroupNorm(2, 8, affine=False)(x.to(memory_format=layout)).double()
        true = reference.forward(x.double().reshape(6, 2, 4, 5, 7).numpy(), (2, 3, 4)).reshape(x.shape)
        assert abs(y.numpy() - true).max() < 3 * torch.finfo(dtype).eps * abs(true).max()
print(kernels.compiled.instruction_set())
"""
    assert run(source, ANYNORM_ISA=isa) == isa


def test_an_unknown_instruction_set_is_said_aloud():
    text = run("from anynorm import kernels; print(kernels.OFF)", ANYNORM_ISA="mmx")
    assert text.startswith("ANYNORM_ISA=mmx: this machine has")


def test_kernels_can_be_turned_off():
    assert run("from anynorm import kernels; print(kernels.OFF)", ANYNORM_KERNELS="0") == "ANYNORM_KERNELS=0"


def test_tensors_that_only_note_their_sign_or_zeros():
    """x.imag of a conjugate holds -x in memory; a zero tensor holds nothing."""
    z = torch.randn(4, 8, dtype=torch.complex64)
    negative = torch.imag(z.conj())
    assert negative.is_neg()
    norm = anynorm.LayerNorm(8)
    torch.testing.assert_close(norm(negative), norm(-torch.imag(z).clone()))
    zeros = torch._efficientzerotensor((4, 8))
    assert (norm(zeros) == norm.bias).all()


GOOD = (2, 3, 1, 5, 0, 1, 1, 0)


@pytest.mark.parametrize(
    "plan",
    [(0, *GOOD[1:]), (2, -3, *GOOD[2:]), (1 << 40, 1 << 40, *GOOD[2:]), (*GOOD[:7], 9), (2, 3, 2, *GOOD[3:]), GOOD[:7]],
)
def test_sizes_that_do_not_fit_are_refused(plan):
    with pytest.raises(ValueError, match="kernels"):
        kernels.compiled.forward(plan, 1e-5, 1, 8, 8, 0, 0, 8, 8)


def test_missing_pointers_are_refused():
    with pytest.raises(ValueError, match="missing tensor"):
        kernels.compiled.forward(GOOD, 1e-5, 1, 0, 8, 0, 0, 8, 8)
    with pytest.raises(ValueError, match="missing tensor"):
        kernels.compiled.backward(GOOD, 1e-5, 1, False, 8, 0, 8, 0, 8, 8, 0, 0)


def test_parameters_of_another_size_are_refused():
    x = torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="5 elements where 6"):
        kernels.forward(x, pool("batch", x), torch.ones(5), None, 1e-5)
