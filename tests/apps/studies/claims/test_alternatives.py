"""Keeps invariants: tasks are what their names say, and the verdict follows the numbers."""

import numpy as np
import pytest
import torch

from anynorm.apps.studies.claims.alternatives import (
    ARMS,
    CONTRASTS,
    LIMITS,
    STUDY,
    TASKS,
    choose_alternative,
    convolutions,
    decay,
    draw_task,
    draw_task_batches,
)
from anynorm.apps.studies.norms import NORMS
from anynorm.apps.studies.study import Results, Trial


def test_batches_are_of_the_sizes_and_classes_of_their_task():
    y = torch.arange(400) % 4
    sizes = {task: [len(batch) for batch in draw_task_batches(y, task, 400, 0)] for task in TASKS}
    assert sizes["batch 2"] == [2] * 200
    assert sizes["changing"] == [32] * 6 + [8] + [2] * 100
    assert sizes["ordinary"] == sizes["contrast"]
    assert all(len(y[batch].unique()) == 1 for batch in draw_task_batches(y, "one class", 400, 0))
    assert any(len(y[batch].unique()) > 1 for batch in draw_task_batches(y, "ordinary", 400, 0))


def test_contrast_is_the_class_and_the_same_at_every_call(setting):
    x, y = setting.data.train_x, setting.data.train_y
    images, levels = draw_task(x, y, "contrast", 0)
    assert torch.equal(levels, draw_task(x, y, "contrast", 0)[1])
    assert set(levels.tolist()) == set(range(len(CONTRASTS)))
    factors = torch.tensor(CONTRASTS)[levels].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(images / factors, torch.from_numpy(x - x.min()))


def test_instance_norm_cannot_see_contrast_and_batch_norm_can(setting):
    """Equals itself on images of another contrast, but for eps and what the zeros around the image do not scale."""
    x = torch.from_numpy(setting.data.train_x[:8] - setting.data.train_x.min())
    outputs = {}
    for norm in ("instance", "batch"):
        torch.manual_seed(0)
        network = convolutions(NORMS[norm], (1, 8, 8), 4)
        network[0].bias.data.zero_()
        network.eval()
        outputs[norm] = (network(4 * x) - network(x)).abs().max().item()
    assert outputs["instance"] < 0.01 < 0.1 < outputs["batch"]


def test_the_rate_falls_to_zero_in_a_straight_line():
    network = torch.nn.Linear(1, 1)
    optimizer, rates = decay(network, 0.4, 4), []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        network(torch.ones(1, 1)).sum().backward()
        optimizer.step()
    np.testing.assert_allclose(rates, [0.4, 0.325, 0.25, 0.175])


@pytest.mark.parametrize("task", TASKS)
def test_a_trial_measures_validation_or_test(setting, task):
    trial = Trial.of("batch", 0.01, 0, task=task, images=100)
    record = STUDY.perform(trial, setting)
    assert record["status"] == "finished" and record["loss"] > 0
    assert record == STUDY.perform(trial, setting)
    searched = STUDY.perform(Trial.of("batch", 0.01, 0, search=True, task=task, images=100), setting)
    assert searched["loss"] != record["loss"]


def test_a_norm_that_cannot_stand_there_has_no_accuracy(make):
    record = STUDY.perform(Trial.of("instance", 0.01, 0, task="ordinary", images=64), make(model="mlp"))
    assert record["accuracy"] is None


def invent_with(gain, ordinary=0.0):
    """Batch norm is `gain` points below the others at its limits; instance norm validates badly."""

    def invent(trial):
        wobble = np.random.default_rng([trial.seed, len(trial.arm), len(trial["task"])]).normal(0, 0.2)
        accuracy = 90 + wobble - gain * (trial.arm == "batch" and trial["task"] in LIMITS)
        accuracy += ordinary * (trial.arm == "batch" and trial["task"] == "ordinary")
        return {"accuracy": accuracy - 20 * (trial.arm == "instance") - 3 * (trial.arm == "layer")}

    return invent


@pytest.mark.parametrize(
    ("gain", "ordinary", "outcome"),
    [(5.0, 0.0, "confirmed"), (-1.0, 0.0, "refuted"), (1.0, 0.0, "inconclusive"), (5.0, 4.0, "refuted")],
)
def test_the_verdict_follows_the_numbers(setting, conclude, gain, ordinary, outcome):
    verdict = conclude(STUDY, setting, invent_with(gain, ordinary))
    assert verdict.outcome == outcome, verdict
    assert verdict.sentence.startswith("Group norm")
    assert len(verdict.effects) == 4 and [row[0] for row in verdict.tables[0][2]] == list(TASKS)


def test_the_alternative_is_chosen_on_validation_alone(setting):
    def find(trial):
        best = "layer" if trial.search else "group"
        return {"status": "finished", "accuracy": 95.0 if trial.arm == best else 90.0, "loss": 1.0}

    results = Results(setting, list(dict.fromkeys(STUDY.plan(setting, find))), find)
    assert choose_alternative(results) == "layer"


def test_without_alternatives_nothing_is_concluded(make, conclude):
    verdict = conclude(STUDY, make(seeds=3, norms=("none", "rms")), invent_with(5.0))
    assert verdict.outcome == "inconclusive"
    assert "rms" not in ARMS
