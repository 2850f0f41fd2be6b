"""What ``module:factory`` and ``file.py:factory`` stand for on the command line."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

MODEL_HELP = (
    "A built-in model (resnet18, mobilenetv2, mlp, unet, transformer, transformer-rms, lstm) "
    "or your own as module:factory."
)
FILES: dict[Path, ModuleType] = {}


def split_spec(spec: str) -> tuple[str, str] | None:
    """The module or file and the name in it; None where the text is not of that form."""
    where, colon, name = spec.rpartition(":")
    return (where, name) if colon and where and name else None


def import_from(where: str) -> ModuleType:
    """Import a dotted module as ``python`` would in this folder, or a file given by its path, once in a process."""
    path = Path(where)
    if not (where.endswith(".py") and path.is_file()):
        with on_path(str(Path.cwd())):
            return importlib.import_module(where)
    path = path.resolve()
    if path not in FILES:
        plan = importlib.util.spec_from_file_location(path.stem, path)
        if plan is None or plan.loader is None:
            raise ImportError(f"{where} is not a Python file")
        module = importlib.util.module_from_spec(plan)
        # Registered first, as an ordinary import does: dataclasses and pickle look their module up by name.
        sys.modules.setdefault(plan.name, module)
        with on_path(str(path.parent)):
            plan.loader.exec_module(module)
        FILES[path] = module
    return FILES[path]


@contextlib.contextmanager
def on_path(folder: str) -> Iterator[None]:
    """Let imports look in a folder first, for the length of a block."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
