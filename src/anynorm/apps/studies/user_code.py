"""What the user names as `module:function` or `file.py:function`: found, fingerprinted, and its faults in one line."""

from __future__ import annotations

import hashlib
import re
import site
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from anynorm.apps.factory import import_from, split_spec
from anynorm.errors import UserError


def find_function(option: str, spec: str, takes: str) -> tuple[Callable[..., Any], ModuleType]:
    """The callable that `module:function` or `file.py:function` names, and the module that holds it.

    Args:
        option: where the user gave it, for messages: --model.
        spec: what the user gave.
        takes: the rule, for messages: what may stand there, and what the function must do.
    """
    parts = split_spec(spec)
    if parts is None:
        raise UserError(f"compare {option}: takes {takes}; got {spec!r}.")
    module_name, attribute = parts
    if "" not in sys.path and str(Path.cwd()) not in sys.path:  # a function may import from there when it is called
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_from(module_name)
    # A user's module may raise anything while it is imported, even SystemExit.
    except (Exception, SystemExit) as problem:
        raise UserError(
            f"compare {option}: module {module_name!r} does not import ({describe(problem)}); "
            f"run from the directory that holds it, or give the path of its file."
        ) from problem
    found = getattr(module, attribute, None)
    if not callable(found):
        what = "has nothing of that name" if found is None else f"holds a {type(found).__name__}"
        raise UserError(
            f"compare {option}: takes {takes}; {module_name} {what} in place of {attribute!r}; check the name after "
            f"the colon."
        )
    return found, module


def find_fingerprint(option: str, spec: str, takes: str) -> str:
    """What identifies a function of the user's: its name and the sources beside it."""
    function, module = find_function(option, spec, takes)
    whole = repr([spec, drop_addresses(repr(function)), find_sources(module)])
    return hashlib.sha256(whole.encode()).hexdigest()


def find_sources(module: ModuleType) -> list[tuple[str, str]]:
    """Name and digest of a module's file and of the files of all imported modules in or below its directory.

    Python and installed packages do not count, though a virtual environment may lie there: which of their modules are
    imported differs between a terminal and a log.
    """
    own = find_file(module)
    if own is None:
        return []
    installed = [Path(path).resolve() for path in (sys.prefix, sys.base_prefix, site.getuserbase())]
    installed = [path for path in installed if path.is_relative_to(own.parent)]
    found = {module.__name__: own}
    for name, other in list(sys.modules.items()):
        path = find_file(other)
        if path is None or name == "__main__" or not path.is_relative_to(own.parent):
            continue
        if not any(path.is_relative_to(root) for root in installed):
            found[name] = path
    return [(name, hashlib.sha256(path.read_bytes()).hexdigest()) for name, path in sorted(found.items())]


def find_file(module: object) -> Path | None:
    """The file that a module came from; None where there is none."""
    # A lazy module's attributes may import others; its own dictionary does not.
    path = getattr(module, "__dict__", {}).get("__file__")
    return Path(path).resolve() if isinstance(path, str) and Path(path).is_file() else None


def drop_addresses(text: str) -> str:
    """Text without the addresses of objects, which differ between processes."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def describe(problem: BaseException) -> str:
    """An exception on one line: its type and the first line of what it says."""
    lines = str(problem).strip().splitlines()
    text = lines[0].rstrip(".") if lines else ""
    return f"{type(problem).__name__}: {text}"[:300] if text else type(problem).__name__
