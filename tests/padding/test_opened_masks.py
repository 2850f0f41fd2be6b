"""Masks and lengths by the compiled module: what `find_mask` finds, or nothing."""

from __future__ import annotations

import pytest
import torch

import anynorm
from anynorm.engine.kernels import READS_TENSORS
from anynorm.padding.masks import find_mask, has_real, open_mask

pytestmark = pytest.mark.skipif(not READS_TENSORS, reason="the compiled module reads no tensors here")
X = torch.randn(3, 4, 5)
HOLES = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, -1])
def test_masks_equal_those_of_find_mask(channels, dtype):
    x, mask = (X if channels == 1 else X.mT), HOLES.to(dtype)
    opened, count = open_mask(x, (channels, 1), mask, None)
    assert torch.equal(opened, find_mask("norm", x, (channels,), mask))
    assert count == 8
    assert has_real(mask, None) is True
    assert has_real(torch.zeros_like(mask), None) is False


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
@pytest.mark.parametrize("channels", [1, -1])
def test_lengths_equal_those_of_find_mask(channels, kind):
    x, lengths = (X if channels == 1 else X.mT), kind([5, 0, 2])
    opened, count = open_mask(x, (channels, 1), None, lengths)
    assert torch.equal(opened, find_mask("norm", x, (channels,), None, lengths))
    assert count == 7
    assert has_real(None, lengths) is True
    assert has_real(None, kind([0, 0, 0])) is False


@pytest.mark.parametrize(
    ("mask", "lengths"),
    [
        (torch.full((3, 5), 0.5), None),
        (torch.full((3, 5), float("nan")), None),
        (torch.full((3, 5), -float("inf")), None),
        (torch.ones(3, 4), None),
        (torch.ones(1, 5), None),
        (torch.ones(5, 3).bool().mT, None),
        (torch.ones(3, 1).bool().expand(3, 5), None),
        (torch.ones(3, 5, dtype=torch.float64), None),
        (torch.ones(3, 5, device="meta"), None),
        (torch.ones(3, 5), [1, 2, 3]),
        (None, [1, 2, 6]),
        (None, [1, -2, 3]),
        (None, [1, 2]),
        (None, [1, 2, 2**70]),
        (None, [1, 2, True]),
        (None, torch.tensor([1.0, 2.0, 3.0])),
        (None, torch.tensor([1, 2, 3], dtype=torch.int32)),
        (None, torch.tensor([[1, 2, 3]])),
        (None, 3),
    ],
)
def test_what_is_not_known_or_does_not_fit_is_left_to_find_mask(mask, lengths):
    assert open_mask(X, (1, 1), mask, lengths) is None


def test_storage_that_was_freed_is_not_read():
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask.untyped_storage().resize_(0)
    assert open_mask(X, (1, 1), mask, None) is None


def test_a_mask_is_read_anew_at_each_call():
    """Through numpy a mask changes without a new version."""
    norm, mask = anynorm.BatchNorm1d(4), torch.ones(3, 5, dtype=torch.bool)
    whole = norm(X, mask=mask)
    mask.numpy()[:, 3:] = False
    assert torch.equal(norm(X, mask=mask)[..., :3], norm(X[..., :3]))
    assert not torch.equal(norm(X, mask=mask), whole)
