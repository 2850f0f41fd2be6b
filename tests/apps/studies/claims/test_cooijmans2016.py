"""Keeps invariants: pixels come in the order that is said, averages are shared as said, and the verdict follows."""

import numpy as np
import pytest
import torch

from anynorm.apps.studies.claims.cooijmans2016 import (
    HIDDEN,
    STUDY,
    PixelReader,
    read_pixels,
    share_averages,
)
from anynorm.apps.studies.study import Trial


def test_pixels_are_pooled_and_read_row_by_row_or_in_one_fixed_order():
    x = np.arange(2 * 28 * 28, dtype=np.float32).reshape(2, 1, 28, 28)
    plain = read_pixels(x, "plain")
    assert plain.shape == (2, 49, 1)
    assert plain[0, 1, 0] == x[0, 0, :4, 4:8].mean()
    permuted = read_pixels(x, "permuted")
    assert not torch.equal(permuted, plain)
    assert torch.equal(permuted.sort(1).values, plain.sort(1).values)
    assert torch.equal(permuted, read_pixels(x, "permuted"))
    assert torch.equal(read_pixels(x, "plain", pooled=False)[..., 0], torch.from_numpy(x).flatten(1))


def test_equal_seeds_give_equal_weights_and_open_forget_gates():
    networks = []
    for norm in (None, "batch-per-step"):
        torch.manual_seed(0)
        networks.append(PixelReader(norm, 5, 3))
    for name in ("lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight", "head.bias"):
        assert torch.equal(*(network.get_parameter(name) for network in networks))
    for network in networks:
        assert (network.get_parameter("lstm.bias_hh_l0")[HIDDEN : 2 * HIDDEN] == 1).all()


def test_shared_averages_are_those_of_all_steps_and_leave_the_network():
    torch.manual_seed(0)
    network = PixelReader("batch-per-step", 5, 3)
    network(torch.randn(32, 5, 1))
    norm = network.lstm.norm_hh_l0
    before = norm.running_var.clone()
    shared = share_averages(network).lstm.norm_hh_l0
    assert torch.equal(norm.running_var, before) and not torch.equal(before[0], before[1])
    for step in range(5):
        torch.testing.assert_close(shared.running_mean[step], norm.running_mean.mean(0))
        square = (norm.running_var + norm.running_mean**2).mean(0)
        torch.testing.assert_close(shared.running_var[step], square - norm.running_mean.mean(0) ** 2)


@pytest.mark.parametrize("arm", ["LSTM", "BN-LSTM"])
def test_a_trial_measures_a_curve_and_the_test(setting, arm):
    record = STUDY.perform(Trial.of(arm, 0.003, 0, order="plain", steps=15), setting)
    assert record["status"] == "finished" and len(record["curve"]) == 1
    assert ("shared" in record) == (arm == "BN-LSTM")


def test_what_a_diverged_network_did_not_live_to_see_it_guesses(setting):
    record = STUDY.perform(Trial.of("LSTM", float("inf"), 0, order="plain", steps=15), setting)
    assert record["status"] == "diverged" and record["curve"] == [25.0]


@pytest.mark.parametrize(("gain", "outcome"), [(6.0, "confirmed"), (-3.0, "refuted"), (2.0, "inconclusive")])
def test_the_verdict_follows_the_curves(setting, conclude, gain, outcome):
    def invent(trial):
        wobble = np.random.default_rng([trial.seed, len(trial.arm)]).normal(0, 0.3)
        end = 90 + wobble + gain * (trial.arm == "BN-LSTM")
        return {"curve": [end - 10, end], "mean": end - 5, "accuracy": end, "shared": end - 30}

    verdict = conclude(STUDY, setting, invent)
    assert verdict.outcome == outcome, verdict
    assert "plain order" in verdict.sentence


def test_nothing_is_judged_where_nothing_was_learned(setting, conclude):
    verdict = conclude(STUDY, setting, lambda trial: {"curve": [50.0], "mean": 50.0, "accuracy": 60.0, "shared": 60.0})
    assert verdict.outcome == "inconclusive"
    assert "has not learned the task (60.0 %)" in verdict.notes[0]
