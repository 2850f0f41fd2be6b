"""The real command line: a whole study, interruptions, and input that cannot be used.

Nothing here depends on the speed of the machine: budgets are ample, and who must be interrupted waits for it. What the
budget itself promises stands in test_budget.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from anynorm.apps import cli

COMMAND = [sys.executable, "-c", "from anynorm.apps.cli import main; main()", "compare", "--minutes", "60"]
SMALL = ["--data", "table.npz", "--model", "net:make", "--norms", "none,batch,layer,instance", "--batch-sizes", "32,2"]
SMALL += ["--rates", "0.01,0.1", "--seeds", "2", "--images", "128"]
# Seconds until a process is taken to hang. A slow machine needs a fraction of it, and a sound one never waits for it.
PATIENCE = 600

# A worker may train only while the journal is shorter than the gate says, so that an interruption meets a busy study.
GATED = """
import multiprocessing, pathlib, time
from torch import nn

def is_shut():
    runs = pathlib.Path("anynorm-compare/journal.jsonl").read_bytes().splitlines()
    return len(runs) >= int(pathlib.Path("gate").read_text())

def make(norm):
    while multiprocessing.parent_process() is not None and is_shut():
        time.sleep(0.01)
    return nn.Sequential(nn.Linear(3, 6), norm(6, 0), nn.ReLU(), nn.Linear(6, 2))
"""


def write_table(folder):
    """A table of three columns, in two classes that a small network can tell apart; scikit-learn's take a second."""
    x = np.random.default_rng(0).normal(size=(300, 3))
    np.savez(folder / "table.npz", x=x, y=(x.sum(1) > 0).astype(int))


