"""The study of leaks: its verdict on invented accuracies, and that its batches are of one class."""

import numpy as np
import pytest
import torch

from anynorm.apps.studies.claims import leak
from anynorm.apps.studies.study import Setting, Trial

STUDY = leak.STUDY


def invent(gaps, spread=1.0):
    """Accuracy in evaluation mode is below that in training mode by the arm's gap, on batches of one class."""

    def find(trial):
        gap = gaps.get(trial.arm, 0.0) * trial["pure"] + spread * (-1) ** trial.seed * (1 + (trial.arm == "batch"))
        return {"seen": 90.0, "accuracy": 90.0 - gap}

    return find


@pytest.mark.parametrize(
    ("gaps", "outcome"),
    [
        ({"batch": 40.0}, "confirmed"),
        ({"batch": 0.0}, "refuted"),
        ({"batch": 40.0, "group": 40.0}, "refuted"),
        ({"batch": 11.0}, "inconclusive"),
    ],
)
def test_verdict_needs_a_gap_that_group_norm_has_not(setting, conclude, gaps, outcome):
    verdict = conclude(STUDY, setting, invent(gaps))
    assert verdict.outcome == outcome
    assert f"{gaps['batch']:+.1f} points with batch norm" in verdict.sentence


def test_nothing_measured_is_inconclusive(setting, conclude):
    assert conclude(STUDY, setting, lambda trial: {"status": "diverged"}).outcome == "inconclusive"


def test_one_norm_of_the_users_is_judged_alone(make, conclude):
    verdict = conclude(STUDY, make(norms=("instance",)), invent({"instance": 40.0}))
    assert verdict.outcome == "confirmed" and len(verdict.effects) == 1


def test_batches_are_of_one_class_and_every_class_has_its_turn(setting):
    labels = torch.from_numpy(setting.data.train_y)
    batches = leak.draw_pure_batches(labels, 8, 0)
    classes = [set(labels[chosen].tolist()) for chosen in batches]
    assert all(len(found) == 1 for found in classes) and {len(chosen) for chosen in batches} == {leak.BATCH}
    assert [set.union(*classes[i : i + 4]) for i in (0, 4)] == [{0, 1, 2, 3}] * 2
    assert all(np.array_equal(a, b) for a, b in zip(batches, leak.draw_pure_batches(labels, 8, 0), strict=True))


class Leaky(torch.nn.Module):
    """Answers by the mean of its batch while it trains, and always with class 0 in evaluation."""

    def __init__(self, setting):
        super().__init__()
        x, y = torch.from_numpy(setting.data.train_x), torch.from_numpy(setting.data.train_y)
        self.centers = torch.stack([x[y == label].mean(0) for label in range(4)]).flatten(1)

    def forward(self, x):
        if not self.training:
            return torch.eye(4)[:1].expand(len(x), 4)
        return -(self.centers - x.flatten(1).mean(0)).square().sum(1).expand(len(x), 4)


def test_a_leak_shows_as_the_gap_of_modes(setting, monkeypatch):
    monkeypatch.setattr(Setting, "build", lambda self, *_: Leaky(self))
    monkeypatch.setattr(leak, "fit", lambda *_: "finished")
    record = leak.perform(Trial.of("batch", 0.03, 0, pure=True, steps=1), setting)
    assert record == {"status": "finished", "seen": 100.0, "accuracy": 25.0}
    searched = {
        p: leak.perform(Trial.of("batch", 0.03, 0, search=True, pure=p, steps=1), setting) for p in (True, False)
    }
    assert set(searched[True]) == {"status", "loss"} and searched[True]["loss"] < searched[False]["loss"]


def test_a_trial_measures_the_same_twice(setting):
    trial = Trial.of("group", 0.03, 0, pure=True, steps=20)
    record = leak.perform(trial, setting)
    assert record == leak.perform(trial, setting)
    assert record["seen"] == record["accuracy"] > 50  # no statistic is over the batch


def test_what_diverged_is_measured(setting):
    record = leak.perform(Trial.of("batch", 1e30, 0, pure=True, steps=20), setting)
    assert record["status"] == "diverged" and record["accuracy"] <= 50
