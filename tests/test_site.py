"""Keeps invariants of the documentation site, from its sources: every page has a place, every public name a line."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import anynorm
from anynorm import functional

ROOT = Path(__file__).parents[1]
CONF = runpy.run_path(str(ROOT / "docs" / "conf.py"))
PLACED = [page for pages in CONF["CONTENTS"].values() for page in pages]
MODULES = {"functional", "reference", "__version__"}  # they have lines, and a page, of their own
LINE = re.compile(r"^\.\. (?:auto\w+|py:data):: ([\w.]+)$|^\.\. currentmodule:: ([\w.]+)$", re.MULTILINE)


def find_documented(text: str) -> set[str]:
    """The full names of what a reference page shows."""
    found, module = set(), "anynorm"
    for name, current in LINE.findall(text):
        module = current or module
        if name:
            found.add(name if name.startswith("anynorm.") else f"{module}.{name}")
    return found


DOCUMENTED = set().union(*(find_documented(page.read_text()) for page in (ROOT / "docs" / "reference").glob("*.rst")))


def test_every_page_has_one_place():
    pages = [page for kind in ("*.md", "*.rst") for page in (ROOT / "docs").rglob(kind)]
    pages += [page for page in ROOT.glob("*.md") if page.stem != CONF["root_doc"]]
    assert sorted(PLACED) == sorted(str(page.relative_to(ROOT).with_suffix("")) for page in pages)


def test_every_public_name_is_in_the_reference():
    names = {f"anynorm.{name}" for name in set(anynorm.__all__) - MODULES}
    names |= {f"anynorm.functional.{name}" for name in functional.__all__}
    assert names - DOCUMENTED == set()
    assert "anynorm.reference" in DOCUMENTED  # with all its members


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_the_reference_shows_what_exists_and_is_documented(name):
    found, shown = anynorm, name.split(".")[1:]
    for part in shown:
        found = getattr(found, part)
    assert found.__doc__


def test_pictures_are_those_of_the_docs():
    text = (ROOT / "docs" / "gallery.rst").read_text()
    shown = {path for path in re.findall(r"image:: (\S+)", text) if not path.startswith("../build/")}
    pictures = [path for kind in ("*.svg", "*.png") for path in (ROOT / "docs").rglob(kind)]
    assert shown == {str(path.relative_to(ROOT / "docs")) for path in pictures}


def test_formulas_and_stars_of_a_docstring_stay_as_they_are():
    lines = ["Sum.", "", "y[n] = x[n] * 2", "a  b   c", "", "(N, *), or `*`", "", ">>> 2 * 3", ""]
    CONF["write_rst"](None, "", "", None, None, lines)
    assert lines[:8] == ["Sum.", "", "::", "", "    y[n] = x[n] * 2", "    a  b   c", "", r"(N, \*), or `*`"]
    assert ">>> 2 * 3" in lines
