"""What `anynorm compare` must not answer: equal networks, chance, two seeds, intervals wider than what is in them.

And what it must show: runs that diverged.
"""

import dataclasses

import numpy as np
import pytest

from anynorm.apps.studies.compare.check import find_impossible
from anynorm.apps.studies.compare.curves import find_diverged, plot_curves
from anynorm.apps.studies.compare.effects import say_effects
from anynorm.apps.studies.compare.judge import choose_all
from anynorm.apps.studies.compare.plan import Plan
from anynorm.apps.studies.compare.report import write_report
from anynorm.apps.studies.compare.sentences import say_choice
from anynorm.apps.studies.compare.tables import write_cell_text, write_marked
from anynorm.apps.studies.compare.verdict import say_unjudged, say_verdict
from anynorm.apps.studies.data import load_data
from anynorm.apps.studies.metrics import Metric
from anynorm.apps.studies.models import NORMS, find_model
from anynorm.apps.studies.task import Task
from anynorm.errors import UserError

FACTORIES = """
import copy
from torch import nn

def never(norm):
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))

def unused(norm):
    norm(4, 0)
    return never(norm)

def short(norm):
    return nn.Sequential(nn.Linear(8, 4), norm(4), nn.Linear(4, 3))

def cloned(norm):
    layer = nn.Sequential(nn.Linear(8, 8), norm(8, 0))
    return nn.Sequential(copy.deepcopy(layer), copy.deepcopy(layer), nn.Linear(8, 3))

def right(norm):
    return nn.Sequential(nn.Linear(8, 4), norm(num_features=4, dims=0), nn.ReLU(), nn.Linear(4, 3))
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A function that checks one of the factories above, named by its file, with two norms."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_nets.py").write_text(FACTORIES)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    np.savez("d.npz", x=rng.normal(size=(300, 8)), y=y)
    data = load_data("d.npz")

    def check(name):
        asked = Plan((f"own_nets.py:{name}",), ("batch", "layer"), ("16",), (0.1,), 2, 128)
        return find_impossible(asked, Task(data))

    return check


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("never", r"'own_nets\.py:never' never calls norm, so every norm would train the same network"),
        ("unused", "calls norm, but its network never runs what norm returned"),
        (
            "short",
            r"cannot be built with norm none \(TypeError: norm takes \(num_features, dims\).*called as norm\(4\)",
        ),
    ],
)
def test_a_factory_that_cannot_answer_is_refused(plan, name, said):
    with pytest.raises(UserError, match=said) as caught:
        plan(name)
    assert "<locals>" not in str(caught.value)


def test_a_file_names_a_network(plan):
    assert plan("right") == {}
    assert find_model("own_nets.py:right", (8,), 3).fingerprint != find_model("own_nets.py:never", (8,), 3).fingerprint


def test_a_network_of_copies_runs_its_norms(plan):
    """As nn.TransformerEncoder, which copies the layer that it is given and never runs that one."""
    assert plan("cloned") == {}


def test_one_norm_alone_needs_no_call(plan, monkeypatch):
    data = load_data("d.npz")
    assert find_impossible(Plan(("own_nets.py:never",), ("batch",), ("16",), (0.1,), 2, 128), Task(data)) == {}


def change(findings, values):
    """Give the final runs of the first network these accuracies by norm and seed."""
    for (_, _, norm), found in findings.finals.items():
        for seed, record in found.items():
            record["test_score"] = record["validation_score"] = values(norm, seed)


def test_at_chance_nothing_is_recommended(make_findings):
    findings, _ = make_findings(("cnn",), batches=("64",))
    findings.metric = Metric(guessing=35.0, margin=4.5)
    draws = dict(zip(NORMS, np.random.default_rng(0).normal(0.36, 0.02, (len(NORMS), 3))))
    change(findings, lambda norm, seed: draws[norm][seed])
    choices = choose_all(findings)
    verdict = say_verdict(findings, choices)
    assert verdict.startswith("Nothing can be said: no network is clearly better than guessing (35.0 %)")
    assert "nothing can be said" in say_choice(findings, choices[0])
    assert "▲" not in "".join(write_cell_text(findings, cell, choices[0]).plain for cell in findings.finals)


def test_a_margin_wider_than_what_was_learned_is_not_printed(make_findings):
    findings, _ = make_findings(("cnn",), batches=("64",), seeds=6)
    findings.metric = Metric(guessing=33.3, margin=4.5)
    change(findings, lambda norm, seed: (0.3, 0.4, 0.55)[seed % 3] if norm == "batch" else 0.8 + seed / 100)
    choices = choose_all(findings)
    assert write_cell_text(findings, ("cnn", "64", "batch"), choices[0]).plain == "▼ 41.7 (wide)"
    assert "±" in write_cell_text(findings, ("cnn", "64", "layer"), choices[0]).plain


def test_equal_rows_have_no_leader(make_findings):
    findings, _ = make_findings(("cnn",), batches=("64",))
    change(findings, lambda norm, seed: 0.8 + seed / 100)
    choices = choose_all(findings)
    assert "every norm gave exactly the same numbers" in say_verdict(findings, choices)
    assert "so none leads" in say_choice(findings, choices[0])


def test_places_at_chance_are_left_out_and_named(make_findings):
    findings, _ = make_findings(("cnn",), batches=("64", "2"))
    choices = choose_all(findings)
    choices[1] = dataclasses.replace(choices[1], learned=False)
    assert "batch 2" not in say_verdict(findings, choices)
    assert "better than guessing: cnn at batch 2." in say_unjudged(findings, choices)


def test_two_seeds_decide_nothing(make_findings):
    findings, choices = make_findings(("cnn",), seeds=2, batches=("64",))
    assert say_verdict(findings, choices).startswith("Nothing can be said from two seeds")
    assert "not judged, too few seeds" in say_choice(findings, choices[0])
    assert not choices[0].judged
    assert "▲" not in "".join(write_cell_text(findings, cell, choices[0]).plain for cell in findings.finals)


def test_intervals_wider_than_their_differences_come_first(make_findings):
    findings, _ = make_findings(("cnn",), batches=("64",), seeds=4)
    change(findings, lambda norm, seed: 0.8 + 0.02 * ((seed + len(norm)) % 4))
    choices = choose_all(findings)
    assert choices[0].judged
    verdict = say_verdict(findings, choices)
    assert verdict.startswith("Nothing can be said of one norm against another: every interval is wider than")
    assert "would hide" in verdict


def test_where_something_is_clear_the_verdict_begins_with_it(make_findings):
    findings, choices = make_findings(("cnn",))
    assert say_verdict(findings, choices).startswith("For the cnn, use")


@pytest.fixture
def diverged(make_findings):
    """Batch norm diverges in one of three runs at batch 64, without a score; elsewhere nothing does."""
    findings, _ = make_findings(("cnn",), batches=("64",))
    record = findings.finals["cnn", "64", "batch"][1]
    record |= {"status": "diverged", "test_score": None, "validation_score": None}
    record["curve"] = {name: values[:4] for name, values in record["curve"].items()}
    return findings, choose_all(findings)


def test_a_run_that_diverged_counts_with_the_worst_score(diverged):
    findings, _ = diverged
    known = [score for cell in findings.finals for score in findings.values(cell).values()]
    assert findings.values(("cnn", "64", "batch"))[1] == findings.metric.guessing == min(known) == 0.0
    assert findings.interval(("cnn", "64", "batch")).seeds == 3
    findings.metric = dataclasses.replace(findings.metric, higher=False, guessing=None)
    assert findings.values(("cnn", "64", "batch"))[1] == max(known)


def test_runs_that_diverged_are_shown(diverged, make_results):
    findings, choices = diverged
    assert "diverged, and counted with what was reached: batch norm in 1 of 3 runs" in say_choice(findings, choices[0])
    effects = say_effects(findings)
    assert effects[0].startswith("Diverged: in the cnn, batch norm at batch 64 in 1 of 3 full runs; they count")
    assert write_marked(findings, ("cnn", "64", "batch"), choices[0]).plain.endswith(" 1 diverged")
    [(norm, curve)] = find_diverged(findings, "cnn", "64")
    assert (norm, len(curve["step"])) == ("batch", 4)
    page = write_report(findings, choices, make_results(findings, choices))
    assert "<small>1 diverged</small>" in page
    assert "Runs that diverged: batch." in page
    assert "left out" not in page


def test_where_every_run_diverged_they_are_still_drawn(diverged):
    findings, _ = diverged
    for found in findings.finals.values():
        for record in found.values():
            record["status"] = "diverged"
            record["curve"]["loss"][-1] = 1e9
    plots = plot_curves(findings, "cnn", "64")
    assert len(plots) == 4
    # The numbers of the axis are there, though it spans ten decades.
    assert any(f">{label}</text>" in plots[0].svg for label in ("1e+06", "100000", "1e+07"))


def test_lower_is_better_turns_leaders_and_signs_round(make_findings):
    findings, _ = make_findings(("cnn",), batches=("64",))
    findings.metric = Metric("error", higher=False, percent=False, guessing=1.0, margin=0.01, weight=1.0)
    change(findings, lambda norm, seed: {"none": 0.5, "rms": 0.2}.get(norm, 0.3) + 0.01 * seed)
    [choice] = choose_all(findings)
    assert choice.leader == "rms"
    assert choice.differences["none"].mean == pytest.approx(0.3)
    assert "no normalization (−0.3)" in say_choice(findings, choice)
    verdict = say_verdict(findings, [choice])
    assert "use RMS norm at batch 64" in verdict
    assert "0.1 above RMS norm" in verdict
    findings.metric = dataclasses.replace(findings.metric, guessing=0.2)
    assert say_verdict(findings, choose_all(findings)).startswith("Nothing can be said: no network is clearly better")


@pytest.mark.parametrize("metric", [Metric("R²"), Metric("error", higher=False, percent=False, guessing=None)])
def test_reports_name_the_metric(make_findings, make_results, metric):
    findings, choices = make_findings(("cnn",))
    findings.metric = metric
    page = write_report(findings, choices, make_results(findings, choices))
    assert "accuracy" not in page.replace("an accuracy of 95", "")
    assert f"cnn: test {metric.title}" in page
