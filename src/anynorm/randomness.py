"""The state of the random generators that models draw from: saved, put back, and kept over a block."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .torch_private import tree_leaves


def save_randomness() -> list[Any]:
    """Return the states of Python's, NumPy's and torch's generators, of every device that is in use."""
    states: list[Any] = [random.getstate(), np.random.get_state(), torch.get_rng_state()]  # noqa: NPY002 # what models draw from
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state_all())
    return states


def restore_randomness(states: list[Any]) -> None:
    """Put the generators back, so that they draw again what they drew after `save_randomness`."""
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002 # as above
    torch.set_rng_state(states[2])
    if len(states) > 3:
        torch.cuda.set_rng_state_all(states[3])


def has_drawn(states: list[Any]) -> bool:
    """Whether a generator has drawn since `save_randomness` returned these states."""
    now = save_randomness()
    # Python's own state is a plain tuple; the others hold arrays and tensors, which do not compare as one.
    others = zip(tree_leaves(now[1:]), tree_leaves(states[1:]), strict=False)
    return now[0] != states[0] or not all(np.array_equal(a, b) for a, b in others)


@contextmanager
def keep_randomness(seed: int = 0) -> Iterator[None]:
    """Run a block from a fixed seed, and put the generators back after it as they were before."""
    states = save_randomness()
    try:
        # Only the CPU's generator: torch.manual_seed would seed every accelerator of the process too.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 # as above
        yield
    finally:
        restore_randomness(states)
