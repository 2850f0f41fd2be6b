"""On which versions of Python and torch does the test suite pass? The answer is docs/versions.md.

`python benchmarks/versions.py` tries every pair of the table, `python benchmarks/versions.py 3.13 2.15` one, or
as many as are named; the others keep what was found before. A wheel is built once for each state of the sources and for
each Python; one serves all from 3.12 on. Each pair gets an environment of its own in build/versions, about 3 GB, which
is deleted after its run. Needs nothing but the standard library.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"
BUILD = ROOT / "build" / "versions"

# The corners, what the make targets install (3.11 with 2.13), and what lies between.
PAIRS = (
    ("3.10", "2.8"),
    ("3.10", "2.14"),
    ("3.11", "2.10"),
    ("3.11", "2.13"),
    ("3.12", "2.9"),
    ("3.12", "2.12"),
    ("3.13", "2.11"),
    ("3.13", "2.15"),
    ("3.14", "2.15"),
)
EXTRAS = "compare,files,dev"
LONGEST = 90 * 60  # seconds for the tests of one pair

Pair = tuple[str, str]
Result = dict[str, Any]


class Untried(Exception):
    """Why a pair could not be tried."""


def call(*command: object, **options: Any) -> None:
    """Run a command; `Untried` says how it ended where it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise Untried(re.sub(r"^ERROR: |/\S*/", "", said[-1] if said else f"ended with {done.returncode}"))


def find_python(version: str) -> Path:
    """An interpreter of this version, in PATH or among those of pyenv."""
    found = shutil.which(f"python{version}")
    candidates = [Path(found)] if found else []
    candidates += sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for python in candidates:  # a shim of pyenv is there for versions that are not chosen
        said = subprocess.run([python, "--version"], capture_output=True, text=True)
        if said.returncode == 0 and said.stdout.startswith(f"Python {version}."):
            return python
    raise Untried(f"no Python {version} here")


def build_wheel(python: Path, version: str) -> Path:
    """The wheel for this Python, as `make wheel` builds it but without its manylinux tag."""
    is_stable = int(version.partition(".")[2]) >= 12
    tag = "cp312" if is_stable else "cp" + version.replace(".", "")
    folder = BUILD / "wheels" / find_state()
    if not (wheels := [*folder.glob(f"*-{tag}-*.whl")]):
        options = ("-C", "wheel.py-api=cp312") if is_stable else ()
        call(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, *options, ROOT)
        wheels = [*folder.glob(f"*-{tag}-*.whl")]
    return wheels[0]


def find_state() -> str:
    """A name for the state of all files that a wheel is made of."""
    digest = hashlib.sha256()
    for name in list_files("src", "CMakeLists.txt", "pyproject.toml", "README.md"):
        digest.update(name.encode() + (ROOT / name).read_bytes())
    return digest.hexdigest()[:12]


def list_files(*below: str) -> list[str]:
    """Every file that git knows and that is there."""
    listed = subprocess.run(["git", "ls-files", *below], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).exists()]


def copy_tree(tree: Path) -> None:
    """Every file that git knows. The package among them is only read: nothing there is on the way of an import."""
    for name in list_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)


def install(pair: Pair, folder: Path) -> Path:
    """The environment's interpreter, with the wheel, torch and what the tests need: the newest that fits."""
    version, torch = pair
    base = find_python(version)
    wheel = build_wheel(base, version)
    call(base, "-m", "venv", folder / "env")
    python = folder / "env" / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check")
    call(*pip, f"torch=={torch}.*", "numpy")
    # As pip knows it: torch.__version__ names the CUDA it was built for, the package need not.
    code = "from importlib.metadata import version; print(version('torch'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    fixed = folder / "constraints.txt"  # or another package would bring another torch
    fixed.write_text(f"torch=={found.stdout.strip()}\n", encoding="utf-8")
    call(*pip, "--constraint", fixed, f"anynorm[{EXTRAS}] @ {wheel.as_uri()}")
    call(*pip, "--no-deps", "aeon")  # its data files
    return python


