"""README and docs say what is true: tables equal the family, blocks run, and what they name exists.

Of the three kinds of tests these keep an invariant: text and code agree.
"""

from __future__ import annotations

import doctest
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import typer.main

from anynorm.apps import cli
from anynorm.family import FAMILY, Scheme

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(
    [*(path for name in ("README", "CONTRIBUTING", "CHANGELOG") if (path := ROOT / f"{name}.md").exists())]
    + [*(ROOT / "docs").rglob("*.md")]
)
SHELLS = ("", "sh", "bash", "console", "shell")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[\w+-]*)[^\n`]*\n(?P<body>.*?)^ *(?P=ticks) *$",
    re.MULTILINE | re.DOTALL,
)
ROOTS = "work|home|root|tmp|usr|opt|etc|mnt|Users|private|proc|srv|var/|dev/"


def name_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_page)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and how many lines stand before that text."""

    language: str
    text: str
    before: int


def find_blocks(text: str) -> list[Block]:
    """Every fenced block, also an indented one, with its indentation taken off."""
    blocks = []
    for match in FENCE.finditer(text):
        lines = [line.removeprefix(match["indent"]) for line in match["body"].splitlines(keepends=True)]
        blocks.append(Block(match["language"], "".join(lines), text.count("\n", 0, match.start("body"))))
    return blocks


def cut_blocks(text: str) -> str:
    """The prose: a link or a heading inside a block is none."""
    return FENCE.sub("", text)


def find_commands(text: str) -> list[str]:
    """What a reader would type: lines of shell blocks and code spans, cut at ``&&``, ``;`` and ``|``."""
    lines = [line for block in find_blocks(text) if block.language in SHELLS for line in block.text.splitlines()]
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", cut_blocks(text))
    return [part.strip().removeprefix("$ ") for line in lines for part in re.split(r"&&|;|\|", line)]


def make_row(scheme: Scheme) -> str:
    """A scheme as a row of the family table."""
    cells = (
        scheme.name,
        f"`{scheme.pattern}`",
        "yes" if scheme.centred else "no",
        ", ".join(scheme.source_names),
        scheme.affine,
        ", ".join(scheme.classes),
    )
    return f"| {' | '.join(cells)} |"


def read_table(path: Path) -> list[str]:
    """The rows between the markers, without header; links are reduced to their words, spaces to one."""
    found = re.findall(r"<!-- family -->(.*?)<!-- /family -->", path.read_text(), re.DOTALL)
    name = path.relative_to(ROOT)
    assert len(found) == 1, (
        f"{name} needs one family table between <!-- family --> and <!-- /family -->; found {len(found)}; its rows:\n"
        + "\n".join(map(make_row, FAMILY.values()))
    )
    rows = [line.strip() for line in found[0].splitlines() if line.strip()]
    assert set(rows[1]) <= set("|-: "), f"{name}: under the family table's header must be a line |---|; got {rows[1]}"
    return [re.sub(r" +", " ", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", row)) for row in rows[2:]]


def find_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def find_anchors(text: str) -> set[str]:
    """The names GitHub gives to headings."""
    headings = re.findall(r"^#+ +(.+?) *#* *$", cut_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_table_is_the_family():
    assert read_table(README) == [make_row(scheme) for scheme in FAMILY.values()]


@pytest.mark.parametrize("scheme", FAMILY.values(), ids=FAMILY)
def test_norm_has_a_page_that_names_it(scheme):
    page = ROOT / "docs" / "norms" / f"{scheme.name}.md"
    assert page.exists(), f"{scheme.name} is in FAMILY and has no page; write {page.relative_to(ROOT)}"
    assert read_table(page) == [make_row(scheme)]
    prose = cut_blocks(page.read_text())
    for name in (*scheme.classes, scheme.function or scheme.classes[0]):
        assert re.search(rf"\b{name}\b", prose), f"{page.name} does not name {name}"


def find_python(page: Path) -> list[Block]:
    """The Python blocks of a page that are to run."""
    blocks = [block for block in find_blocks(page.read_text()) if block.language in ("python", "py", "pycon")]
    return [block for block in blocks if not block.text.lstrip().startswith("# not run")]


@pytest.mark.parametrize("page", [page for page in PAGES if find_python(page)], ids=name_page)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    blocks = find_python(page)
    monkeypatch.chdir(tmp_path)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    names: dict = {"__name__": "__main__"}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for block in blocks:
                run(block, page, names)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def run(block: Block, page: Path, names: dict) -> None:
    """Run a block in `names`; where it shows a session, compare what is printed."""
    if not re.search(r"^ *>>>", block.text, re.MULTILINE):
        exec(compile("\n" * block.before + block.text, str(page), "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(block.text, names, page.name, str(page), block.before)
    printed: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=printed.append, clear_globs=False)
    names.update(test.globs)
    assert not printed, "".join(printed)


@every_page
def test_links_lead_somewhere(page):
    text = page.read_text()
    prose = re.sub(r"`[^`\n]*`", "", cut_blocks(text))
    for link in re.findall(r"\]\(<?([^)\s>]+)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose):
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name} links to {link}, which does not exist"
        assert target.resolve().is_relative_to(ROOT), f"{page.name} links to {link}, outside the project"
        if anchor and target.suffix == ".md":
            assert anchor in find_anchors(target.read_text()), f"{page.name}: {link} names no heading of {target.name}"


@every_page
def test_make_targets_exist(page):
    for command in find_commands(page.read_text()):
        words = re.match(r"make((?: +[\w=./-]+)*)", command)
        for word in words[1].split() if words else ():
            if "=" in word or word.startswith("-"):
                break
            assert word in find_targets(), f"{page.name} names `{command}`; the Makefile has no target {word}"


@every_page
def test_commands_exist(page):
    for line in find_commands(page.read_text()):
        words = re.match(r"(?:\S*/)?anynorm +([a-z][\w-]*.*)", line)
        if not words:
            continue
        command, rest = typer.main.get_command(cli.app), words[1].split()
        while hasattr(command, "commands"):
            assert rest and rest[0] in command.commands, f"{page.name} names `{line}`; there is no such command"
            command = command.commands[rest.pop(0)]
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        for option in (word for word in rest if word.startswith("--")):
            assert option in known, f"{page.name} names `{line}`; anynorm {command.name} has no option {option}"


@every_page
def test_no_absolute_path(page):
    text = re.sub(r"\w+://\S+", "", page.read_text())
    found = re.search(rf"(?<![\w.)\]>])/(?:{ROOTS})\S*|\b[A-Z]:\\\S*", text)
    assert not found, f"{page.name} names {found[0]!r}, a path of one machine"  # type: ignore[index]


SAMPLE = """# A title: with `code`

[here](#a-title-with-code)

```python
x = [1](2)
```

- in a list

  ```sh
  cd x && make test ARGS=-k   # comment
  anynorm list | head
  ```

`make check`, make sure.
"""


def test_blocks_keep_language_text_and_line():
    python, shell = find_blocks(SAMPLE)
    assert (python.language, python.text) == ("python", "x = [1](2)\n")
    assert SAMPLE.splitlines()[python.before] == "x = [1](2)"
    assert shell.text.startswith("cd x && make test")
    assert "x = [1](2)" not in cut_blocks(SAMPLE)
    assert find_anchors(SAMPLE) == {"a-title-with-code"}


def test_commands_are_read_from_code_only():
    found = find_commands(SAMPLE)
    assert {"make test ARGS=-k   # comment", "anynorm list", "make check"} <= set(found)
    assert not any(command.startswith("make sure") for command in found)


def test_a_wrong_session_and_a_wrong_block_fail():
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        run(Block("python", ">>> 1 + 1\n3\n", 0), README, {})
    with pytest.raises(ZeroDivisionError):
        run(Block("python", "1 / 0\n", 0), README, {})


def test_a_session_and_a_block_share_names():
    names: dict = {}
    run(Block("python", ">>> a = 1\n", 0), README, names)
    run(Block("python", "assert a == 1\n", 0), README, names)


def test_readme_states_the_largest_errors_of_the_accuracy_page():
    rows = re.findall(
        r"^\|[^|]*\| (anynorm(?:, compiled)?|torch) \|(.+)\|$", (ROOT / "docs/accuracy.md").read_text(), re.M
    )
    largest = {"anynorm": 0.0, "torch": 0.0}
    for path, cells in rows:
        errors = [float(number) for number in re.findall(r"[\d.]+e[+-]\d+", cells)]
        library = path.split(",")[0]
        largest[library] = max([largest[library], *errors])
    assert largest["anynorm"] <= 1e-6
    ours, theirs = (re.sub("e([+-])0", r"e\1", f"{error:.0e}") for error in largest.values())
    prose = " ".join(README.read_text().split())
    assert f"The largest error measured is {ours} for anynorm and {theirs} for torch" in prose


@every_page
def test_no_placeholder_is_left(page):
    assert not re.search(r"\bANYNORM_[A-Z]+\b(?<!ANYNORM_KERNELS)(?<!ANYNORM_ISA)|TODO|FIXME", page.read_text())
