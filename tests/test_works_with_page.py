"""docs/works-with.md has a row for every script of tests/works_with, as the script says it, and no failure."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from works_with.run import PAGE, VERDICTS, find_scripts, read_heading, read_rows

ROWS = read_rows(PAGE.read_text())


def test_every_script_has_its_row_and_no_other_is_there():
    assert list(ROWS) == [script.name for script in find_scripts()]


@pytest.mark.parametrize("script", find_scripts(), ids=lambda script: script.stem)
def test_a_row_is_what_its_script_says(script):
    named, done, verdict, note, ran = (cell.strip() for cell in ROWS[script.name].strip("| ").split(" | "))
    assert done == read_heading(script)[1]
    assert verdict in VERDICTS.values()
    said = re.findall(r'print\(f?"([\w ]+): ', script.read_text())
    assert verdict in [VERDICTS[each] for each in said] and note
    assert re.match(rf"\[{re.escape(read_heading(script)[0].partition(' ')[0])} \d", named)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", ran)


def test_import_loads_no_integration():
    code = "import anynorm, sys; sys.exit(any(n.startswith('anynorm.integrations') for n in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
