"""The study of noise: its verdict on invented errors, and that the noise is there, of its size, and can be gone."""

import pytest
import torch

from anynorm.apps.studies.claims import noise
from anynorm.apps.studies.study import Trial

STUDY = noise.STUDY


def invent(gain, spread=0.1):
    """Noise of 16 images lowers the error by `gain`, that of 32 by more, but validation prefers 16."""

    def find(trial):
        size, at_16 = trial["size"], trial["size"] == 16
        error = 10 + spread * (-1) ** trial.seed * (1 + at_16) - gain * at_16 - 2 * gain * (size == 32)
        keys = ("train_error", "test_error", "best_test_error", "train_loss", "test_loss", "gap")
        return {"loss": trial.rate - at_16, **dict.fromkeys(keys, error)}

    return find


@pytest.mark.parametrize(
    ("gain", "outcome"), [(2, "confirmed"), (0, "refuted"), (-3, "refuted"), (0.5, "inconclusive")]
)
def test_verdict_is_of_the_noise_that_validation_chose(setting, conclude, gain, outcome):
    verdict = conclude(STUDY, setting, invent(gain))
    assert verdict.outcome == outcome
    assert "of 16 images" in verdict.sentence and f"{gain:+.2g} points" in verdict.sentence


def test_nothing_measured_is_inconclusive(setting, conclude):
    verdict = conclude(STUDY, setting, lambda trial: {"status": "diverged", "loss": None})
    assert verdict.outcome == "inconclusive" and "batch, no noise" in verdict.notes[0]


def test_without_noise_mates_do_not_matter(setting):
    x = torch.from_numpy(setting.data.train_x)[:40]
    silent = noise.WholeSet(setting.build("batch", 0, "mlp"), x)
    few, many = torch.tensor([3, 5]), torch.arange(40)
    assert torch.equal(silent(few), silent(many)[few])
    noisy = setting.build(noise.make_norm("batch", 8), 0, "mlp")
    assert not torch.allclose(noisy(x[:20])[:5], noisy(x[5:25].roll(5, 0))[:5])


@pytest.mark.parametrize("size", [4, 16])
def test_noise_has_the_size_of_a_batchs(size):
    """Means and deviations of statistics over `size` normal values, against those that the noise stands for."""
    torch.manual_seed(0)
    norm, count = noise.NoisyGroupNorm(8, size), 4_000
    # Equal samples in each ghost show its two errors: y = (x - e) / s, of x = 1 and of x = -1.
    x = torch.cat([torch.ones(size // 2, 8), -torch.ones(size // 2, 8)]).repeat(count, 1)
    y = norm.add_noise(x).view(count, size, 8)
    scale = 2 / (y[:, 0] - y[:, -1])
    error = -(y[:, 0] + y[:, -1]) / 2 * scale
    real = torch.randn(count, size, 8)
    torch.testing.assert_close(error.std(), real.mean(1).std(), rtol=0.05, atol=0)
    torch.testing.assert_close(error.mean(), torch.tensor(0.0), rtol=0, atol=0.02)
    torch.testing.assert_close(scale.mean(), real.std(1, correction=0).mean(), rtol=0.02, atol=0)
    torch.testing.assert_close(scale.std(), real.std(1, correction=0).std(), rtol=0.05, atol=0)


def test_noise_is_in_training_only_and_shared_within_a_ghost():
    x = torch.randn(8, 6).repeat(2, 1)
    norm = noise.NoisyGroupNorm(6, 8)
    plain = norm.norm(x)
    assert torch.equal(norm.eval()(x), plain)
    noisy = norm.train()(x)
    assert not torch.allclose(noisy[:8], noisy[8:])
    ratios = (noisy[1:8] - noisy[:7]) / (plain[1:8] - plain[:7])
    torch.testing.assert_close(ratios, ratios[:1].expand(7, 6), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("arm", "size"), [("batch", 8), ("batch", 0), ("group", 0), ("group", 8)])
def test_a_trial_measures_the_same_twice_and_hides_the_test_images_from_the_search(setting, arm, size):
    trial = Trial.of(arm, 0.03, 0, size=size, steps=40)
    record = noise.perform(trial, setting)
    assert record == noise.perform(trial, setting)
    assert record["gap"] == record["test_loss"] - record["train_loss"] and record["train_error"] < 20
    assert record["best_validation_loss"] <= record["validation_loss"]
    search = noise.perform(Trial.of(arm, 0.03, 0, search=True, size=size, steps=40), setting)
    assert search == {"status": "finished", "loss": record["validation_loss"]}


def test_what_diverged_is_measured(setting):
    record = noise.perform(Trial.of("batch", 1e30, 0, size=8, steps=40), setting)
    assert record["status"] == "diverged" and record["test_error"] >= 50
