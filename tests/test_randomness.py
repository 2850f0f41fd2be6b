"""Random states come back after a block, whatever happens in it."""

import random

import numpy as np
import pytest
import torch

from anynorm.randomness import has_drawn, keep_randomness, restore_randomness, save_randomness


def test_random_state_returns_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), keep_randomness():
        random.seed(torch.rand(3).numel() // 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "draw", [random.random, np.random.random, lambda: torch.rand(1)], ids=["python", "numpy", "torch"]
)
def test_each_generator_is_seen_to_draw(draw):
    states = save_randomness()
    assert not has_drawn(states)
    draw()
    assert has_drawn(states)
    restore_randomness(states)
    assert not has_drawn(states)
