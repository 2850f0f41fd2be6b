"""docs/doctor.md: its list is that of the classes, its table is what the JSON has, and its check runs as it is written.

Keeps invariants: text and code agree.
"""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from anynorm.doctor import proof
from anynorm.doctor.check import find_checks
from anynorm.doctor.diagnosis import SCHEMA
from anynorm.surgery.differences import Difference

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "doctor.md"
SCRIPT = ROOT / "docs" / "doctor.py"
TYPES = {"string": str, "number": (int, float), "whole number": int, "true or false": bool, "null": type(None)}
TYPES |= {"object": dict, "list": list}
MAPS = ("layers", "measured", "findings[].evidence", "skipped")  # their keys are names
AS_FINDINGS = "repairs.remaining[]"


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("PIL", reason="the script draws, too: pip install '.[compare]'")
    return runpy.run_path(str(SCRIPT))


def test_the_list_is_that_of_the_classes(script):
    text = PAGE.read_text(encoding="utf-8")
    assert script["write_page"](text) == text, "run make doctor ARGS=--list"


def test_every_check_has_its_heading_and_every_thread_a_link(script):
    text = PAGE.read_text(encoding="utf-8")
    for check in find_checks().values():
        assert text.count(f"\n### {check.id}\n") == 1
        for thread in check.threads:
            assert f"[{thread}](https://github.com/" in text, f"docs/doctor.py: PLACES lacks the repository of {thread}"


def test_a_page_without_markers_and_a_thread_without_a_place(script):
    with pytest.raises(ValueError, match="the list stands between"):
        script["write_page"]("no list")
    assert script["write_thread"]("nobody#1") == "nobody#1"


def read_fields() -> dict[str, tuple[str, ...]]:
    """The table of JSON fields: types by path."""
    table = re.search(r"<!-- json -->\n(.*?)<!-- /json -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", table[1], re.MULTILINE)
    return {path: tuple(kind.strip() for kind in kinds.split(",")) for path, kinds in rows}


def find_paths(value, path: str = ""):
    """Every value of a JSON document with its path."""
    if path:
        yield path, value
    if isinstance(value, dict):
        for key, each in value.items():
            yield from find_paths(each, f"{path}.{'*' if path in MAPS else key}" if path else key)
    elif isinstance(value, list):
        for each in value:
            yield from find_paths(each, f"{path}[]")


def read_findings(path: str) -> str | None:
    """The path in those of all findings, where it is of one that is left; None for an object in a list."""
    path = path.replace(AS_FINDINGS, "findings[]")
    return None if path.endswith("[]") and path != "checked[]" else path


def test_the_json_has_the_documented_fields_and_no_others(run, monkeypatch):
    monkeypatch.setattr(
        proof, "measure", lambda one, other: Difference(1.0, 1.0)
    )  # as if outputs had moved: one is refused
    chosen = ("momentum-inverted", "train-eval-gap", "bias-useless", "norms-decayed")
    options = [word for check in chosen for word in ("--check", check)]
    result = run("sick.py:taken_over", "--data", "sick.py:load", "--fix", "--json", "r.json", *options)
    assert result.exit_code == 0, result.output  # a note is left
    found = json.loads(Path("r.json").read_text(encoding="utf-8"))
    assert all(found["repairs"].values()), found["repairs"]
    fields, seen = read_fields(), set()
    for whole, value in find_paths(found):
        path = read_findings(whole)
        if path is None:
            continue
        if path.startswith("findings[].evidence."):
            path = "findings[].evidence.*"
        assert path in fields, f"docs/doctor.md has no row for {path}"
        fits = [kind for kind in fields[path] if isinstance(value, TYPES[kind])]
        assert fits and (isinstance(value, bool) == (fits == ["true or false"])), (path, value)
        seen.add(path)
    assert set(fields) - seen == set()
    assert found["schema"] == SCHEMA


def test_numbers_that_json_lacks_are_strings(run):
    Path("nan.py").write_text(
        "from torch import nn\ndef make():\n    model = nn.Sequential(nn.BatchNorm1d(2))\n"
        "    model[0].running_mean.fill_(float('nan'))\n    return model\n"
    )
    result = run("nan.py:make", "--json", "-")
    assert result.exit_code == 1
    json.loads(result.stdout, parse_constant=pytest.fail)


def test_a_check_of_another_package_runs_with_the_others(run, tmp_path, monkeypatch):
    """The example of the page, installed with an entry point."""
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "(Check)" in block
    )
    point = re.search(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    group, name, value = re.search(r'entry-points\."(.+?)"\]\n(\S+) = "(.+?)"', point).groups()
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "checks.py").write_text(code)
    folder = tmp_path / "my_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    (tmp_path / "grown.py").write_text(
        "from torch import nn\ndef make():\n    model = nn.Sequential(nn.LayerNorm(4))\n"
        "    model[0].weight.data[1] = 50\n    return model\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    find_checks.cache_clear()
    try:
        assert "gamma-large" in run("--list").output
        result = run("grown.py:make", "--check", "gamma-large", "--fix")
        assert result.exit_code == 0, result.output
        assert "0 (LayerNorm): gamma is 50" in result.output and "done  gamma-large at 0" in result.output
    finally:
        find_checks.cache_clear()
