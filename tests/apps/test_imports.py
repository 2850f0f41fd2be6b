"""`import anynorm` needs torch and NumPy, and nothing of the library depends on the apps."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import anynorm
from anynorm.apps.extras import EXTRAS

SOURCE = Path(anynorm.__file__).parent
ENTRY = SOURCE / "cli.py"  # the command, under the name that scripts and tools know
FILES = sorted(path for path in SOURCE.rglob("*.py") if SOURCE / "apps" not in path.parents and path != ENTRY)
APPS = ("rich", "typer", "matplotlib", "scipy", "sklearn", "PIL", "anynorm.apps")
EXTRA = tuple(package for brought in EXTRAS.values() for package in brought)


def find_loaded(code: str, names: Iterable[str]) -> str:
    """Which of these a fresh process has imported after it ran the code, the last line that it prints."""
    code += f"\nimport sys; print([name for name in {tuple(names)} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[
        -1
    ]


def test_import_brings_no_package_of_the_apps():
    assert find_loaded("import anynorm", APPS) == "[]"
    assert find_loaded("import anynorm, matplotlib", APPS) == "['matplotlib', 'PIL']"  # the search finds what is there


@pytest.mark.parametrize("command", [["--version"], ["env"], ["list"], ["study", "list"], ["explain"]])
def test_commands_without_extra_load_none(command):
    code = f"import sys\nsys.argv[1:] = {command}\nfrom anynorm.cli import main\ntry: main()\nexcept SystemExit: pass"
    assert find_loaded(code, EXTRA) == "[]"


HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {hidden} else found(name, package)
sys.argv[1:] = {command}
from anynorm.cli import main
main()
"""


@pytest.mark.parametrize("command", ["compare", "study run leak", "explain --out x.png", "speed --html x.html"])
def test_a_command_says_which_extra_is_missing(command, tmp_path):
    code = HIDE.format(hidden=EXTRA, command=command.split())
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert re.fullmatch(r"anynorm: .* needs matplotlib, .*; pip install 'anynorm\[compare\]'\.\n", ended.stderr)
    assert not [*tmp_path.iterdir()]


def test_the_extras_are_those_of_the_project():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    names = {"sklearn": "scikit-learn"}
    for extra, packages in EXTRAS.items():
        wanted = {re.split(r"[<>=]", requirement)[0] for requirement in extras[extra]}
        assert wanted == {names.get(package, package) for package in packages}


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
