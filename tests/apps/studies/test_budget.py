"""The budget: what `--minutes` promises, by a clock of the tests' own, so that no machine is too slow for it."""

import json
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from anynorm.apps.studies import session as sessions
from anynorm.apps.studies.compare import agenda
from anynorm.apps.studies.compare.agenda import Comparison
from anynorm.apps.studies.compare.compare import compare, identify
from anynorm.apps.studies.compare.options import Options
from anynorm.apps.studies.compare.plan import Plan
from anynorm.apps.studies.journal import Journal
from anynorm.apps.studies.metrics import Metric
from anynorm.apps.studies.progress import LiveProgress
from anynorm.apps.studies.session import Session

CONTEXT = {
    "data": "d",
    "models": {"mlp": "m"},
    "versions": {"anynorm": "1", "torch": "2"},
    "data_sizes": [3, 3, 3],
    "metric": Metric(),
}
RUN_SECONDS = {"none": 1.0, "batch": 3.0, "layer": 10.0}


class Clock:
    """Stands in for the module `time`."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class PretendedWorkers:
    """Two workers whose runs take RUN_SECONDS by the pretended clock."""

    def __init__(self, clock):
        self.clock, self.all, self.expected = clock, [], []
        self.all = [SimpleNamespace(run=None, until=0.0) for _ in range(2)]
        for worker in self.all:
            worker.start = lambda run, worker=worker: self.begin(worker, run)

    def begin(self, worker, run):
        worker.run, worker.until = run, self.clock.now + RUN_SECONDS[run.norm]
        self.expected.append((run, worker.until))

    @property
    def idle(self):
        return [worker for worker in self.all if worker.run is None]

    @property
    def busy(self):
        return {worker.run for worker in self.all if worker.run is not None}

    def wait(self, timeout):
        assert timeout >= 0
        # Real time never stands still, not even where nothing is waited for.
        passed = self.clock.now + max(timeout, 0.01)
        self.clock.now = min([passed, *(worker.until for worker in self.all if worker.run is not None)])
        ended = []
        for worker in self.all:
            if worker.run is not None and worker.until <= self.clock.now:
                run, worker.run = worker.run, None
                record = {**vars(run), "status": "finished", "validation_score": 0.5, "validation_loss": 1.0}
                ended.append((run, record | {"test_score": 0.5, "test_loss": 1.0}, RUN_SECONDS[run.norm]))
        return ended


@pytest.fixture
def sit(tmp_path, monkeypatch):
    """Run one sitting with this budget; returns its journal, its workers and when it ended."""
    monkeypatch.setattr(agenda, "say_first", lambda *_: [])

    def run(budget, seeds=4):
        clock = Clock()
        monkeypatch.setattr(sessions, "time", clock)
        plan = Plan(("mlp",), tuple(RUN_SECONDS), ("8",), (0.1,), seeds, 64)
        journal, workers = Journal(tmp_path, lambda run: identify(run, CONTEXT)), PretendedWorkers(clock)
        progress = LiveProgress(Console(quiet=True), budget)
        session = Session(Comparison(plan, journal, CONTEXT, 0.0), journal, workers, progress, 0.0, budget)
        session.run()
        journal.close()
        return journal, workers, clock.now

    return run


def test_an_ample_budget_finishes_the_plan_and_ends_with_it(sit):
    journal, _, ended = sit(1000.0)
    assert len(journal.records) == 12
    assert ended <= sum(4 * seconds for seconds in RUN_SECONDS.values())


def test_nothing_is_begun_that_cannot_end_in_time(sit):
    """The first run of each cell is a try, its cost unknown; after it a run is begun only where it fits."""
    journal, workers, ended = sit(25.0)
    assert ended <= 25.0 - 2.0, "2 seconds are kept for the report"
    seen = set()
    for run, until in workers.expected:
        assert until <= 23.0 or run.cell not in seen
        seen.add(run.cell)
    assert seen == {("mlp", "8", norm) for norm in RUN_SECONDS}
    assert 0 < len(journal.records) < 12


def test_a_second_sitting_takes_the_rest(sit):
    first = set(sit(25.0)[0].records)
    journal, workers, _ = sit(1000.0)
    assert first < set(journal.records)
    assert len(workers.expected) == 12 - len(first)


def test_a_budget_that_is_over_begins_nothing(sit):
    journal, workers, _ = sit(1.0)
    assert journal.records == {}
    assert workers.expected == []


STUCK = """
import multiprocessing, pathlib, time
from torch import nn

def make(norm):
    if multiprocessing.parent_process() is not None:
        pathlib.Path("stuck").touch()
        time.sleep(600)  # Where nobody gives it up it finishes, and the test fails.
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), norm(10, 0))
"""


def test_a_run_that_does_not_end_is_given_up_when_time_is_up(tmp_path, monkeypatch):
    """Real workers: the clock jumps past the budget once one of them is stuck, and a report is written all the same."""
    (tmp_path / "stuck_net.py").write_text(STUCK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    began = time.monotonic()
    clock = SimpleNamespace(monotonic=lambda: began + 1e6 * (tmp_path / "stuck").exists())
    monkeypatch.setattr(sessions, "time", clock)
    options = Options("digits", ("stuck_net:make",), ("batch",), ("8",), (0.1,), 1, 64, 60.0, tmp_path / "out")
    assert compare(options, started=began, console=Console(quiet=True)) == 1
    assert (tmp_path / "stuck").exists()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["finished_runs"] == 0
    assert "No full run is finished" in (tmp_path / "out" / "report.html").read_text()
