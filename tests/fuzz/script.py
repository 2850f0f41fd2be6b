"""A script that shows a failure without this folder: the source of what was called, and the call."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from types import FunctionType, ModuleType
from typing import Any

HEAD = """from __future__ import annotations
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import erfc, pi, prod, sqrt
from typing import Any
from unittest import mock
import copy
import numpy as np, torch, anynorm
import torch.nn as nn, torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.func import jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
"""


def write_script(check: FunctionType, *arguments: Any) -> str:
    """Python that calls check(*arguments), with all it needs of this folder."""
    pieces: dict[str, str] = {}
    for thing in (*(type(a) if is_dataclass(a) else a for a in arguments), check):
        add(thing, pieces)
    for value in arguments:
        for part in fields(value) if is_dataclass(value) else ():
            add(getattr(value, part.name), pieces)
    told = ", ".join(spell(argument) for argument in arguments)
    aliases = "Array = NDArray[np.float64]\n"
    return "\n\n".join([HEAD + aliases, *pieces.values(), f"{check.__name__}({told})\n"])


def is_ours(thing: Any) -> bool:
    return isinstance(thing, FunctionType | type) and str(getattr(thing, "__module__", "")).split(".")[0] == "fuzz"


def add(thing: Any, pieces: dict[str, str]) -> None:
    """The source of a function or class, behind the sources of what it names."""
    if not is_ours(thing) or thing.__name__ in pieces:
        return
    pieces[thing.__name__] = ""  # its place is taken below, so that what calls itself ends
    source = inspect.getsource(thing)
    module = inspect.getmodule(thing)
    for name, value in vars(module).items():
        if name not in find_names(thing):
            continue
        if is_ours(value):
            add(value, pieces)
        elif isinstance(value, tuple | dict | int | float | str) and name not in pieces:
            pieces[name] = f"{name} = {spell(value)}"
    del pieces[thing.__name__]
    pieces[thing.__name__] = source.rstrip()


def find_names(thing: Any) -> set[str]:
    """Global names that a function or a class's methods and defaults use."""
    if isinstance(thing, type):
        known = set()
        for value in vars(thing).values():  # defaults too
            known |= {type(value).__name__, getattr(value, "__name__", "")}
        for value in vars(thing).values():
            value = getattr(value, "fget", value)
            if isinstance(value, FunctionType):
                known |= find_names(value)
        return known
    thing = inspect.unwrap(thing)
    names, codes = set(), [thing.__code__]
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [c for c in code.co_consts if hasattr(c, "co_names")]
    return names


def spell(value: Any) -> str:
    """As Python reads it."""
    if is_dataclass(value) and not isinstance(value, type):
        told = [
            f"{f.name}={spell(getattr(value, f.name))}" for f in fields(value) if getattr(value, f.name) != f.default
        ]
        return f"{type(value).__name__}({', '.join(told)})"
    if isinstance(value, tuple):
        return "(" + "".join(f"{spell(v)}, " for v in value) + ")"
    if isinstance(value, FunctionType | type):
        return value.__name__
    if isinstance(value, ModuleType):
        return value.__name__
    return 'float("inf")' if value == float("inf") else repr(value)