def start(folder, *options):
    """The command as a process group of its own, as a shell would start it: it hears Ctrl-C, also where the tests run
    in the background of a script, whose children do not."""
    return subprocess.Popen(
        [*COMMAND, *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def read_keys(folder):
    """Keys of the whole lines of a journal."""
    path = folder / "anynorm-compare" / "journal.jsonl"
    if not path.exists():
        return []
    return [json.loads(line)["key"] for line in path.read_bytes().splitlines() if line.endswith(b"}")]


def open_gate(folder, runs):
    """Let the workers train until the journal has this many lines; in one step, for they read it all the time."""
    (folder / "draft").write_text(str(runs))
    os.replace(folder / "draft", folder / "gate")


def wait_for_runs(folder, count, process):
    """Wait until the journal holds `count` runs."""
    until = time.monotonic() + PATIENCE
    while len(read_keys(folder)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def find_processes(folder):
    """Processes that work in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "cwd") == str(folder.resolve()):
                found.append(entry.name)
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks for left-over processes in /proc")
def test_killed_interrupted_and_finished(tmp_path, monkeypatch):
    """One study in three attempts: kill -9, Ctrl-C, and to its end; nothing is run twice."""
    write_table(tmp_path)
    (tmp_path / "net.py").write_text(GATED)
    open_gate(tmp_path, 3)
    first = start(tmp_path, *SMALL)
    wait_for_runs(tmp_path, 3, first)
    first.kill()
    first.communicate(timeout=PATIENCE)
    until = time.monotonic() + PATIENCE
    while find_processes(tmp_path):
        assert time.monotonic() < until, "workers outlive a killed parent"
        time.sleep(0.05)
    journal = tmp_path / "anynorm-compare" / "journal.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"key": "torn')
    kept = read_keys(tmp_path)

    open_gate(tmp_path, len(kept) + 3)
    second = start(tmp_path, *SMALL)
    wait_for_runs(tmp_path, len(kept) + 2, second)
    os.killpg(second.pid, signal.SIGINT)
    out, err = second.communicate(timeout=PATIENCE)
    assert second.returncode == 130
    assert "Traceback" not in out + err
    assert "the same command goes on from here" in out
    assert (tmp_path / "anynorm-compare" / "report.html").exists()
    assert find_processes(tmp_path) == []
    assert len(read_keys(tmp_path)) < 24

    open_gate(tmp_path, 1000)
    third = start(tmp_path, *SMALL)
    out, err = third.communicate(timeout=PATIENCE)
    assert third.returncode == 0, err
    assert err == ""
    results = json.loads((tmp_path / "anynorm-compare" / "results.json").read_text())
    check_whole_study(results, out)
    keys = read_keys(tmp_path)
    assert len(keys) == len(set(keys)) == results["planned_runs"]
    assert set(kept) <= set(keys)

    # Other options in the same directory: the earlier report is kept and said to be.
    code, out = run_inside(monkeypatch, tmp_path, *SMALL, "--seeds", "1")
    assert code == 0
    assert "were kept as report-" in out
    assert len(read_keys(tmp_path)) == len(keys), "runs that both studies share are not run again"
    assert "one seed" in json.loads((tmp_path / "anynorm-compare" / "results.json").read_text())["verdict"]


def check_whole_study(results, out):
    """All of SMALL is there: 3 norms x 2 batch sizes x (2 rates + 2 seeds)."""
    assert results["finished_runs"] == results["planned_runs"] == 24
    assert {reason for *_, reason in results["impossible"]} == {
        "instance norm on a dense layer has one value in each group, and one value minus its own mean is always 0"
    }
    assert [choice["batch"] for choice in results["choices"]] == ["32", "2"]
    assert "n/a" in out
    assert results["verdict"] in out
    finals = [run for run in results["runs"] if run["final"]]
    assert {run["seen"] for run in finals} == {128}
    assert results["versions"]["torch"]
    assert results["options"]["seeds"] == 2


def run_inside(monkeypatch, folder, *arguments):
    """The command in this process, which has imported everything: exit code and what it prints."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    ended = CliRunner().invoke(cli.app, [*COMMAND[3:], *arguments])
    for name in [name for name, module in sys.modules.items() if is_below(module, folder)]:
        del sys.modules[name]
    return ended.exit_code, ended.output


def is_below(module, folder):
    """Whether a module's file lies in a folder."""
    return str(getattr(module, "__file__", None) or "").startswith(str(folder))


NETWORKS = """
from torch import nn
def wrong_outputs(norm): return nn.Sequential(nn.Flatten(), nn.Linear(64, 7), norm(7, 0))
def wrong_input(norm): return nn.Sequential(nn.Flatten(), nn.Linear(65, 10))
def raises(norm): raise RuntimeError("no luck\\nsecond line")
def no_network(norm, *rest): return 3
def bad_dims(norm): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), norm(10, "two"))
number = 3
"""

# Option, value, and words that the sentence must hold.
BAD = [
    ("--norms", "btch", "did you mean batch"),
    ("--norms", "", "--norms"),
    ("--batch-sizes", "64,0", "got '0'"),
    ("--batch-sizes", "64:8:2", "got '64:8:2'"),
    ("--batch-sizes", "-4", "got '-4'"),
    ("--batch-sizes", "8,,2", "comma"),
    ("--batch-sizes", "9999", "must fit"),
    ("--rates", "fast", "got 'fast'"),
    ("--rates", "0", "above 0"),
    ("--rates", "inf", "finite"),
    ("--seeds", "0", "--seeds"),
    ("--seeds", "1.5", "whole number"),
    ("--images", "9", "--images"),
    ("--minutes", "-1", "--minutes"),
    ("--minutes", "nan", "--minutes"),
    ("--minutes", "soon", "got 'soon'"),
    ("--data", "nowhere.npz", "no file 'nowhere.npz'"),
    ("--data", "broken.npz", "cannot be read"),
    ("--data", "tiny.npz", "--batch-sizes"),
    ("--model", "resnet", "module:factory"),
    ("--model", "nowhere:make", "does not import"),
    ("--model", "broken_module:make", "SyntaxError"),
    ("--model", "leaving_module:make", "SystemExit"),
    ("--model", "bad_networks:absent", "nothing of that name"),
    ("--model", "bad_networks:number", "holds a int"),
    ("--model", "bad_networks:wrong_outputs", "(64, 7)"),
    ("--model", "bad_networks:wrong_input", "mat1 and mat2"),
    ("--model", "bad_networks:raises", "no luck"),
    ("--model", "bad_networks:no_network", "returned a int"),
    ("--model", "bad_networks:bad_dims", "'two'"),
    ("--out", "broken.npz", "--out"),
    ("--data", "nowhere.csv", "no file 'nowhere.csv'"),
    ("--data", "words.csv", "column 'b' of 'words.csv' holds 'no'"),
    ("--task", "regression", "takes auto, classes, labels, values"),
    ("--task", "labels", "0 and 1 for each label"),
    ("--loss", "nowhere", "module:function"),
    ("--loss", "bad_networks:raises", "fails on outputs"),
    ("--metric", "bad_networks:absent:lower", "nothing of that name"),
    ("--optimizer", "bad_networks:no_network", "returned a int"),
    ("--checkpoint", "nowhere.pt", "no file 'nowhere.pt'"),
    ("--checkpoint", "broken.npz", "cannot be read as weights"),
]


class NoWorkers:
    """Stands in for the processes, which cost a second here and a core, and have nothing to do."""

    def __init__(self):
        self.running = True
        self.started.append(self)

    def stop(self):
        self.running = False


@pytest.mark.parametrize(("option", "value", "said"), BAD, ids=[f"{o}={v}" for o, v, _ in BAD])
def test_bad_input_ends_in_one_sentence(monkeypatch, capsys, tmp_path, option, value, said):
    monkeypatch.setattr(NoWorkers, "started", [], raising=False)
    monkeypatch.setattr("anynorm.apps.studies.compare.compare.Workers", NoWorkers)
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    (tmp_path / "broken_module.py").write_text("def make(:\n")
    (tmp_path / "leaving_module.py").write_text("raise SystemExit(7)\n")
    (tmp_path / "bad_networks.py").write_text(NETWORKS)
    (tmp_path / "words.csv").write_text("a,b,y\n" + "1,no,2\n" * 9)
    np.savez(tmp_path / "tiny.npz", x=np.zeros((9, 4)), y=np.arange(9) % 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    given = {"--data": "digits", option: value}
    monkeypatch.setattr(sys, "argv", ["anynorm", "compare", *(word for pair in given.items() for word in pair)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    err = capsys.readouterr().err
    sys.modules.pop("bad_networks", None)
    assert ended.value.code == 2
    assert not any(workers.running for workers in NoWorkers.started)
    assert said in err
    assert err.startswith("anynorm: compare")
    assert err.endswith(".\n") or err.endswith("?\n")
    assert err.count("\n") == 1


def test_bad_input_of_a_real_process(tmp_path):
    process = start(tmp_path, "--data", "nowhere.npz")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert out == ""
    assert err.startswith("anynorm: compare --data: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert find_processes(tmp_path) == []


def test_a_network_of_ones_own_and_a_batch_size_that_changes(monkeypatch, tmp_path):
    """A table of three columns, a network that fails with one norm only, and a schedule."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make(norm):\n"
        "    return nn.Sequential(nn.Linear(3, 6), norm(6, 0), nn.ReLU(), nn.Linear(6, 2))\n"
    )
    write_table(tmp_path)
    options = ["--data", "table.npz", "--model", "net:make", "--norms", "batch,instance", "--batch-sizes", "32:4"]
    options += ["--rates", "0.1", "--seeds", "2", "--images", "128"]
    code, out = run_inside(monkeypatch, tmp_path, *options)
    assert code == 0, out
    results = json.loads((tmp_path / "anynorm-compare" / "results.json").read_text())
    assert results["finished_runs"] == 2
    assert results["runs"][0]["steps"] == 2 + 16
    assert "Only one norm was run" in results["verdict"]
    assert "n/a" in out
