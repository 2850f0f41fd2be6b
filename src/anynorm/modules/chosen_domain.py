"""Which domain is chosen, here and now, and which names may be one; `domain.py` has the norms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..errors import UserError

CHOSEN: ContextVar[str | None] = ContextVar("anynorm.domain", default=None)


@contextmanager
def domain(name: str) -> Iterator[None]:
    """Choose the domain of every `DomainBatchNorm2d` and its like that is called inside.

    It holds in this thread and asynchronous task. What activation checkpointing computes again, later and outside, has
    the domain that it had at first.

    Args:
        name: one of the `domains` that the norms were built with.

    Example:
        >>> norm = anynorm.DomainBatchNorm1d(1, domains=("day", "night"))
        >>> with anynorm.domain("night"):
        ...     _ = norm(torch.tensor([[10.0], [30.0]]))
        >>> norm.running_mean_day, norm.running_mean_night
        (tensor([0.]), tensor([2.]))
    """
    token = CHOSEN.set(name)
    try:
        yield
    finally:
        CHOSEN.reset(token)


class NoDomainError(UserError, AttributeError):
    """No domain is chosen, or one that the norm has not; so an attribute that each domain has is none of the norm."""


def check_domains(function: str, domains: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple."""
    names = () if isinstance(domains, str) else tuple(domains)
    if not names or len(set(names)) < len(names) or not all(isinstance(n, str) and n and "." not in n for n in names):
        raise UserError(
            f"{function}: domains must be one or more different names without a dot; got {domains!r}; pass "
            "('day', 'night')"
        )
    return names


def check_tracking(function: str, tracks: bool) -> None:
    """Refuse what has no averages to choose from."""
    if not tracks:
        raise UserError(
            f"{function}: domains differ in their running averages; got track_running_stats=False; use BatchNorm"
        )
