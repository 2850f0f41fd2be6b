"""The study of speed: its verdict on invented steps, what a trial measures, and its picture."""

import warnings
from functools import partial

import numpy as np
import pytest
from matplotlib.figure import Figure

from anynorm.apps.studies.claims import speed
from anynorm.apps.studies.data import load_data
from anynorm.apps.studies.fit import LEVEL_EVERY
from anynorm.apps.studies.study import Results, Setting, Trial


@pytest.fixture(scope="module")
def setting():
    """Digits, which need no file."""
    return Setting(load_data("digits"), 4)


def invent(steps, widest, trial):
    """A record: `steps` by arm at the middle rate, and the level reached within `widest` places from it."""
    distance = abs(round(2 * np.log10(trial.rate)) + 1)
    reached = distance <= widest[trial.arm]
    count = steps[trial.arm] + 10 * distance + trial.seed % 3 if reached else trial["most"]
    log = float(np.log10(count))
    return {
        "status": "finished" if reached else "diverged",
        "reached": reached,
        "steps": count,
        "log_steps": log,
        "log_seconds": log - 3 if reached else None,
        "cost": count,
    }


def judge(setting, steps, widest):
    find = partial(invent, steps, widest)
    trials = list(dict.fromkeys(speed.plan(setting, find)))
    results = Results(setting, trials, find)
    return speed.judge(results), results


FAST, SLOW = {"none": 400, "batch": 100, "layer": 200}, {"none": 100, "batch": 400, "layer": 200}
WIDE, EQUAL = {"none": 1, "batch": 3, "layer": 2}, {"none": 1, "batch": 1, "layer": 1}


@pytest.mark.parametrize(
    ("steps", "widest", "outcome"),
    [
        (FAST, WIDE, "confirmed"),
        (SLOW, WIDE, "refuted"),
        (FAST, EQUAL, "refuted"),
        (FAST, {"none": 1, "batch": 1.5, "layer": 1}, "refuted"),
        ({arm: 1 for arm in FAST}, {arm: -1 for arm in FAST}, "inconclusive"),
    ],
)
def test_verdict_follows_steps_and_width(setting, steps, widest, outcome):
    verdict, _ = judge(setting, steps, widest)
    assert verdict.outcome == outcome


def test_steps_that_differ_by_seed_decide_nothing(setting):
    def find(trial):
        # Ten steps, over which the level is asked, up or down.
        swing = 300 if (trial.seed + (trial.arm == "batch")) % 2 else 100
        return invent(dict.fromkeys(FAST, swing), WIDE, trial)

    trials = list(dict.fromkeys(speed.plan(setting, find)))
    assert speed.judge(Results(setting, trials, find)).outcome == "inconclusive"


def test_width_counts_only_seeds_with_the_whole_sweep(setting):
    _, results = judge(setting, FAST, WIDE)
    assert results.find_width(speed.STEP, arm="batch", version="sigmoid") == dict.fromkeys(range(4), 3.5)
    assert results.find_width(speed.STEP, arm="none", version="sigmoid") == dict.fromkeys(range(4), 1.5)
    assert list(results.find_width(speed.STEP, arm="layer", version="sigmoid")) == list(range(speed.BESIDE_SEEDS))


def test_trial_ends_at_the_level_and_counts_the_budget_where_it_is_never_reached(setting):
    reached = speed.perform(Trial.of("batch", 0.3, 0, version="ReLU", most=300), setting)
    assert reached["reached"] and reached["steps"] < 300 and reached["steps"] % LEVEL_EVERY == 0
    never = speed.perform(Trial.of("none", 1e-6, 0, version="sigmoid", most=20), setting)
    assert (never["status"], never["reached"], never["steps"]) == ("finished", False, 20)
    diverged = speed.perform(Trial.of("none", 1e6, 0, version="ReLU", most=20), setting)
    assert (diverged["status"], diverged["steps"], diverged["log_seconds"]) == ("diverged", 20, None)


def test_picture_is_drawn_without_a_warning(setting):
    _, results = judge(setting, FAST, WIDE)
    figure = Figure(layout="constrained")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        speed.paint(results, figure.add_subplot())
        figure.draw_without_rendering()
    assert [panel.get_title() for panel in figure.axes] == ["sigmoid", "ReLU"]
