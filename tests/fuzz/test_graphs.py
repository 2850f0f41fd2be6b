"""Whole small networks of torch.nn: accelerated, fused, in micro-batches, masked; against themselves in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fuzz.drive import drive
from fuzz.graphs import check_accumulate, check_masked, check_surgery
from fuzz.nets import Net, nets

pytestmark = pytest.mark.filterwarnings("ignore")


def test_surgery():
    drive(check_surgery, nets())


def has_batch_norm(net: Net) -> bool:
    return "batch" in str(net.words) or "functional" in str(net.words)


def test_accumulate():
    """Averages of instance norms are not promised (docs/accumulate.md): there are none."""
    drive(check_accumulate, nets().filter(has_batch_norm).map(lambda net: replace(net, affine=False)))


def has_a_norm(net: Net) -> bool:
    return "norm" in str(net.words)


def test_masked():
    drive(check_masked, nets(("batch", "instance", "group"), kernels=(1,), dims=(1,)).filter(has_a_norm))
