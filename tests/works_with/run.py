"""Run the scripts beside this file, and write what each printed into docs/works-with.md.

A script's first line is its docstring, ``package: what is done``. It asserts, and prints ``works: ...``, ``with a
catch: ...`` or ``does not: ...`` last. With arguments, only scripts whose names contain one of them run; the rows of
the others stay.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "works-with.md"
MARKED = re.compile(r"(?<=<!-- tools -->\n).*?(?=<!-- /tools -->)", re.DOTALL)
VERDICTS = {"works": "works", "with a catch": "with a catch", "does not": "does not work"}
HEAD = "\n| what | tried | verdict | | ran |\n|---|---|---|---|---|\n"
SECONDS = 600  # for one script, on a machine that does something else too


def find_scripts() -> list[Path]:
    return sorted(HERE.glob("with_*.py"))


def read_heading(script: Path) -> tuple[str, str]:
    """What is used, the package's name first, and what is done with it."""
    text = ast.get_docstring(ast.parse(script.read_text())) or ""
    what, _, done = text.partition("\n")[0].partition(": ")
    return what, done


def make_row(script: Path, verdict: str, note: str) -> str:
    """A line of the table, with the package's version and today's date."""
    what, done = read_heading(script)
    package, _, part = what.partition(" ")
    named = f"{package} {version(package).partition('+')[0]}{f', {part}' if part else ''}"
    cells = (f"[{named}](../tests/works_with/{script.name})", done, verdict, note, time.strftime("%Y-%m-%d"))
    return f"| {' | '.join(cells)} |"


def run(script: Path) -> tuple[str, str]:
    """The verdict and its note; a script that fails is one that does not work, with its error."""
    command = [sys.executable, "-W", "ignore", str(script)]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "FAILED", f"no end within {SECONDS} s"
    last = (found.stdout.strip().splitlines() or [""])[-1]
    verdict, _, note = last.partition(": ")
    if found.returncode or verdict not in VERDICTS:
        print(found.stdout, found.stderr, sep="\n")
        return "FAILED", ((found.stderr or last).strip().splitlines() or ["printed nothing"])[-1].replace("|", "/")
    return VERDICTS[verdict], note


def read_rows(text: str) -> dict[str, str]:
    """The table's rows, by script."""
    return {name: row for row in text.splitlines() for name in re.findall(r"\(\.\./tests/works_with/(\w+\.py)\)", row)}


def main() -> None:
    names = sys.argv[1:]
    scripts = [script for script in find_scripts() if not names or any(name in script.name for name in names)]
    failed = []
    for script in scripts:
        verdict, note = run(script)
        print(f"{script.stem.removeprefix('with_'):24} {verdict}: {note}", flush=True)
        failed += [script.name] if verdict == "FAILED" else []
        page = PAGE.read_text()  # After each: an interrupted run keeps what it found.
        rows = read_rows(MARKED.search(page)[0]) | {script.name: make_row(script, verdict, note)}
        table = HEAD + "".join(f"{rows[each.name]}\n" for each in find_scripts() if each.name in rows) + "\n"
        before, after = MARKED.split(page)
        PAGE.write_text(before + table + after)
    if failed:
        sys.exit(f"{len(failed)} of {len(scripts)} failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
