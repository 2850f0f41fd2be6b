"""Hooks that leave graphs and copies of a model alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Hook:
    """A hook that copies and pickles of a model do not take along: of theirs this monitor knows nothing."""

    call: Callable[..., None]

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> None:
        if not torch.compiler.is_compiling():
            self.call(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return make_idle, ()


def ignore(*arguments: Any) -> None:
    """What a hook is in a copy."""


def make_idle() -> Callable[..., None]:
    """For pickle, which would find `ignore` to be another object than the hook."""
    return ignore
