"""`anynorm study`: trials performed, journalled, resumed, judged and reported, with a study that takes no time."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html import escape
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from browser import look, needs_chromium
from rich.console import Console
from studies_specimen import STUDY
from typer.testing import CliRunner

from anynorm.apps import cli
from anynorm.apps.studies import find, run
from anynorm.apps.studies.command import StudyOptions
from anynorm.apps.studies.find import CLAIMS, find_studies
from anynorm.apps.studies.page import PAGE, STUDIES, read_results
from anynorm.apps.studies.study import Published, Results, Setting, Study, Trial, try_rates
from anynorm.errors import UserError


class OwnProcess:
    """Stands in for the workers: a trial is performed at once, in this process."""

    def __init__(self):
        self.run = None
        self.all, self.start = [self], self.begin

    def send_task(self, perform, setting):
        self.task = perform, setting

    def begin(self, trial):
        self.run = trial

    @property
    def idle(self):
        return [] if self.run else [self]

    @property
    def busy(self):
        return {self.run} if self.run else set()

    def wait(self, timeout):
        if self.run is None:
            return []
        trial, self.run = self.run, None
        perform, setting = self.task
        try:
            record = perform(trial, setting)
        except RuntimeError as problem:
            record = {"status": "failed", "reason": f"RuntimeError: {problem}"}
        return [(trial, record, 0.5)]

    def stop(self):
        self.run = None


@pytest.fixture
def perform(tmp_path, monkeypatch):
    """Run the specimen in this process; returns the exit code and the entry."""
    monkeypatch.setattr(run, "Workers", OwnProcess)

    def go(study=STUDY, **options):
        options = StudyOptions(data="digits", out=tmp_path / "out", **options)
        code = run.run_studies([study], options, console=Console(quiet=True))
        return code, read_results(options.out).get(study.name)

    return go


def test_a_study_is_performed_judged_and_reported(perform, tmp_path):
    code, entry = perform()
    assert code == 0
    assert entry["outcome"] == "confirmed"
    assert entry["trials"] == {"planned": 10, "finished": 10, "failed": 0}
    assert entry["diverged"] == 1, "an arm that diverges is recorded as that and counts"
    page = (tmp_path / "out" / PAGE).read_text()
    for text in ("confirmed", escape(STUDY.title), "needs more than 0.5", "<svg", "Somebody 2015"):
        assert text in page
    assert "<b>bold</b>" not in page
    assert (tmp_path / "out" / "specimen.svg").is_file()


@needs_chromium
@pytest.mark.parametrize("width", [1300, 390])
def test_the_report_in_a_browser(perform, tmp_path, width):
    """Hostile names of models, studies and data are text, also in the picture."""
    evil = "<img src=x onerror=alert(1)>$x_1$</svg><script>alert(2)</script>"
    perform()
    perform(replace(STUDY, name="evil", title=evil, claim=evil, published=(Published(evil, evil),)), seeds=3)
    answer = look((tmp_path / "out" / PAGE).read_text(), tmp_path, width)
    assert len(answer["plots"]) == 2
    assert answer["verdict"] == "2 confirmed"
    assert evil in answer["plots"][1]["label"]


def test_the_same_seeds_give_the_same_numbers_and_finished_trials_are_not_run_again(perform, tmp_path):
    _, first = perform()
    journal = tmp_path / "out" / "journal.jsonl"
    lines = journal.read_bytes()
    _, again = perform()
    assert journal.read_bytes() == lines
    journal.unlink()
    _, anew = perform()
    assert first["records"] == again["records"] == anew["records"]


def test_quick_says_no_more_than_quick(perform):
    code, entry = perform(quick=True)
    assert (code, entry["outcome"], entry["seeds"]) == (0, "inconclusive: quick", 2)


def test_more_seeds_use_the_trials_that_are_there(perform):
    perform()
    _, entry = perform(seeds=6)
    assert entry["trials"]["planned"] == 12


def test_time_that_is_up_leaves_a_study_unfinished_and_says_so(perform, tmp_path):
    code, entry = perform(minutes=0.01)
    assert code == 1
    assert entry["outcome"] == "inconclusive"
    assert "Unfinished" in entry["sentence"]
    assert not (tmp_path / "out" / "specimen.svg").exists()


def test_a_trial_that_raises_is_said(perform):
    code, entry = perform(norms=("instance",))
    assert code == 1
    assert "RuntimeError: instance is refused here" in entry["sentence"]
    assert entry["outcome"] == "inconclusive"


def test_options_that_make_no_sense_are_refused(perform):
    with pytest.raises(UserError, match="specimen --model: it has no network"):
        perform(model="mlp")


def test_of_several_those_that_cannot_run_are_named_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Workers", OwnProcess)
    console = Console(record=True, file=open(os.devnull, "w"), width=200)  # noqa: SIM115 # it lives as long as the test
    refused, broken = replace(STUDY, name="refused"), replace(STUDY, name="broken", refuses={}, data="nowhere.npz")
    options = StudyOptions(full=True, out=tmp_path / "out")
    full = replace(STUDY, name="specimen", has_published_size=True, data="digits")
    assert run.run_studies([refused, replace(broken, has_published_size=True), full], options, console=console) == 2
    printed = console.export_text()
    assert "Left out: study run refused --full: there is no published size" in printed
    assert "study run broken --data: " in printed
    assert list(read_results(tmp_path / "out")) == ["specimen"]


def test_results_of_other_studies_stay(perform, tmp_path):
    perform()
    perform(replace(STUDY, name="other"))
    assert list(read_results(tmp_path / "out")) == ["specimen", "other"]
    (tmp_path / "out" / STUDIES).write_text('{"torn": ')
    perform()
    assert list(read_results(tmp_path / "out")) == ["specimen"]


KILLED = """
import signal
import sys
from pathlib import Path
from dataclasses import replace
from rich.console import Console
from anynorm.apps.studies.command import StudyOptions
from anynorm.apps.studies.run import run_studies
from studies_specimen import STUDY
if __name__ == "__main__":
    # Whoever runs the tests in the background of a shell ignores Ctrl-C, and so would this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options = StudyOptions(data="digits", out=Path(sys.argv[1]))
    sys.exit(run_studies([replace(STUDY, seeds=300)], options, console=Console(quiet=True)))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_or_killed_it_goes_on_where_it_stopped(tmp_path, how):
    (tmp_path / "killed.py").write_text(KILLED)
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "out")]
    # 600 trials of 0.1 s: the signal cannot come after the last of them
    environment = {**os.environ, "PYTHONPATH": path, "SPECIMEN_SECONDS": "0.1"}
    process = subprocess.Popen(command, env=environment)
    journal = tmp_path / "out" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    assert process.wait(60) == (130 if how == signal.SIGINT else -signal.SIGKILL)
    kept = journal.read_bytes().count(b"\n")
    assert kept >= 3
    if how == signal.SIGINT:
        assert "Unfinished" in (tmp_path / "out" / PAGE).read_text()
    options = StudyOptions(data="digits", seeds=5, out=tmp_path / "out")
    assert run.run_studies([STUDY], options, console=Console(quiet=True)) == 0
    lines = journal.read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    assert len(keys) == len(set(keys)), "no trial was performed twice"


