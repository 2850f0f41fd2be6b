"""The study of the start: its verdict on invented steps, the gain that it starts from, and its picture."""

import math
import warnings

import pytest
import torch
from matplotlib.figure import Figure

from anynorm.apps.studies.claims import init
from anynorm.apps.studies.data import load_data
from anynorm.apps.studies.study import Results, Setting, Trial


@pytest.fixture(scope="module")
def setting():
    """Digits, which need no file."""
    return Setting(load_data("digits"), 4)


def invent(setting, wide):
    """Results in which each arm learns at `wide(arm, depth, seed)` of the gains."""

    def find(trial):
        reached = init.GAINS.index(trial["gain"]) < wide(trial.arm, trial["depth"], trial.seed)
        steps = 50 if reached else trial["most"]
        log = math.log10(steps)
        return {"status": "finished", "reached": reached, "steps": steps, "log_steps": log, "cost": steps}

    return Results(setting, list(dict.fromkeys(init.plan(setting, find))), find)


@pytest.mark.parametrize(
    ("wide", "outcome"),
    [
        (lambda arm, depth, seed: 2 if arm == "none" else 7, "confirmed"),
        (lambda arm, depth, seed: 2 if arm == "none" else 3, "refuted"),
        (lambda arm, depth, seed: 2 if arm == "none" else 7 if depth == 6 else 2, "refuted"),
        (lambda arm, depth, seed: 2 if arm == "none" else 3 + seed % 3, "inconclusive"),
        (lambda arm, depth, seed: 0, "inconclusive"),
    ],
)
def test_verdict_follows_the_width_at_both_depths(setting, wide, outcome):
    assert init.judge(invent(setting, wide)).outcome == outcome


def test_gain_scales_he_start_of_every_weight(setting):
    torch.manual_seed(0)
    weight = torch.empty(400, 300)
    init.start_scaled(weight, 0.1)
    assert weight.std().item() == pytest.approx(0.1 * (2 / 300) ** 0.5, rel=0.02)


def test_trial_trains_at_the_depth_and_gain_that_it_names(setting):
    options = {"depth": 6, "most": 10}
    small = init.perform(Trial.of("none", 0.1, 0, gain=0.01, **options), setting)
    assert (small["status"], small["reached"], small["steps"]) == ("finished", False, 10)
    huge = init.perform(Trial.of("none", 0.1, 0, gain=1e7, **options), setting)
    assert (huge["status"], huge["steps"]) == ("diverged", 10)
    assert huge["cost"] == 20


def test_picture_is_drawn_without_a_warning(setting):
    figure = Figure(layout="constrained")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        init.paint(invent(setting, lambda arm, depth, seed: 2 if arm == "none" else 7), figure.add_subplot())
        figure.draw_without_rendering()
    assert [panel.get_title() for panel in figure.axes] == ["6 layers", "10 layers"]
