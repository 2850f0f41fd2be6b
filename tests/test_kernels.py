"""The compiled kernels: what they serve, sizes about the vectors, threads, forks, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import anynorm
from anynorm.engine import kernels, plain, walks
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


def walk_of(name: str, x: Tensor, sizes: tuple = (), given: int = 0) -> tuple[int, ...] | None:
    """n, g, k, s, channels last, pooled over n."""
    plan = walks.find_plan(pool(name, x, sizes), x.shape, x.stride(), x.dtype, given)
    return None if plan is None else plan.packed[:6]


def test_every_norm_of_the_family_has_a_walk():
    x = torch.empty(5, 6, 4, 3)
    last = x.to(memory_format=torch.channels_last)
    flat = torch.empty(5, 12)
    assert walk_of("batch", x) == (5, 6, 1, 12, 0, 1)
    assert walk_of("batch", last) == (60, 6, 1, 1, 0, 1)
    assert walk_of("batch", flat) == (5, 12, 1, 1, 0, 1)
    assert walk_of("batch", x, given=1) == walk_of("instance", x, given=1) == (5, 6, 1, 12, 0, 1)
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
    plan = kernels.find_walk(x, pooling)
    statistics = kernels.make_statistics(plan)
    y = kernels.forward(x, plan, weight, bias, 1e-5, statistics=statistics)
    true, moments = plain.forward(x, pooling, weight, bias, 1e-5)
    factor = 64 if x.dtype == torch.float64 else 4  # sums round as they go
    assert_close(y, wide(true), factor, "y", 4.0)
    found = kernels.backward(g, x, plan, weight, bias, statistics, 1e-5, (True, True, True, False))
    want = plain.backward(g, x, pooling, weight, moments, 1e-5, given=False, needs=(True, True, True))
    term = float(g.abs().max() * weight.abs().max() * moments.rstd(1e-5).max()) * 4
    assert_close(found[0], wide(want[0]), factor, "dx", term)
    for mine, its in zip(found[1:3], want[1:], strict=True):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_results_that_bypass_the_caches_have_the_same_bits(name, dtype):
    norms, x, g = find_large(name)
    x, g, holds = x.to(dtype), g.to(dtype), kernels.compiled.last_cache()
    try:
        for norm in norms:
            found = []
            for size in (holds, 1 << 40, 0):
                kernels.compiled.set_last_cache(size)
                found.append(everything(norm.to(dtype if dtype == torch.float64 else torch.float32), x, g))
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
    assert int(run(source)) < 4000


def test_one_openmp_runtime_is_mapped_and_it_is_torchs():
    maps = Path("/proc/self/maps")
    if not maps.exists() or not kernels.compiled.thread_runtime():
        pytest.skip("not on Linux, or torch without OpenMP")
    text = run(
        "import torch, anynorm, os; torch.randn(2000, 2000).sum(); anynorm.LayerNorm(500)(torch.randn(900, 500));"
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'omp' in os.path.basename(l.split()[-1])}));"
        "print(anynorm.engine.kernels.compiled.thread_runtime())"
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
plan = kernels.find_walk(x, pooling)
statistics = kernels.make_statistics(plan)
kernels.forward(x, plan, norm.weight, norm.bias, 1e-5, statistics=statistics)

def both():
    # Autograd itself refuses to run backward in a child, so the kernel is called.
    needs = (True, True, True, False)
    dx = kernels.backward(x, x, plan, norm.weight, None, statistics, 1e-5, needs)[0]
    return norm(x).numpy().tobytes() + dx.numpy().tobytes()

expected = both()
child = os.fork()
if child == 0:  # Nothing of torch's own that would wait for its threads.
    os._exit(0 if both() == expected else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(source) == "0"


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
    assert run(source) == "released"


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


GOOD = (2, 3, 1, 5, False, True, True, 0, 0, 0)


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ((0, *GOOD[1:]), "sizes"),
        ((2, -3, *GOOD[2:]), "sizes"),
        ((1 << 40, 1 << 40, *GOOD[2:]), "sizes"),
        ((2, 3, 2, *GOOD[3:]), "layout"),
        ((*GOOD[:7], 9, 0, 0), "dtype"),
        ((*GOOD[:7], 0, 3, 0), "given"),
        ((*GOOD[:9], 3), "sample_rows"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(plan, why):
    with pytest.raises(ValueError, match=f"kernels: .*{why}"):
        kernels.compiled.Plan(*plan)


def forward_at(**addresses: int) -> None:
    """A forward of 2 x 3 x 5 floats at made-up addresses, none of which may be touched."""
    at = {"x": 0x10000, "residual": 0, "y": 0x20000, "gamma": 0, "beta": 0, "mean": 0x30000, "m2": 0x40000, "weight": 0}
    at.update({"running_mean": 0x50000, "running_var": 0x60000, "counter": 0})
    at.update(addresses)
    kernels.compiled.forward(kernels.compiled.Plan(*GOOD), 1e-5, 1, 0, *at.values(), 0.1)


@pytest.mark.parametrize(
    ("addresses", "why"),
    [
        ({"x": 0}, "missing x"),
        ({"running_var": 0}, "missing running_mean or running_var"),
        ({"y": 0x10000 + 4}, "y shares memory with x"),
        ({"y": 0x10000 - 4 * 30 + 4}, "y shares memory with x"),
        ({"running_mean": 0x60000}, "running_mean shares memory with running_var"),
        ({"running_mean": 0x10000 + 16}, "running_mean shares memory with x|x"),
        ({"mean": 0x40000 + 16}, "mean shares memory with m2"),
        ({"residual": 0x20000}, "y shares memory with residual"),
        ({"gamma": 0x20000 + 4 * 29}, "y shares memory with gamma"),
    ],
    ids=str,
)
def test_addresses_that_overlap_are_refused(addresses, why):
    with pytest.raises(ValueError, match=f"kernels: .*({why})"):
        forward_at(**addresses)


def test_missing_gradients_are_refused():
    with pytest.raises(ValueError, match="missing grad"):
        kernels.compiled.backward(kernels.compiled.Plan(*GOOD), 1e-5, 1, 0, 0, 8, 0, 64, 0, 0, 0, 8, 8, 0, 0, 0)


def test_parameters_of_another_size_are_refused():
    x = torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="weight must have 6 elements"):
        kernels.forward(x, kernels.find_walk(x, pool("batch", x)), torch.ones(5), None, 1e-5)


def test_running_averages_hear_of_the_kernels():
    """They are written through their addresses, and autograd must notice (pytorch#175024)."""
    norm = anynorm.BatchNorm1d(3)
    before = norm.running_mean._version
    leaf = norm.running_mean.clone().requires_grad_()
    product = leaf * norm.running_mean
    norm(torch.randn(8, 3))
    assert norm.running_mean._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_statistics_alone_and_applied_later():
    """What synchronization and recalibration do in between; given means keep all digits of a double."""
    x = torch.randn(8, 6, 5, 5) + 1e4
    for layout in (torch.contiguous_format, torch.channels_last):
        moments = kernels.find_moments(x.to(memory_format=layout), pool("batch", x))
        mean, var = anynorm.reference.moments(wide(x), (0, 2, 3))
        assert abs(wide(moments.mean) - mean).max() < 1e-6 * 1e4
        assert abs(wide(moments.var) - var).max() < 1e-6
        laid = x.to(memory_format=layout)
        plan = kernels.find_walk(laid, pool("batch", x), 2)
        y = kernels.forward(laid, plan, None, None, 1e-5, (moments.mean.flatten(), moments.var.flatten()))
        assert_close(y, anynorm.reference.forward(wide(x), (0, 2, 3)), 4, "y")


ACTIVATED = ("relu", "leaky_relu", "silu", "gelu", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATED)
@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [
        ("batch", (6, 5, 7, 7), ()),
        ("batch", (19, 37), ()),
        ("instance", (3, 5, 50), ()),
        ("group", (3, 6, 4, 5), (("g", 2),)),
        ("layer", (9, 67), (("d", (67,)),)),
        ("rms", (9, 67), (("d", (67,)),)),
    ],
    ids=lambda v: str(v) if isinstance(v, str) else "x".join(map(str, v)) if v and isinstance(v[0], int) else "",
)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_what_follows_the_norm(name, shape, sizes, activation, dtype, last, with_residual):
    """Equals the formula in float64 and its derivatives by autograd, rounded once."""
    if activation is None and not with_residual:
        return compare_layouts(name, shape, sizes, dtype, last)
    generator = torch.Generator().manual_seed(2)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    x, g, residual = draw(*shape), draw(*shape), draw(*shape) if with_residual else None
    if last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    pooling = pool(name, x, sizes)
    channels = shape[1]
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = draw(channels).to(parameter), draw(channels).to(parameter) if name != "rms" else None
    plan = kernels.find_walk(x, pooling)
    statistics = kernels.make_statistics(plan)
    options = {"activation": activation, "residual": residual}
    y = kernels.forward(x, plan, weight, bias, 1e-5, statistics=statistics, **options)
    needs = (True, True, bias is not None, with_residual)
    found = kernels.backward(g, x, plan, weight, bias, statistics, 1e-5, needs, **options)
    leaves = [t if t is None else t.double().requires_grad_() for t in (x, weight, bias, residual)]
    true, _ = plain.compose(leaves[0], pooling, leaves[1], leaves[2], 1e-5, None, activation, leaves[3])
    factor = 64 if dtype == torch.float64 else 8
    assert_close(y, wide(true), factor, "y", 4.0)
    want = torch.autograd.grad(true, [t for t in leaves if t is not None], g.double())
    term = (
        4
        * float((g.abs().max() * weight.abs().max()).detach())
        * float(plain.compose(x.double(), pooling, None, None, 1e-5, None)[1].rstd(1e-5).max())
    )
    # The gradient before the activation is rounded to the dtype where it is kept, as between torch's own operations.
    half = torch.finfo(dtype).eps * 2 * term if dtype in (torch.bfloat16, torch.float16) else 0.0
    for what, got, its in zip(
        ("dx", "gamma", "beta", "residual"), [t for t in found if t is not None], want, strict=False
    ):
        error = abs(wide(got).reshape(-1) - wide(its).reshape(-1)).max()
        scale = max(term, float(its.abs().max()), 8 * float(g.abs().max()))
        assert error <= factor * torch.finfo(parameter).eps * scale + half + (
            torch.finfo(dtype).eps * float(its.abs().max())
        ), what


