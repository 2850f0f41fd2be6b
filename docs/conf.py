"""The documentation site: `make docs` builds it into build/site, from the files as they lie in the repository.

Sphinx reads from the repository's root, so that links between pages, to the README and to sources are the same here and
on a host that shows the files themselves. A new page needs a line in `CONTENTS`, or a test fails.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

# Every page, once, by its part of the table of contents.
CONTENTS: dict[str, list[str]] = {
    "Start": ["docs/installing", "docs/tutorial", "docs/try-and-explain", "docs/gallery"],
    "Guides": [
        "docs/doctor",
        "docs/compare",
        "docs/padding",
        "docs/small-batch",
        "docs/sync",
        "docs/accumulate",
        "docs/recalibrate",
        "docs/monitor",
        "docs/surgery",
        "docs/recurrent",
        "docs/fused",
        "docs/export",
        "docs/works-with",
    ],
    "Evidence": ["docs/claims", "docs/speed", "docs/accuracy"],
    "The norms": [
        "docs/norms/batch",
        "docs/norms/ghost",
        "docs/norms/renorm",
        "docs/norms/sync",
        "docs/norms/layer",
        "docs/norms/rms",
        "docs/norms/instance",
        "docs/norms/group",
        "docs/outside",
    ],
    "Reference": [
        "docs/reference/models",
        "docs/reference/doctor",
        "docs/reference/norms",
        "docs/reference/fused",
        "docs/reference/recurrent",
        "docs/reference/functional",
        "docs/reference/masks",
        "docs/reference/settings",
        "docs/reference/formula",
    ],
    "How it works": ["docs/architecture", "docs/kernels", "docs/allocator"],
    "Project": ["docs/versions", "docs/public", "CONTRIBUTING", "SECURITY", "CHANGELOG"],
}

project = "anynorm"
copyright = "The anynorm developers"
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/**"]
exclude_patterns = [".venv", "build", "src", "tests", "benchmarks", "examples"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_title = "anynorm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False

suppress_warnings = ["myst.header"]  # docs/claims.md goes from its title to headings of the third level
myst_heading_anchors = 4  # links name headings as the host does
highlight_language = "none"  # formulas are no Python; what is says so
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
# A colon in "Returns: ..." separates no type here.
napoleon_custom_sections = ["Source", "Returns"]
napoleon_use_param = False  # several arguments with one description stay together


def write_contents(app: Any, docname: str, source: list[str]) -> None:
    """The table of contents, which stands behind the README's last line and shows at the side alone."""
    if docname == root_doc:
        for caption, pages in CONTENTS.items():
            source[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}\n", *pages, "```\n"])


FORMULA = re.compile(r"^\S.* = |\S {3,}\S")
QUOTED = re.compile(r"(`[^`]*`)")


def write_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: lines that are a formula or a table stay as they are, and a star is a star."""
    result: list[str] = []
    for paragraph in "\n".join(lines).split("\n\n"):
        part = paragraph.split("\n")
        if not paragraph.startswith((" ", ">>>")) and all(FORMULA.search(line) for line in part if line):
            part = ["::", "", *(f"    {line}" for line in part)]
        elif ">>>" not in paragraph:
            part = [escape_stars(line) for line in part]
        result += [*part, ""]
    lines[:] = result


def escape_stars(line: str) -> str:
    """The line with every star outside of backticks escaped."""
    parts = QUOTED.split(line)
    return "".join(part if part.startswith("`") else part.replace("*", r"\*") for part in parts)


def copy_home(app: Any, error: Exception | None) -> None:
    """The README is the first page under the name that servers look for, too."""
    if error is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", write_contents)
    app.connect("autodoc-process-docstring", write_rst, priority=400)  # before napoleon
    app.connect("build-finished", copy_home)
