"""The command line: what it prints where nobody watches, and how it ends when something is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import anynorm
from anynorm.apps import cli
from anynorm.apps.list import shorten
from anynorm.errors import UserError
from anynorm.family import FAMILY

ROOT = Path(__file__).parents[2]


def run_main(monkeypatch, *arguments):
    """Run main() with these arguments and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["anynorm", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_list_says_what_the_table_says():
    printed = CliRunner().invoke(cli.app, ["list"]).stdout
    for scheme in FAMILY.values():
        row = next(line for line in printed.splitlines() if line.startswith(scheme.name + " "))
        for cell in (scheme.pattern, ", ".join(scheme.source_names), shorten(scheme.classes)):
            assert cell in row
        assert re.search(r"\byes\b" if scheme.centred else r"\bno\b", row)


def test_list_fits_80_columns_and_has_no_colour_codes_when_piped():
    printed = CliRunner().invoke(cli.app, ["list"]).stdout
    assert "\x1b" not in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_shorten_keeps_names_without_a_common_stem():
    assert shorten(("GhostNorm", "BatchNorm1d")) == "GhostNorm, BatchNorm1d"
    assert shorten(("GroupNorm",)) == "GroupNorm"


def test_help_names_the_commands():
    printed = CliRunner().invoke(cli.app, ["--help"]).stdout
    for command in ("list", "try", "explain"):
        assert re.search(rf"^\W*{command}\b", printed, re.MULTILINE)


def test_version():
    assert CliRunner().invoke(cli.app, ["--version"]).stdout == f"anynorm {anynorm.__version__}\n"


def test_the_version_stands_in_one_file():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in pyproject["project"]
    assert pyproject["project"]["dynamic"] == ["version"]
    source = ROOT / pyproject["tool"]["scikit-build"]["metadata"]["version"]["input"]
    # As scikit-build-core's provider looks for it.
    found = re.findall(
        r"""^(?:__version__|VERSION)(?: ?\: ?str)? *= *['"]v?(.+?)['"]""", source.read_text(), re.MULTILINE
    )
    assert found == [anynorm.__version__]


def test_env_as_json_has_the_facts_of_its_lines():
    lines = CliRunner().invoke(cli.app, ["env"]).stdout.splitlines()
    facts = json.loads(CliRunner().invoke(cli.app, ["env", "--json"]).stdout)
    assert lines == [f"{name:12} {value}" for name, value in facts.items()]
    assert {"anynorm", "torch", "python", "machine", "kernels"} <= set(facts)


def test_a_users_error_is_one_sentence_on_stderr(monkeypatch, capsys):
    assert run_main(monkeypatch, "try", "nothing-of-the-kind") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("anynorm: 'nothing-of-the-kind' is neither a built-in model")
    assert captured.err.count("\n") == 1


def test_another_value_error_is_a_defect_and_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise ValueError("a defect")

    monkeypatch.setattr("anynorm.apps.list.print_family", fail)
    monkeypatch.setattr(sys, "argv", ["anynorm", "list"])
    with pytest.raises(ValueError, match="a defect"):
        cli.main()


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt, 130), (UserError("no"), 2)])
def test_exit_codes(monkeypatch, raised, code):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr("anynorm.apps.list.print_family", fail)
    assert run_main(monkeypatch, "list") == code


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -c 'from anynorm.apps.cli import main; main()' list | true"
    ended = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert "Traceback" not in ended.stderr
    assert "BrokenPipe" not in ended.stderr
