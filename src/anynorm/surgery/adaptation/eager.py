"""Compiled code runs eagerly while any thread adapts a model: it need not see the context."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

OPEN: list[int] = [0]  # contexts in the process
STANCE: list[Any] = []  # torch's, one for all of them: threads leave in another order than they enter
LOCK = Lock()


@contextmanager
def running_eagerly() -> Iterator[None]:
    """Keep compiled code from running; without a compiler there is none."""
    with LOCK:
        if not STANCE and "torch._dynamo" in sys.modules:
            STANCE.append(torch.compiler.set_stance("force_eager"))
        OPEN[0] += 1
    try:
        yield
    finally:
        with LOCK:
            OPEN[0] -= 1
            if not OPEN[0] and STANCE:
                STANCE.pop().__exit__(None, None, None)
