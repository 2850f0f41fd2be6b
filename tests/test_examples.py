"""The examples run, and say what they promise to say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_ddp.py"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, as a user starts it."""
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)


def test_ranks_train_the_network_of_one_process():
    """Equals one process on the whole batch; ranks whose norms are not synchronized do not."""
    done = run("-m", "torch.distributed.run", "--nproc-per-node", "2", str(EXAMPLE), "--steps", "15")
    assert done.returncode == 0, done.stderr
    assert "have the same weights" in done.stdout
    away = {words[0]: float(words[1]) for words in re.findall(r"2 ranks, (.+?) {2,}([\d.e+-]+)", done.stdout)}
    assert away["synchronized"] < 1e-4 < 1e-2 < away["each by itself"]
