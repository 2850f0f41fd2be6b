"""The study of shift: its verdict on invented accuracies, the shifts, and the ways of evaluation."""

import numpy as np
import pytest
import torch

from anynorm.apps.studies.claims import shift
from anynorm.apps.studies.study import Trial

STUDY = shift.STUDY


def invent(gain, few, pure, spread=0.2):
    """Accuracies with what batches of 100 bring, and what batches of 2 and of one class take away."""
    changes = dict.fromkeys(shift.WAYS, 0.0)
    changes |= {"batches of 100": gain, "recalibrated": gain, "batches of 2": -few, "batches of one class": -pure}

    def find(trial):
        ways = changes if trial.arm == "batch" else {"running averages": 0.0}
        swing = {way: spread * (-1) ** trial.seed * (1 + place) for place, way in enumerate(ways)}
        where = ["clean", "shifted", *(f"{k} {s:g}" for k, s in shift.list_shifts((1, 8, 8)))]
        return {f"{place}, {way}": 80 + change + swing[way] for place in where for way, change in ways.items()}

    return find


@pytest.mark.parametrize(
    ("change", "outcome"),
    [((12, 20, 20), "confirmed"), ((1, 20, 20), "refuted"), ((12, 20, 0), "refuted"), ((12, 5, 20), "inconclusive")],
)
def test_verdict_needs_the_gain_and_both_losses(setting, conclude, change, outcome):
    verdict = conclude(STUDY, setting, invent(*change))
    assert verdict.outcome == outcome
    assert f"{change[0]:+.1f} points" in verdict.sentence
    assert len(verdict.tables) == 2  # a network each


def test_nothing_measured_is_inconclusive(setting, conclude):
    verdict = conclude(STUDY, setting, lambda trial: {"status": "diverged"})
    assert verdict.outcome == "inconclusive" and "batch" in verdict.notes[0]


def test_shifts_are_what_they_are_called():
    x = np.random.default_rng(1).standard_normal((50, 1, 12, 12)).astype(np.float32)
    assert all(shift.corrupt(x, kind, 1.0).dtype == np.float32 for kind in shift.STRENGTHS)
    np.testing.assert_allclose(shift.corrupt(x, "brightness", 0.7), x + 0.7, rtol=1e-6)
    dull = shift.corrupt(x, "contrast", 0.25)
    np.testing.assert_allclose(dull.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(dull.std((1, 2, 3)), 0.25 * x.std((1, 2, 3)), rtol=1e-4)
    noise = shift.corrupt(x, "noise", 0.5) - x
    assert abs(noise.std() - 0.5) < 0.02 and np.array_equal(noise, shift.corrupt(x, "noise", 0.5) - x)


def test_blur_is_that_of_scipy():
    from scipy.ndimage import gaussian_filter

    x = np.random.default_rng(1).standard_normal((3, 1, 12, 12)).astype(np.float32)
    theirs = gaussian_filter(x, (0, 0, 2, 2), mode="nearest", truncate=3)
    np.testing.assert_allclose(shift.corrupt(x, "blur", 2.0), theirs, atol=1e-5)
    signal = shift.corrupt(x[:, 0], "blur", 1.0)  # (N, H, W) without channels
    np.testing.assert_allclose(signal[:, None], shift.corrupt(x, "blur", 1.0), atol=1e-6)


def test_tables_are_not_blurred():
    assert "blur" not in {kind for kind, _ in shift.list_shifts((12,))}


def test_a_trial_measures_each_way(setting):
    trial = Trial.of("batch", 0.03, 0, network="mlp", steps=60)
    record = shift.perform(trial, setting)
    assert record == shift.perform(trial, setting)
    shifts = [f"{kind} {strength:g}" for kind, strength in shift.list_shifts((1, 8, 8))]
    assert set(record) == {
        "status",
        *(f"{place}, {way}" for place in ("clean", "shifted", *shifts) for way in shift.WAYS),
    }
    mean = np.mean([record[f"{place}, batches of 100"] for place in shifts])
    assert record["shifted, batches of 100"] == pytest.approx(mean)
    assert record["clean, running averages"] > 90 > record["clean, batches of one class"]
    # Brightness and contrast of all images alike are what batch norm takes away.
    assert record["brightness 1.4, recalibrated"] > 85
    group = shift.perform(Trial.of("group", 0.03, 0, network="mlp", steps=60), setting)
    assert {key.split(", ")[-1] for key in group} == {"status", "running averages"}


def test_batches_of_two_have_statistics_of_two(setting):
    """The shortcut by ghosts, against forwards of two images each."""
    network, pairs = setting.build("batch", 0, "mlp"), setting.build(shift.ghosts(2, 2), 0, "mlp")
    x = torch.from_numpy(setting.data.test_x)
    found = torch.cat([network(two) for two in x.split(2)])
    torch.testing.assert_close(pairs(x), found, rtol=1e-3, atol=1e-4)


def test_what_diverged_is_measured(setting):
    record = shift.perform(Trial.of("batch", 1e30, 0, network="mlp", steps=30), setting)
    assert record["status"] == "diverged" and record["shifted, recalibrated"] <= 50
