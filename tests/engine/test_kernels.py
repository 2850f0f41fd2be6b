"""The compiled kernels: what they serve, sizes about the vectors, and what follows a norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import anynorm
from anynorm.engine import kernels, plain, walks
from anynorm.engine.request import Request
from anynorm.pooling import Pooling
from anynorm.sources import Given
from fused_specimens import TORCHS
from kernel_cases import LARGE, make_large, make_pooling
from specimens import assert_close, wide

pytestmark = pytest.mark.skipif(bool(kernels.OFF), reason=f"kernels are off: {kernels.OFF}")


def find_layout(name: str, x: Tensor, sizes: tuple = (), given: int = 0) -> tuple[int, ...] | None:
    """n, g, k, s, channels last, pooled over n."""
    plan = walks.make_plan(make_pooling(name, x, sizes), x.shape, x.stride(), x.dtype, given)
    return None if plan is None else plan.layout[:6]


def test_every_norm_of_the_family_has_a_walk():
    x = torch.empty(5, 6, 4, 3)
    last = x.to(memory_format=torch.channels_last)
    flat = torch.empty(5, 12)
    assert find_layout("batch", x) == (5, 6, 1, 12, 0, 1)
    assert find_layout("batch", last) == (60, 6, 1, 1, 0, 1)
    assert find_layout("batch", flat) == (5, 12, 1, 1, 0, 1)
    assert find_layout("batch", x, given=1) == find_layout("instance", x, given=1) == (5, 6, 1, 12, 0, 1)
    assert find_layout("instance", x) == (5, 6, 1, 12, 0, 0)
    assert find_layout("instance", last) == (5, 6, 1, 12, 1, 0)
    assert find_layout("group", x, (("g", 3),)) == (5, 3, 2, 12, 0, 0)
    assert find_layout("group", last, (("g", 3),)) == (5, 3, 2, 12, 1, 0)
    assert find_layout("layer", flat, (("d", (12,)),)) == (5, 1, 12, 1, 0, 0)
    assert find_layout("rms", x, (("d", (4, 3)),)) == (30, 1, 12, 1, 0, 0)


def test_what_has_no_walk_goes_to_the_plain_path():
    assert (
        find_layout("layer", torch.empty(5, 6, 4, 3).to(memory_format=torch.channels_last), (("d", (6, 4, 3)),)) is None
    )
    assert find_layout("batch", torch.empty(5, 6, 8)[..., ::2]) is None
    norm = anynorm.AnyNorm("n c l -> n l", affine="c", c=6)
    assert norm(torch.randn(5, 6, 8)).shape == (5, 6, 8)


def compare(x: Tensor, pooling: Pooling, channels: int, shape: tuple[int, ...]) -> None:
    """Kernels and plain path agree, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(shape, generator=generator).to(x.dtype) for _ in range(2))
    if not pooling.centred:
        bias = None
    g = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    plan = kernels.find_plan(x, pooling)
    y, statistics = kernels.forward(x, weight, bias, None, Request(), plan, keep=True)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias) if t is not None]
    true, moments = plain.compose(*leaves, *[None] * (4 - len(leaves)), Request(), pooling)
    factor = 64 if x.dtype == torch.float64 else 4  # sums round as they go
    assert_close(y, wide(true), factor, "y", 4.0)
    found = kernels.backward(
        g, kernels.Saved(x, weight, bias, None, None, statistics), plan, 1e-5, None, (True, True, True, False)
    )
    want = torch.autograd.grad(true, leaves, g.double())
    term = float(g.abs().max() * weight.abs().max() * moments.rstd(1e-5).max()) * 4
    assert_close(found[0], wide(want[0]), factor, "dx", term)
    for mine, its in zip(found[1 : len(leaves)], want[1:], strict=True):
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
    compare(flat, make_pooling("batch", flat), size, (size,))
    compare(rows, make_pooling("batch", rows), 4, (4,))
    compare(rows, make_pooling("group", rows, (("g", 2),)), 4, (4,))
    for name in ("layer", "rms"):
        compare(flat, make_pooling(name, flat, (("d", (size,)),)), size, (size,))
    for x in (image, last):
        compare(x, make_pooling("batch", x), size, (size,))
        compare(x, make_pooling("instance", x), size, (size,))
        compare(x, make_pooling("group", x, (("g", 1),)), size, (size,))
    if size > 1:
        compare(rows, make_pooling("instance", rows), 4, (4,))


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("ratio", [0.0, 1e4])
def test_large_inputs_equal_the_plain_path(name, ratio):
    """Walks in two passes, and sums that are taken again about the mean."""
    _, x, _ = make_large(name)
    x = x + ratio
    compare(x, make_pooling("batch", x), x.shape[1], (x.shape[1],))
    compare(x, make_pooling("group", x, (("g", 2 - x.shape[1] % 2),)), x.shape[1], (x.shape[1],))


def test_statistics_alone_and_applied_later():
    """What synchronization and recalibration do in between; given means keep all digits of a double."""
    x = torch.randn(8, 6, 5, 5) + 1e4
    for layout in (torch.contiguous_format, torch.channels_last):
        moments = kernels.find_moments(x.to(memory_format=layout), make_pooling("batch", x))
        mean, var = anynorm.reference.moments(wide(x), (0, 2, 3))
        assert abs(wide(moments.mean) - mean).max() < 1e-6 * 1e4
        assert abs(wide(moments.var) - var).max() < 1e-6
        laid = x.to(memory_format=layout)
        plan = kernels.find_plan(laid, make_pooling("batch", x), 2)
        given = Given(moments.mean.flatten(), moments.var.flatten())
        y, _ = kernels.forward(laid, None, None, None, Request(given), plan)
        assert_close(y, anynorm.reference.forward(wide(x), (0, 2, 3)), 4, "y")


def test_tensors_that_only_note_their_sign_or_zeros():
    """x.imag of a conjugate holds -x in memory; a zero tensor holds nothing."""
    z = torch.randn(4, 8, dtype=torch.complex64)
    negative = torch.imag(z.conj())
    assert negative.is_neg()
    norm = anynorm.LayerNorm(8)
    torch.testing.assert_close(norm(negative), norm(-torch.imag(z).clone()))
    zeros = torch._efficientzerotensor((4, 8))
    assert (norm(zeros) == norm.bias).all()


ACTIVATED = (*TORCHS, None)


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
    pooling = make_pooling(name, x, sizes)
    channels = shape[1]
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = draw(channels).to(parameter), draw(channels).to(parameter) if name != "rms" else None
    plan = kernels.find_plan(x, pooling)
    request = Request(activation=activation)
    y, statistics = kernels.forward(x, weight, bias, residual, request, plan, keep=True)
    needs = (True, True, bias is not None, with_residual)
    found = kernels.backward(
        g, kernels.Saved(x, weight, bias, residual, None, statistics), plan, 1e-5, activation, needs
    )
    leaves = [t if t is None else t.double().requires_grad_() for t in (x, weight, bias, residual)]
    true, _ = plain.compose(*leaves, request, pooling)
    factor = 64 if dtype == torch.float64 else 8
    assert_close(y, wide(true), factor, "y", 4.0)
    want = torch.autograd.grad(true, [t for t in leaves if t is not None], g.double())
    term = (
        4
        * float((g.abs().max() * weight.abs().max()).detach())
        * float(plain.compose(x.double(), None, None, None, Request(), pooling)[1].rstd(1e-5).max().detach())
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
    compare(x, make_pooling(name, x, sizes), shape[1], (shape[1],))
