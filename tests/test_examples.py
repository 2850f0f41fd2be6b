"""The examples run, and say what they promise to say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, as a user starts it."""
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)


def test_ranks_train_the_network_of_one_process():
    """Equals one process on the whole batch; ranks whose norms are not synchronized do not."""
    done = run("-m", "torch.distributed.run", "--nproc-per-node", "2", str(EXAMPLES / "train_ddp.py"), "--steps", "15")
    assert done.returncode == 0, done.stderr
    assert "have the same weights" in done.stdout
    away = {words[0]: float(words[1]) for words in re.findall(r"2 ranks, (.+?) {2,}([\d.e+-]+)", done.stdout)}
    assert away["synchronized"] < 1e-4 < 1e-2 < away["each by itself"]


def test_statistics_at_test_time_mend_a_shift_and_are_ruined_by_classes_in_turn():
    """Each by tens of points, as the claim `shift` says; averages of the target data do not mind the order."""
    done = run(str(EXAMPLES / "adapt.py"))
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+).* of (\d+) ((?: +[\d.]+)+)$", done.stdout, re.MULTILINE)
    ways = "averages", "batch", "prior=16", "adabn", "tent"
    found = {(name, int(n)): dict(zip(ways, map(float, values.split()), strict=True)) for name, n, values in rows}
    shifted, sorted_, small = found["brighter", 100], found["by", 100], found["clean", 4]
    assert all(shifted[way] > shifted["averages"] + 30 for way in ways[1:])
    assert sorted_["batch"] < sorted_["averages"] - 50 < sorted_["adabn"] - 45
    assert small["batch"] < small["prior=16"] - 15


def test_the_doctor_finds_and_mends_what_batches_of_one_class_did():
    """The layer, the cause, and tens of points of accuracy on images that it never saw."""
    done = run(str(EXAMPLES / "train_eval_gap.py"))
    assert done.returncode == 0, done.stderr
    assert "Cause: batches of few classes" in done.stdout
    assert re.search(r"mended train-eval-gap at layer \d+: loss", done.stdout)
    seen = float(re.search(r"training mode: ([\d.]+) %", done.stdout)[1])
    before, after = map(float, re.search(r"evaluation: ([\d.]+) % before, ([\d.]+) % after", done.stdout).groups())
    assert seen > 90
    assert before < 40
    assert after > 80
