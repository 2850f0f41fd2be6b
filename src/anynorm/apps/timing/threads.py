"""How many CPU threads torch uses while something is timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def use_threads(threads: int | None) -> Iterator[None]:
    """Run a block with this many CPU threads; None leaves their number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
