"""The study of small and changing batches: its verdict on invented errors, and that its arms are what they are called.

Of the three kinds of tests these keep an invariant.
"""

import pytest
import torch

import anynorm
from anynorm.apps.studies.claims import batchsize
from anynorm.apps.studies.study import Trial

STUDY = batchsize.STUDY


def invent(few, change, spread=0.1):
    """Batch norm's error is `few` points higher at N = 2, and a change costs it `change` points."""

    def find(trial):
        error = 10 + spread * (-1) ** trial.seed * (1 + (trial["size"] == 2) + (trial["schedule"] == "changed"))
        error += few * (trial.arm == "batch" and trial["size"] == 2)
        between = error + change * (trial.arm == "batch" and trial["schedule"] == "changed")
        keys = ("error", "recalibrated", "by_batch")
        return {**dict.fromkeys(keys, error), **{f"{key}_between": between for key in keys}}

    return find


@pytest.mark.parametrize(
    ("few", "change", "outcome"),
    [(20, 5, "confirmed"), (20, 0, "refuted"), (0, 5, "refuted"), (20, 0.5, "inconclusive")],
)
def test_verdict_needs_few_images_and_a_change_to_hurt(setting, conclude, few, change, outcome):
    verdict = conclude(STUDY, setting, invent(few, change))
    assert verdict.outcome == outcome
    assert f"{few:+.1f} points of test error" in verdict.sentence and f"{change:+.1f} points more" in verdict.sentence
    first = verdict.tables[0][2][0]
    assert first[:2] == ("fully connected: batch, running averages", "10.0 ± 0.1")
    assert first[-1].startswith(f"{10 + few:.1f}")


def test_nothing_measured_is_inconclusive(setting, conclude):
    assert conclude(STUDY, setting, lambda trial: {"status": "diverged"}).outcome == "inconclusive"


def test_the_users_network_takes_the_place_of_both(make):
    found = {trial["network"] for trial in STUDY.plan(make(model="cnn"), lambda trial: None)}
    assert found == {"cnn"}
    cells = batchsize.list_cells(make(model="cnn"))
    assert {cell["arm"] for cell in cells} == {"batch", "renorm", "group", "layer"}
    assert {cell["network"] for cell in batchsize.list_cells(make(shape=(12,)))} == {"mlp"}


def find_trial(arm, size, schedule="fixed", **options):
    return Trial.of(arm, 0.03, 0, network="mlp", schedule=schedule, size=size, phase=192, **options)


@pytest.mark.parametrize("arm", ["batch", "renorm"])
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_arms_are_micro_batches(setting, arm, network):
    """To rounding: the gradients and averages of one call, and of one call for each `size` images."""
    x, y = torch.from_numpy(setting.data.train_x)[:32], torch.from_numpy(setting.data.train_y)[:32]
    whole, parts = (setting.build(batchsize.make_norm(arm, 8), 0, network) for _ in range(2))
    torch.nn.functional.cross_entropy(whole(x), y).backward()
    for norm in parts.modules():
        if isinstance(norm, anynorm.GhostBatchNorm1d | anynorm.GhostBatchNorm2d):
            norm.ghost_size = 32  # never full: batch norm of what it gets
    for some, labels in zip(x.split(8), y.split(8), strict=True):
        (torch.nn.functional.cross_entropy(parts(some), labels) / 4).backward()
    for mine, its in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-3, atol=1e-4)
    for mine, its in zip(whole.buffers(), parts.buffers(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)


def test_arms_start_alike(setting):
    starts = [setting.build(batchsize.make_norm(arm, 4), 3, "cnn") for arm in ("batch", "renorm", "group", "layer")]
    first, *others = ([p for p in network.parameters() if p.dim() > 1] for network in starts)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_a_trial_measures_the_same_twice_and_hides_the_test_images_from_the_search(setting):
    record = batchsize.perform(find_trial("batch", 8), setting)
    assert record == batchsize.perform(find_trial("batch", 8), setting)
    assert set(record) == {"status", "error", "by_batch", "recalibrated"} and record["error"] < 60
    searched = batchsize.perform(
        Trial.of("batch", 0.03, 0, search=True, **dict(find_trial("batch", 8).options)), setting
    )
    assert set(searched) == {"status", "loss"}


@pytest.mark.parametrize(("schedule", "sizes"), [("changed", [64, 4, 64]), ("constant", [64, 64, 64])])
def test_the_rate_follows_the_batch(setting, monkeypatch, schedule, sizes):
    seen = []

    def fit(network, x, y, batches, optimizer):
        seen.append((len(batches[0]), optimizer.param_groups[0]["lr"]))
        return "finished"

    monkeypatch.setattr(batchsize, "fit", fit)
    record = batchsize.perform(find_trial("group", 64, schedule), setting)
    assert seen == [(size, pytest.approx(0.03 * size / 64)) for size in sizes]
    assert set(record) == {"status", "error", "error_between"}


def test_what_diverged_is_measured(setting):
    trial = Trial.of("batch", 1e30, 0, network="mlp", schedule="changed", size=64, phase=192)
    record = batchsize.perform(trial, setting)
    assert record["status"] == "diverged"
    assert record["error"] == record["error_between"] == record["recalibrated"] >= 50
