import numpy as np
import pytest
import torch
from torch import nn

from anynorm.apps.studies.compare.check import find_impossible
from anynorm.apps.studies.compare.plan import Plan
from anynorm.apps.studies.compare.train import Run, compare_modes, is_hopeless, probe, train, untouched
from anynorm.apps.studies.data import split
from anynorm.apps.studies.models import build
from anynorm.apps.studies.norms import NORMS, CannotNormalize, choose_groups


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = generator.normal(size=(120, 1, 8, 8)) + y[:, None, None, None]
    return split("toy", x, y)


def state(model, norm):
    torch.manual_seed(4)
    network = build(model, NORMS[norm], (1, 8, 8), 3)
    return [p for n, p in network.named_parameters() if p.dim() > 1]


@pytest.mark.parametrize("model", ["cnn", "mlp"])
@pytest.mark.parametrize("norm", [name for name in NORMS if name != "none"])
def test_every_arm_starts_from_the_same_weights(model, norm):
    if (model, norm) == ("mlp", "instance"):
        with pytest.raises(CannotNormalize):
            state(model, norm)
        return
    pairs = zip(state(model, "none"), state(model, norm), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


@pytest.mark.parametrize("norm", NORMS)
def test_norm_factories_normalize(norm):
    torch.manual_seed(0)
    for dims in range(4):
        if norm == "instance" and dims == 0:
            continue
        x = 3 + 2 * torch.randn(8, 12, *[5] * dims)
        y = NORMS[norm](12, dims).train()(x)
        assert y.shape == x.shape
        if norm == "none":
            assert torch.equal(y, x)
            continue
        pooled = {
            "batch": y.transpose(0, 1).reshape(12, -1),
            "instance": y.reshape(96, -1),
            "group": y.reshape(8 * choose_groups(12), -1),
        }.get(norm, y.reshape(8, -1))
        assert pooled.square().mean(1).sqrt().allclose(torch.ones(len(pooled)), atol=2e-2)
        assert norm == "rms" or pooled.mean(1).abs().max() < 1e-4


def test_groups_divide():
    for channels in range(1, 130):
        groups = choose_groups(channels)
        assert channels % groups == 0
        has_between = any(channels % g == 0 for g in range(2, min(channels, 33)))
        assert (1 < groups < channels) == has_between


def test_a_run_repeats_and_says_what_it_saw(data):
    run = Run("mlp", "batch", "8", 0.05, 1, 64, True)
    first, second = train(run, data), train(run, data)
    for record in (first, second):
        record.pop("seconds")
        record["curve"].pop("seconds")
    assert first == second
    assert (first["seen"], first["steps"], first["status"]) == (64, 8, "finished")
    assert first["curve"]["step"] == list(range(9))
    assert first["curve"]["loss"][0] is None
    assert first["probed_layer"] == "10"


def test_a_batch_size_that_changes_halfway(data):
    record = train(Run("mlp", "batch", "16:4", 0.05, 0, 64, True), data)
    assert (record["seen"], record["steps"]) == (64, 2 + 8)


def test_a_run_that_diverges_stops(data):
    record = train(Run("mlp", "none", "8", 1e20, 0, 64, True), data)
    assert record["status"] == "diverged"
    assert record["seen"] < 64
    assert record["test_accuracy"] <= 0.5


def test_hopeless_runs_are_dropped_once_a_quarter_through():
    assert is_hopeless([9.0] * 25, 100, 10)
    assert not is_hopeless([2.0] * 25, 100, 10)
    assert not is_hopeless([9.0] * 24, 100, 10)
    assert not is_hopeless([9.0] * 26, 100, 10)


def test_measuring_leaves_no_trace(data):
    network = build("mlp", NORMS["batch"], data.sample_shape, 3).train()
    network[4].train(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.random.get_rng_state()
    x, y = torch.from_numpy(data.validation_x), torch.from_numpy(data.validation_y)
    probe(network, network[-1], x)
    modes = compare_modes(network, x, y, 4)
    with untouched(network):
        network.eval()
        torch.rand(3)
    assert set(modes) == {"training_accuracy", "training_loss", "evaluation_accuracy", "evaluation_loss"}
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert network.training
    assert not network[4].training


def test_norms_without_running_statistics_do_the_same_in_both_modes(data):
    modes = train(Run("cnn", "group", "4", 0.05, 0, 32, True), data)["modes"]
    assert modes["training_accuracy"] == modes["evaluation_accuracy"]
    assert modes["training_loss"] == pytest.approx(modes["evaluation_loss"], rel=1e-4)


def test_what_cannot_exist_has_a_reason(data):
    plan = Plan(("cnn", "mlp"), tuple(NORMS), ("8", "1", "8:1"), (0.1,), 1, 64)
    found = find_impossible(plan, data)
    assert {(model, batch) for model, batch, norm in found if norm == "instance"} == {
        ("mlp", batch) for batch in ("8", "1", "8:1")
    }
    assert {(model, batch) for model, batch, norm in found if norm == "batch"} == {("mlp", "1"), ("mlp", "8:1")}
    assert all("always 0" in reason for reason in found.values())


def test_norms_sit_before_the_activation():
    for model in ("cnn", "mlp"):
        layers = [m for m in build(model, lambda c, d: nn.BatchNorm1d(c), (1, 8, 8), 3) if type(m) is not nn.Identity]
        for before, norm, after in zip(layers, layers[1:], layers[2:], strict=False):
            if isinstance(norm, nn.BatchNorm1d):
                assert isinstance(before, nn.Linear | nn.Conv2d)
                assert isinstance(after, nn.ReLU)
