"""What the compiled module refuses before it touches memory, and what autograd hears of what it wrote."""

from __future__ import annotations

import pytest
import torch

import anynorm
from anynorm.engine import kernels
from anynorm.engine.request import Request
from kernel_cases import make_pooling

pytestmark = pytest.mark.skipif(bool(kernels.OFF), reason=f"kernels are off: {kernels.OFF}")


GOOD = {
    "n": 2, "g": 3, "k": 1, "s": 5, "channels_last": False, "pool_n": True, "centred": True, "dtype": 0,
    "statistics": 0, "sample_rows": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"n": 0}, "sizes"),
        ({"g": -3}, "sizes"),
        ({"n": 1 << 40, "g": 1 << 40}, "sizes"),
        ({"k": 2}, "layout"),
        ({"dtype": 9}, "dtype"),
        ({"statistics": 3}, "given"),
        ({"statistics": 1, "pool_n": False}, "given statistics are one per channel"),
        ({"sample_rows": 3}, "sample_rows"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(sizes, why):
    with pytest.raises(ValueError, match=f"kernels: .*{why}"):
        kernels.compiled.Plan(**(GOOD | sizes))


def forward_at(plan: dict[str, int], **addresses: int) -> None:
    """A forward of 2 x 3 x 5 floats at made-up addresses, none of which may be touched."""
    at = {"x": 0x10000, "y": 0x20000, "mean": 0x30000, "m2": 0x40000, "running_mean": 0x50000, "running_var": 0x60000}
    options = {"threads": 1, "eps": 1e-5, "momentum": 0.1} | at | addresses
    kernels.compiled.forward(kernels.compiled.Plan(**(GOOD | plan)), **options)


@pytest.mark.parametrize(
    ("addresses", "why"),
    [
        ({"x": 0}, "missing x"),
        ({"y": 0}, "missing x or y"),
        ({"running_var": 0}, "missing running_mean or running_var"),
        ({"momentum": -0.1}, "momentum must not be negative"),
        ({"threads": 0}, "threads must be positive"),
        ({"activation": 12}, "activation"),
        ({"y": 0x10000 + 4}, "y shares memory with x"),
        ({"y": 0x10000 - 4 * 30 + 4}, "y shares memory with x"),
        ({"running_mean": 0x60000}, "running_mean shares memory with running_var"),
        ({"running_mean": 0x10000 + 16}, "running_mean shares memory with x|x"),
        ({"mean": 0x40000 + 16}, "mean shares memory with m2"),
        ({"residual": 0x20000}, "y shares memory with residual"),
        ({"gamma": 0x20000 + 4 * 29}, "y shares memory with gamma"),
        ({"mask": 0x20000 - 4 * 9}, "y shares memory with mask"),
    ],
    ids=str,
)
def test_addresses_that_overlap_or_are_missing_are_refused(addresses, why):
    with pytest.raises(ValueError, match=f"kernels: .*({why})"):
        forward_at({}, **addresses)


def test_given_statistics_take_a_variance_and_move_nothing():
    given, nothing = {"statistics": 1}, {"running_mean": 0, "running_var": 0}
    for addresses in ({}, {"m2": 0}, {"m2": 0, "mean": 0, "var": 0x70000}):
        with pytest.raises(ValueError, match="missing given statistics"):
            forward_at(given, **addresses, **nothing)
    with pytest.raises(ValueError, match="missing statistics of this batch for the running averages"):
        forward_at(given, m2=0, var=0x70000)


@pytest.mark.parametrize("missing", ["x", "mean", "m2"])
def test_statistics_alone_need_an_address_each(missing):
    at = {"x": 0x10000, "mean": 0x30000, "m2": 0x40000} | {missing: 0}
    with pytest.raises(ValueError, match="missing x, mean or m2"):
        kernels.compiled.statistics(kernels.compiled.Plan(**GOOD), threads=1, **at)


@pytest.mark.parametrize(("missing", "why"), [("grad", "grad or x"), ("x", "grad or x"), ("m2", "mean or m2")])
def test_missing_gradients_are_refused(missing, why):
    at = {"grad": 0x10000, "x": 0x20000, "dx": 0x30000, "mean": 0x40000, "m2": 0x50000} | {missing: 0}
    with pytest.raises(ValueError, match=f"missing {why}"):
        kernels.compiled.backward(kernels.compiled.Plan(**GOOD), threads=1, eps=1e-5, **at)


def test_arguments_are_named():
    plan = kernels.compiled.Plan(**GOOD)
    for call in (
        lambda: kernels.compiled.forward(plan, 1, 1e-5, 0, 0x10000),
        lambda: kernels.compiled.forward(plan, threads=1, eps=1e-5, x=0x10000, y=0x20000, weight=0x30000),
        lambda: kernels.compiled.Plan(*GOOD.values()),
    ):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            call()


def test_parameters_of_another_size_are_refused():
    x = torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="weight must have 6 elements"):
        kernels.forward(x, torch.ones(5), None, None, Request(), kernels.find_plan(x, make_pooling("batch", x)))


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
