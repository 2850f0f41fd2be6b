"""The weight of a new batch, and how much of the start is left, in the dtype of statistics whatever comes in."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn

import anynorm
from anynorm import functional
from anynorm.sources import find_momentum

PACKED = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 3, 2), torch.tensor([3, 3, 2, 1]), batch_first=True)
BATCHES = {
    "plain": (torch.randn(4, 2, 3), {}),
    "mask": (torch.randn(4, 2, 3), {"mask": torch.ones(4, 3, dtype=torch.bool)}),
    "mask of numbers": (torch.randn(4, 2, 3), {"mask": torch.ones(4, 3)}),
    "lengths": (torch.randn(4, 2, 3), {"lengths": torch.tensor([3, 3, 2, 1])}),
    "packed": (PACKED, {}),
}


@pytest.mark.parametrize("momentum", [0.001, 0.1, None])
@pytest.mark.parametrize("form", BATCHES)
@pytest.mark.parametrize("kind", ["BatchRenorm1d", "BatchRenormAct1d"])
def test_the_share_of_the_start_is_found_wide(kind, form, momentum):
    """Defect: momentum times a bool was float32, and outputs with a mask of ones were off by 1e-3."""
    norm = getattr(anynorm, kind)(2, momentum=momentum, warmup=(0, 0, 0))
    x, options = BATCHES[form]
    for batches in range(1, 4):
        norm(x, **options)
        want = 0.0 if momentum is None else (1 - momentum) ** batches
        assert float(norm.start_share) == pytest.approx(want, rel=1e-15)


def test_a_batch_of_nothing_leaves_the_share():
    norm = anynorm.BatchRenorm1d(2, warmup=(0, 0, 0))
    norm(torch.randn(4, 2, 3), mask=torch.zeros(4, 3, dtype=torch.bool))
    assert norm.extra_state() == {"batches": 0, "start_share": 1.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["BatchRenorm1d", "BatchRenormAct1d"])
def test_a_module_in_half_precision_keeps_a_wide_share(kind, dtype):
    """In bfloat16 a share of 1 would never leave 1 at a momentum of 0.001."""
    norm = getattr(anynorm, kind)(2, momentum=0.001, warmup=(0, 0, 0)).to(dtype)
    assert norm.start_share.dtype == torch.float64 and norm.running_mean.dtype == dtype
    for twin in (norm, copy.deepcopy(norm), copy.deepcopy(norm).float().to(dtype)):
        for _ in range(3):
            twin(torch.randn(4, 2, 3, dtype=dtype), mask=torch.ones(4, 3, dtype=torch.bool))
        assert twin.extra_state() == {"batches": 3, "start_share": pytest.approx(0.999**3, rel=1e-15)}
    empty = getattr(anynorm, kind)(2, device="meta").to(dtype)
    assert empty.start_share.is_meta and empty.to_empty(device="cpu").start_share.dtype == torch.float64


@pytest.mark.parametrize("default", [torch.float32, torch.float16, torch.float64], ids=str)
def test_the_schedule_does_not_depend_on_the_default_dtype(default):
    norm = anynorm.BatchRenorm1d(2, dtype=torch.float32, warmup=(0, 30_000, 30_000), r_max=4.0, d_max=3.0)
    norm.batches.fill_(10_000)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        r_max, d_max = norm.find_limits()
    finally:
        torch.set_default_dtype(before)
    assert (float(r_max), float(d_max)) == pytest.approx((2.0, 1.0), rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16], ids=str)
def test_a_counter_of_any_dtype(dtype):
    """2,048 + 1 is 2,048 in float16, and 255 + 1 is 0 in uint8."""
    count = {torch.bool: 1, torch.uint8: 255, torch.bfloat16: 256}.get(dtype, 2_048)
    found = find_momentum(None, torch.tensor(count, dtype=dtype))
    assert found.dtype == torch.float64 and float(found) == 1 / (count + 1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_momentum_that_is_a_tensor_is_taken_as_its_value(dtype):
    """1 - momentum is found in float64: in float16 it would be off by 2e-4, and of a bool there is none."""
    momentum = torch.tensor(0.1 if dtype.is_floating_point else 1).to(dtype)
    x, found = torch.randn(6, 3, dtype=torch.float64), []
    for weight in (momentum, float(momentum)):
        mean, var = torch.full((3,), 5.0, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        functional.batch_norm(x, mean, var, training=True, momentum=weight)
        found.append((mean, var))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