def invoke(*words):
    return CliRunner().invoke(cli.app, ["study", *words])


def test_list_names_every_study_and_its_question():
    printed = invoke("list").output
    for name in (*CLAIMS, "compare"):
        assert f"\n{name}" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sped"], "did you mean speed"),
        (["nothing"], "anynorm study list"),
        (["leak", "--norms", "bach"], "study run --norms: takes names out of .*did you mean batch"),
        (["leak", "--data", "missing.npz"], "study run leak --data: .*no file 'missing.npz'"),
        (["leak", "--data", "digits", "--model", "nowhere:make"], "study run leak --model: .*does not import"),
        (["compare", "leak"], "runs alone"),
        (["compare", "--full"], "no published size"),
    ],
)
def test_bad_input_ends_with_one_sentence(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("run", *words)
    assert isinstance(result.exception, UserError)
    assert len(str(result.exception).splitlines()) == 1
    with pytest.raises(UserError, match=said):
        raise result.exception


def test_every_claim_is_a_study_that_says_all_that_it_must():
    for study in find_studies():
        assert isinstance(study, Study)
        for text in (study.title, study.claim, study.design, study.rule):
            assert text
            assert text == " ".join(text.split())
        assert "onfirmed" in study.rule
        assert "efuted" in study.rule


def test_another_package_may_bring_a_study(monkeypatch):
    points = [EntryPoint("theirs", "studies_specimen:STUDY", find.GROUP), EntryPoint("odd", "math:pi", find.GROUP)]
    points.append(EntryPoint("gone", "no_such_module:STUDY", find.GROUP))
    monkeypatch.setattr(find, "entry_points", lambda group: points)
    assert find_studies(["theirs"]) == [STUDY]
    for name, said in (("odd", "must name a Study; it names a float"), ("gone", "does not load .ModuleNotFoundError")):
        with pytest.raises(UserError, match=said):
            find_studies([name])


def test_the_best_rate_is_chosen_when_all_are_known():
    trials = [Trial.of("batch", rate, 1, search=True) for rate in (0.1, 0.2, 0.3)]
    records = {}
    assert try_rates(records.get, trials)[0] is None
    losses = (0.5, 0.4, None)
    for trial, loss in zip(trials, losses, strict=True):
        records[trial] = {"status": "finished" if loss else "diverged", "loss": loss}
    rate, again = try_rates(records.get, trials)
    assert rate == 0.2
    assert list(again) == trials


def test_results_by_fields(tmp_path):
    trials = [Trial.of("batch", 0.1, seed, size=size) for size in (2, 4) for seed in (1, 0)]
    found = {trial: {"status": "finished", "accuracy": trial["size"] + trial.seed} for trial in trials}
    data = np.zeros((4, 3), np.float32)
    results = Results(Setting(data, 2), trials, found.get)  # type: ignore[arg-type]
    assert results.values("accuracy", size=4) == {0: 4, 1: 5}
    with pytest.raises(ValueError, match="two records of seed"):
        results.values("accuracy")
