"""The examples run, say what they promise to say, and refuse in one sentence.

Of the three kinds of tests these keep an invariant: padding that is masked reaches no norm.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "japanese_vowels.py"
NORMS = (
    "conv: batch, padding counted",
    "conv: batch, masked",
    "conv: layer",
    "gru: batch, sequence, counted",
    "gru: batch, sequence",
    "gru: batch, per step",
    "gru: layer",
    "gru: no norm",
)
needs_data = pytest.mark.skipif(
    importlib.util.find_spec("aeon") is None or importlib.util.find_spec("scipy") is None,
    reason="the example needs scipy and the data of aeon: pip install --no-deps aeon",
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, as a user starts it."""
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)


def find_rows(text: str) -> dict[str, list[str]]:
    """The cells behind each norm's name."""
    rows = (re.match(rf"({'|'.join(sorted(NORMS, key=len, reverse=True))}) {{2,}}(.+)", t) for t in text.splitlines())
    return {row[1]: row[2].split() for row in rows if row}


@needs_data
def test_japanese_vowels_runs_and_padding_reaches_only_those_that_count_it():
    done = run(str(EXAMPLE), "--quick")
    assert done.returncode == 0, done.stderr
    _, accuracy, changes = re.split(r"^(?:Test accuracy|Largest change)", done.stdout, flags=re.MULTILINE)
    assert set(find_rows(accuracy)) == set(NORMS)
    cells = {name: [float(cell) for cell in row] for name, row in find_rows(changes).items()}
    assert set(cells) == set(NORMS)
    for name, (*evaluation_and_training, alone) in cells.items():
        if "counted" in name:
            assert alone > 0.1 and evaluation_and_training[-1] > 0.1, f"{name}: padding does not show"
        else:
            assert alone == 0, f"{name}: padding reached the norm"
            assert max(evaluation_and_training) < 1e-5
        if name.startswith("gru") and "counted" not in name:
            assert not any(evaluation_and_training)  # nothing but rows that are there is read
    assert min(cells["conv: batch, padding counted"]) > 0  # in evaluation the convolution sees the norm's beta there
    reading = done.stdout.partition("Reading")[2]
    assert reading.count(" against ") == 6
    assert "Further padding changes conv: batch, padding counted" in " ".join(reading.split())


HIDDEN = """
import importlib.util, runpy, sys
find, hidden, path = importlib.util.find_spec, *sys.argv[1:]
importlib.util.find_spec = lambda name, *rest: None if name == hidden else find(name, *rest)
sys.path.insert(0, path.rpartition("/")[0])
sys.argv = ["example", "--quick"]
runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.parametrize("package", ["scipy", pytest.param("aeon", marks=needs_data)])
def test_japanese_vowels_without_a_package_says_what_to_install(package):
    done = run("-c", HIDDEN, package, EXAMPLE.as_posix())
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"japanese_vowels: .*{package}.* not installed; run pip install [^;]+\.\n", done.stderr)


def test_ranks_train_the_network_of_one_process():
    """Equals one process on the whole batch; ranks whose norms are not synchronized do not."""
    example = EXAMPLE.with_name("train_ddp.py")
    done = run("-m", "torch.distributed.run", "--nproc-per-node", "2", str(example), "--steps", "15")
    assert done.returncode == 0, done.stderr
    assert "have the same weights" in done.stdout
    away = {words[0]: float(words[1]) for words in re.findall(r"2 ranks, (.+?) {2,}([\d.e+-]+)", done.stdout)}
    assert away["synchronized"] < 1e-4 < 1e-2 < away["each by itself"]
