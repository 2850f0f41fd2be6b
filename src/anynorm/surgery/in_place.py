"""In-place operators as functions of this module's own, for graphs.

torch.fx writes `operator.iadd` as ``a += b``, which moves every later use of a number a; a call of a function it writes
as a call. Each function stands at the top of a module under its own name, for a pickled graph finds it by that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any


def iadd(a: Any, b: Any) -> Any:
    return operator.iadd(a, b)


def isub(a: Any, b: Any) -> Any:
    return operator.isub(a, b)


def imul(a: Any, b: Any) -> Any:
    return operator.imul(a, b)


def itruediv(a: Any, b: Any) -> Any:
    return operator.itruediv(a, b)


def ifloordiv(a: Any, b: Any) -> Any:
    return operator.ifloordiv(a, b)


def imod(a: Any, b: Any) -> Any:
    return operator.imod(a, b)


def imatmul(a: Any, b: Any) -> Any:
    return operator.imatmul(a, b)


def ipow(a: Any, b: Any) -> Any:
    return operator.ipow(a, b)


def iand(a: Any, b: Any) -> Any:
    return operator.iand(a, b)


def ior(a: Any, b: Any) -> Any:
    return operator.ior(a, b)


def ixor(a: Any, b: Any) -> Any:
    return operator.ixor(a, b)


IN_PLACE: dict[str, Callable[[Any, Any], Any]] = {
    operate.__name__: operate
    for operate in (iadd, isub, imul, itruediv, ifloordiv, imod, imatmul, ipow, iand, ior, ixor)
}
