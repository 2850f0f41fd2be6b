"""Random states come back after a block, whatever happens in it."""

import random

import pytest
import torch

from anynorm.randomness import keep_randomness


def test_random_state_returns_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), keep_randomness():
        random.seed(torch.rand(3).numel() // 0)
    assert torch.equal(torch.get_rng_state(), before)