def compare_layouts(name: str, shape: tuple[int, ...], sizes: tuple, dtype: torch.dtype, last: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    if last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    compare(x, pool(name, x, sizes), shape[1], (shape[1],))


# ---- a weight for each position, which masks will use -------------------------------------------------------------


def run_weighted(plan: tuple, x: Tensor, g: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, activation: int):
    """y, dx, dgamma, dbeta, mean and m2 of a walk in which positions of weight 0 do not count."""
    walk = kernels.compiled.Plan(*plan)
    pools = plan[1] if plan[5] else plan[0] * plan[1]
    y, dx, dgamma, dbeta = torch.empty_like(x), torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(beta)
    mean, m2 = torch.empty(pools, dtype=torch.float64), torch.empty(pools, dtype=torch.float64)
    at = [t.data_ptr() for t in (x, g, y, dx, gamma, beta, mean, m2, weight, dgamma, dbeta)]
    x_at, g_at, y_at, dx_at, gamma_at, beta_at, mean_at, m2_at, weight_at, dgamma_at, dbeta_at = at
    kernels.compiled.forward(
        walk, 1e-5, 2, activation, x_at, 0, y_at, gamma_at, beta_at, mean_at, m2_at, weight_at, 0, 0, 0, 0.0
    )
    kernels.compiled.backward(
        walk, 1e-5, 2, activation, g_at, x_at, 0, dx_at, 0, gamma_at, beta_at, mean_at, m2_at, weight_at, dgamma_at,
        dbeta_at,
    )  # fmt: skip
    return y, dx, dgamma, dbeta, mean, m2


WEIGHTED = {
    "batch, rows": ((3, 4, 1, 70, False, True, True, 0, 0, 0), "n c s -> c"),
    "batch, columns": ((3 * 70, 4, 1, 1, False, True, True, 0, 0, 70), "n c s -> c"),
    "instance, rows": ((3, 4, 1, 70, False, False, True, 0, 0, 0), "n c s -> n c"),
    "instance, columns": ((3, 4, 1, 70, True, False, True, 0, 0, 0), "n c s -> n c"),
    "group, rows": ((3, 2, 2, 70, False, False, True, 0, 0, 0), "n g"),
    "group, columns": ((3, 2, 2, 70, True, False, True, 0, 0, 0), "n g"),
    "layer": ((3 * 70, 1, 4, 1, False, False, True, 0, 0, 0), "n s"),
}


def find_weighted(name: str, padding: int, activation: int = 0):
    """A case's results when the samples, 70, 33 and 1 long, are padded by NaN; positions first, as (n, s, c)."""
    plan, _ = WEIGHTED[name]
    generator = torch.Generator().manual_seed(3)
    x, g = (torch.randn(3, 70, 4, generator=generator) + 3 for _ in range(2))
    gamma, beta = (torch.randn(4, generator=generator) for _ in range(2))
    lengths = torch.tensor([70, 33, 1])
    length = 70 + padding
    weight = (torch.arange(length) < lengths[:, None]).float()
    x, g = (
        torch.nn.functional.pad(t, (0, 0, 0, padding)).masked_fill(weight[..., None] == 0, float("nan")) for t in (x, g)
    )
    sizes = [length if size == 70 else 3 * length if size == 210 else size for size in plan[:4]]
    plan = (*sizes, *plan[4:9], length if plan[9] else 0)
    is_last = plan[4] or "columns" in name or name == "layer"
    lay = (lambda t: t.contiguous()) if is_last else (lambda t: t.movedim(1, 2).contiguous())
    back = (lambda t: t) if is_last else (lambda t: t.movedim(2, 1))
    y, dx, *rest = run_weighted(plan, lay(x), lay(g), weight, gamma, beta, activation)
    return back(y), back(dx), rest, (x, g, gamma, beta, weight)


@pytest.mark.parametrize("activation", [0, 1, 4], ids=["", "relu", "gelu"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_positions_of_weight_0_do_not_count(name, activation):
    """Equals the formula over the real positions alone; NaN in the padding does not leak, its outputs are 0."""
    y, dx, (dgamma, dbeta, *_), (x, g, gamma, beta, weight) = find_weighted(name, 0, activation)
    kept = weight[..., None] > 0
    leaf, scale, shift = (t.double().requires_grad_() for t in (torch.where(kept, x, 0), gamma, beta))
    view, keep = leaf.view(3, 70, 2, 2), kept.double().view(3, 70, 1, 1)
    axes, size = {"b": ((0, 1), 1), "i": ((1,), 1), "g": ((1, 3), 2), "l": ((2, 3), 4)}[name[0]]
    along = tuple(a for a in axes if a < 2)
    count = ((keep.sum(along, keepdim=True) if along else keep) * size).clamp(min=1)
    mean = (view * keep).sum(axes, keepdim=True) / count
    var = ((view - mean).square() * keep).sum(axes, keepdim=True) / count
    true = ((view - mean) / (var + 1e-5).sqrt()).reshape(3, 70, 4) * scale + shift
    true = (true, torch.relu(true), None, None, torch.nn.functional.gelu(true))[activation] * kept
    want = torch.autograd.grad(true, (leaf, scale, shift), torch.where(kept, g, 0).double())
    assert (y[~kept.expand_as(y)] == 0).all()
    assert (dx[~kept.expand_as(dx)] == 0).all()
    assert_close(y, wide(true), 8, "y", 4.0)
    term = float(g.nan_to_num().abs().max() * gamma.abs().max()) * float((1 / (var + 1e-5).sqrt()).max()) * 4
    for what, got, its in zip(("dx", "dgamma", "dbeta"), (dx, dgamma, dbeta), want, strict=True):
        assert_close(got, wide(its), 8, what, term)


@pytest.mark.parametrize("name", WEIGHTED)
def test_more_padding_changes_no_bit(name):
    short, long = find_weighted(name, 0), find_weighted(name, 4000)
    for mine, its in zip(short[:2], long[:2], strict=True):
        assert torch.equal(mine, its[:, :70])
    if name != "layer":  # whose gradients of gamma and beta are summed in chunks of rows, padded or not
        assert torch.equal(short[2][0], long[2][0])
        assert torch.equal(short[2][1], long[2][1])


def test_nothing_that_counts_changes_nothing():
    x, weight = torch.randn(2, 3, 40), torch.zeros(2, 40)
    running = torch.randn(3), torch.rand(3)
    before = [t.clone() for t in running]
    counter = torch.tensor(5)
    y, mean, m2 = torch.empty_like(x), torch.empty(3, dtype=torch.float64), torch.empty(3, dtype=torch.float64)
    at = [t.data_ptr() for t in (x, y, mean, m2, weight, *running, counter)]
    plan = kernels.compiled.Plan(2, 3, 1, 40, False, True, True, 0, 0, 0)
    kernels.compiled.forward(plan, 1e-5, 1, 0, at[0], 0, at[1], 0, 0, at[2], at[3], at[4], at[5], at[6], at[7], 0.1)
    assert (y == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))
    assert counter == 5
