"""The command line: what it prints where nobody watches, and how it ends when something is wrong."""

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from anynorm.apps import cli
from anynorm.apps.list import shorten
from anynorm.errors import UserError
from anynorm.family import FAMILY


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
    from importlib.metadata import version

    assert CliRunner().invoke(cli.app, ["--version"]).stdout == f"anynorm {version('anynorm')}\n"


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