def run_tests(python: Path, folder: Path) -> Result:
    """Tests and doctests in a copy of the tree; how they ended."""
    tree, report = folder / "tree", folder / "report.xml"
    copy_tree(tree)
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "PATH": f"{python.parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    command = [python, "-m", "pytest", "-c", "pyproject.toml", "--rootdir", ".", "-n", "2", f"--junitxml={report}"]
    # Each torch and Python warns of other things of its own; what `make test` installs must not warn at all.
    command += ["-W", "default", "--ignore-glob=/*/integrations/*", "tests", "--pyargs", "anynorm"]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        try:
            subprocess.run(command, cwd=tree, env=environment, stdout=log, stderr=log, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            return {"outcome": "fail", "failures": {"all": f"not finished after {LONGEST // 60} minutes"}}
    if not report.exists():
        return {"outcome": "fail", "failures": {"all": "pytest wrote no report"}}
    return read_report(report)


def read_report(report: Path) -> Result:
    """pytest's report in few words: how many tests, which failed with what message, and why others were skipped."""
    failures, skips, count = {}, Counter[str](), 0
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        count += 1
        for told in case:
            first = (told.get("message") or "").split("\n")[0][:200]
            if told.tag in ("failure", "error"):
                failures[f"{case.get('classname', '')}.{case.get('name')}"] = re.sub(r"/\S*/", "", first)
            elif told.tag == "skipped" and told.get("type") == "pytest.skip":
                skips[re.sub(r"/\S*/", "", first)] += 1
    passed = count - len(failures) - sum(skips.values())
    outcome = "fail" if failures or not passed else "pass"
    return {"outcome": outcome, "passed": passed, "failures": failures, "skips": dict(skips.most_common())}


def find_versions(python: Path) -> dict[str, str]:
    """What was installed, as the environment says it."""
    code = "import json, platform, torch, numpy; from anynorm.engine import kernels; print(json.dumps(dict("
    code += "python=platform.python_version(), torch=torch.__version__, numpy=numpy.__version__, "
    code += "kernels=kernels.describe()['kernels'].split(' (')[0], reads_tensors=bool(kernels.READS_TENSORS))))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=BUILD)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def try_pair(pair: Pair) -> Result:
    """One pair from an empty folder to its result; the environment is gone afterwards."""
    folder, start = BUILD / "-".join(pair), time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    facts: Result = {"on": datetime.date.today().isoformat()}
    try:
        python = install(pair, folder)
        facts |= find_versions(python) | run_tests(python, folder)
    except Untried as reason:
        facts |= {"outcome": "not tried", "reason": str(reason)}
    finally:
        shutil.rmtree(folder / "env", ignore_errors=True)
        shutil.rmtree(folder / "tree", ignore_errors=True)
    return facts | {"minutes": round((time.monotonic() - start) / 60)}


def write_row(pair: Pair, result: Result) -> str:
    """A pair as a row of the table."""
    kernels = result.get("kernels", "")
    if kernels:
        kernels += ", tensors read by " + ("the compiled calls" if result["reads_tensors"] else "Python")
    failed = len(result.get("failures", ()))
    skipped = sum(result["skips"].values()) if "skips" in result else "an unknown number"
    counts = f"{result.get('passed', 0)} passed, {skipped} skipped, {failed} failed" if "passed" in result else ""
    outcome = f"**{result['outcome']}**" + (f": {result['reason']}" if "reason" in result else "")
    known = (result.get(name, given) for name, given in zip(("python", "torch"), pair))
    return f"| {' | '.join((*known, outcome, counts, kernels, result.get('on', '')))} |"


def write_reasons(pair: Pair, result: Result) -> list[str]:
    """What failed and what was skipped on a pair, with the reasons."""
    lines = [result["note"] + "\n"] if "note" in result else []  # by hand: what became of the failures since
    lines += [f"- failed: `{name}`: {reason}" for name, reason in result.get("failures", {}).items()]
    lines += [f"- {count} skipped: {reason}" for reason, count in result.get("skips", {}).items()]
    return [f"### Python {pair[0]}, torch {pair[1]}", "\n".join(lines)] if lines else []


def write_page(results: dict[str, Result]) -> str:
    """The page; a pair without a result was not tried."""
    found = {pair: results.get(" ".join(pair), {"outcome": "not tried"}) for pair in PAIRS}
    rows = ["| Python | torch | suite | tests | kernels | run on |", "|---|---|---|---|---|---|"]
    rows += [write_row(pair, result) for pair, result in found.items()]
    parts = [
        "# Versions of Python and torch",
        "The whole test suite with its doctests, on Linux, against the wheel that was built for that Python, with "
        "the newest of all other packages that install beside that torch. Warnings are errors in `make test` alone: "
        "each torch warns of other things. `make versions` does it again, pair by "
        'pair, and writes this page; `make versions ARGS="3.13 2.15"` does one pair.',
        "\n".join(rows),
        "torch tells the compiled calls where tensors lie since 2.10. Before, Python finds their addresses "
        "for the same kernels, which makes each call slower.",
        "## What failed, and what was skipped",
        *(part for pair, result in found.items() for part in write_reasons(pair, result)),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str]) -> None:
    """Try the pairs that are named, or all, and write what was found after each."""
    pairs = [*zip(arguments[::2], arguments[1::2])] or PAIRS
    if len(arguments) % 2 or not set(pairs) <= set(PAIRS):
        known = ", ".join(map(" ".join, PAIRS))
        raise SystemExit(f"versions: the pair must be in the table; got {' '.join(arguments)}; choose among {known}")
    for pair in pairs:
        print(f"Python {pair[0]}, torch {pair[1]} ...", flush=True)
        result = try_pair(pair)
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        results[" ".join(pair)] = result
        ordered = {key: results[key] for key in map(" ".join, PAIRS) if key in results}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(write_page(ordered), encoding="utf-8")
        print(f"  {result['outcome']} {result.get('reason', '')}, {result['minutes']} minutes", flush=True)
        for name, reason in result.get("failures", {}).items():
            print(f"  {name}: {reason}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
