"""What `anynorm compare` must not answer: equal networks, labels at chance, margins wider than what was learned."""

import dataclasses

import numpy as np
import pytest

from anynorm.apps.studies.compare.check import find_impossible
from anynorm.apps.studies.compare.judge import choose_all
from anynorm.apps.studies.compare.plan import Plan
from anynorm.apps.studies.compare.sentences import say_choice, say_unjudged, say_verdict
from anynorm.apps.studies.compare.tables import write_cell_text
from anynorm.apps.studies.data import check_labels, load_data
from anynorm.apps.studies.models import NORMS, find_model
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
        return find_impossible(asked, data)

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
    assert find_impossible(Plan(("own_nets.py:never",), ("batch",), ("16",), (0.1,), 2, 128), data) == {}


def change(findings, values):
    """Give the final runs of the first network these accuracies by norm and seed."""
    for (_, _, norm), found in findings.finals.items():
        for seed, record in found.items():
            record["test_accuracy"] = record["validation_accuracy"] = values(norm, seed)


def test_at_chance_nothing_is_recommended(make_findings):
    findings, _ = make_findings(("cnn",), batches=("64",))
    findings.guessing = 35.0
    draws = dict(zip(NORMS, np.random.default_rng(0).normal(0.36, 0.02, (len(NORMS), 3))))
    change(findings, lambda norm, seed: draws[norm][seed])
    choices = choose_all(findings)
    verdict = say_verdict(findings, choices)
    assert verdict.startswith("Nothing can be said: no network is clearly better than guessing (35.0 %)")
    assert "nothing can be said" in say_choice(findings, choices[0])
    assert "▲" not in "".join(write_cell_text(findings, cell, choices[0]).plain for cell in findings.finals)


def test_a_margin_wider_than_what_was_learned_is_not_printed(make_findings):
    findings, _ = make_findings(("cnn",), batches=("64",))
    findings.guessing = 33.3
    change(findings, lambda norm, seed: (0.3, 0.4, 0.55)[seed] if norm == "batch" else 0.8 + seed / 100)
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


@pytest.mark.parametrize("y", [np.linspace(0, 1, 30), np.linspace(0, 1, 30)[:, None], np.arange(30.0), np.arange(30)])
def test_targets_of_a_regression_are_told_from_labels(y):
    with pytest.raises(UserError, match=r"only classification is compared.*targets of a regression do"):
        check_labels("d.npz", y, 30)
