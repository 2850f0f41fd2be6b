"""Which norms of a model are adapted, and how torch's become ours for that time.

Several threads may adapt one model: a norm is ours while any of them does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch.nn as nn

from ...modules import batch
from ...modules.sync import SyncBatchNorm
from ..adapters import Finder
from ..recalibration.norms import find_norms
from ..report import PAIRS, Entry, SurgeryReport, describe


class Borrowed:
    """A norm of torch's that is ours for a time.

    Attributes:
        kind: the class that it had.
        became: the one that it has.
        frozen: what was frozen of it.
        users: how many contexts are open.
    """

    kind: type[nn.Module]
    became: type[nn.Module]
    frozen: Any

    def __init__(self, kind: type[nn.Module], became: type[nn.Module], frozen: Any) -> None:
        self.kind, self.became, self.frozen = kind, became, frozen
        self.users: int = 0


BORROWED: WeakKeyDictionary[nn.Module, Borrowed] = WeakKeyDictionary()
LOCK = Lock()


def plan_norms(model: nn.Module, trust: tuple[type[nn.Module], ...], report: SurgeryReport) -> dict[Any, Any]:
    """The norms to adapt, by name in `report.changed`, and the class that each needs.

    Raises:
        ValueError: a lazy norm.
    """
    with LOCK:
        norms, left = find_norms(model, trust, "adapt")
        finder, kinds = Finder(trust), dict[Any, Any]()
        for name, norm in norms.items():
            kind = BORROWED[norm].kind if norm in BORROWED else type(norm)
            became, reason = find_class(norm, finder)
            if became is None:
                left.append(Entry(name, describe(kind), reason=reason))
            else:
                kinds[norm] = became
                report.changed.append(Entry(name, describe(kind), became=describe(became)))
    report.left += left
    return kinds


def find_class(norm: Any, finder: Finder) -> tuple[type[Any] | None, str]:
    """The class of ours that a norm needs, or None and why there is none."""
    if norm in BORROWED:
        return BORROWED[norm].became, ""
    kind = type(norm)
    if isinstance(norm, batch._BatchNorm):
        return kind, ""
    if kind is nn.SyncBatchNorm:
        return SyncBatchNorm, ""
    if kind in PAIRS:
        return PAIRS[kind], ""
    found, reason = finder.find(norm) or (None, "a subclass with a forward of its own; name it in trust=")
    if found is not None and not issubclass(found, batch._BatchNorm):
        return None, "it is computed otherwise than batch norm"
    return found, reason if found is None else ""


@contextmanager
def borrowing(kinds: dict[Any, Any]) -> Iterator[None]:
    """Let norms be of these classes; the last to leave gives them back."""
    with LOCK:
        for norm, became in kinds.items():
            if norm not in BORROWED and type(norm) is not became:
                BORROWED[norm] = Borrowed(type(norm), became, vars(norm).get("frozen"))
                norm.__class__ = became
        mine = [norm for norm in kinds if norm in BORROWED]
        for norm in mine:
            BORROWED[norm].users += 1
    try:
        yield
    finally:
        with LOCK:
            for norm in mine:
                known = BORROWED[norm]
                known.users -= 1
                if not known.users:
                    del BORROWED[norm]
                    # Not where somebody has changed it meanwhile; torch's class would not stay frozen.
                    if type(norm) is known.became and vars(norm).get("frozen") in (None, known.frozen):
                        norm.__class__ = known.kind
