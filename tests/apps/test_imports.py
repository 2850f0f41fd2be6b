"""`import anynorm` needs torch and NumPy, and nothing of the library depends on the apps."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import anynorm

SOURCE = Path(anynorm.__file__).parent
ENTRY = SOURCE / "cli.py"  # the command, under the name that scripts and tools know
FILES = sorted(path for path in SOURCE.rglob("*.py") if SOURCE / "apps" not in path.parents and path != ENTRY)
FOR_APPS = ("rich", "typer", "matplotlib", "scipy", "sklearn", "PIL", "anynorm.apps")


def test_import_brings_no_package_of_the_apps():
    code = f"import sys, anynorm; print([name for name in {FOR_APPS} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def find_imports(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """The full names of what is imported when a module is, be it inside of `if` or `try`; functions come later."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        else:
            yield from find_imports(node, package)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_module_of_the_library_imports_the_apps(path):
    package = ["anynorm", *path.relative_to(SOURCE).parts[:-1]]
    imports = list(find_imports(ast.parse(path.read_text(encoding="utf-8")), package))
    assert not [name for name in imports if f"{name}.".startswith("anynorm.apps.")]


def test_the_search_finds_relative_imports():
    code = "from ..apps.terminal import say\nif 1:\n    from .. import apps\ndef f():\n    import anynorm.apps.cli\n"
    assert list(find_imports(ast.parse(code), ["anynorm", "surgery"])) == ["anynorm.apps.terminal.say", "anynorm.apps"]
