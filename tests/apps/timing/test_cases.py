"""A timed case is the same layer in both libraries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import anynorm
from anynorm.apps.timing.cases import MODES, Case, make_call

pytestmark = pytest.mark.usefixtures("one_thread")


TINY = Case("tiny", "BatchNorm2d", (4,), (6, 4, 2, 2), channels_last=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_case_is_the_same_layer_in_both_libraries(mode):
    """Equals torch: parameters, running averages and results are the same, so the same work is timed."""
    results = []
    for library in (nn, anynorm):
        module = TINY.make(library).train(mode != "evaluation")
        result = make_call(module, module.parameters(), mode, *TINY.draw())()
        results.append(result if isinstance(result, tuple) else (result,))
    assert len(results[0]) == (3 if mode == "forward+backward" else 1)
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_case_says_where_it_lies_in_memory():
    x, g = TINY.draw()
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert g.stride() == x.stride()
    assert (TINY.norm, TINY.name, TINY.layout, TINY.size) == ("batch", "batch 6x4x2x2", "channels_last", 384)
