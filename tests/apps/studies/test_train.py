import numpy as np
import pytest
import torch
from torch import nn

from anynorm.apps.studies.compare.check import find_impossible
from anynorm.apps.studies.compare.plan import Plan
from anynorm.apps.studies.compare.train import Run, compare_modes, is_hopeless, probe, train
from anynorm.apps.studies.data import Reading, split
from anynorm.apps.studies.fit import untouched
from anynorm.apps.studies.guessing import find_metric
from anynorm.apps.studies.models import build
from anynorm.apps.studies.norms import NORMS, CannotNormalize, choose_groups
from anynorm.apps.studies.targets import find_targets
from anynorm.apps.studies.task import Task
from anynorm.errors import UserError


@pytest.fixture(scope="module")
def task():
    generator = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = generator.normal(size=(120, 1, 8, 8)) + y[:, None, None, None]
    return Task(split("toy", x, y))


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


def test_a_run_repeats_and_says_what_it_saw(task):
    run = Run("mlp", "batch", "8", 0.05, 1, 64, True)
    first, second = train(run, task), train(run, task)
    for record in (first, second):
        record.pop("seconds")
        record["curve"].pop("seconds")
    assert first == second
    assert (first["seen"], first["steps"], first["status"]) == (64, 8, "finished")
    assert first["curve"]["step"] == list(range(9))
    assert first["curve"]["loss"][0] is None
    assert first["probed_layer"] == "10"


def test_a_batch_size_that_changes_halfway(task):
    record = train(Run("mlp", "batch", "16:4", 0.05, 0, 64, True), task)
    assert (record["seen"], record["steps"]) == (64, 2 + 8)


def test_a_run_that_diverges_stops(task):
    record = train(Run("mlp", "none", "8", 1e20, 0, 64, True), task)
    assert record["status"] == "diverged"
    assert record["seen"] < 64
    assert record["test_score"] <= 0.5


def test_hopeless_runs_are_dropped_once_a_quarter_through():
    assert is_hopeless([9.0] * 25, 100, 2.3)
    assert not is_hopeless([2.0] * 25, 100, 2.3)
    assert not is_hopeless([9.0] * 24, 100, 2.3)
    assert not is_hopeless([9.0] * 26, 100, 2.3)


def test_measuring_leaves_no_trace(task):
    network = build("mlp", NORMS["batch"], task.data.sample_shape, 3).train()
    network[4].train(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.random.get_rng_state()
    probe(network, network[-1], task.part("validation"))
    modes = compare_modes(network, task, 4)
    with untouched(network):
        network.eval()
        torch.rand(3)
    assert set(modes) == {"training_score", "training_loss", "evaluation_score", "evaluation_loss"}
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert network.training
    assert not network[4].training


def test_norms_without_running_statistics_do_the_same_in_both_modes(task):
    modes = train(Run("cnn", "group", "4", 0.05, 0, 32, True), task)["modes"]
    assert modes["training_score"] == modes["evaluation_score"]
    assert modes["training_loss"] == pytest.approx(modes["evaluation_loss"], rel=1e-4)


def test_what_cannot_exist_has_a_reason(task):
    plan = Plan(("cnn", "mlp"), tuple(NORMS), ("8", "1", "8:1"), (0.1,), 1, 64)
    found = find_impossible(plan, task)
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


def make_task(kind, **options):
    """60 samples of four columns, as classes, labels or values that depend on them."""
    generator = np.random.default_rng(3)
    x = generator.normal(size=(60, 4))
    y = {"classes": x[:, 0] > 0, "labels": (x[:, :2] > 0).astype(int), "values": x[:, :2] + 5}[kind]
    return Task(split("toy", x, find_targets("toy", y, 60, kind)), **options)


@pytest.mark.parametrize("kind", ["classes", "labels", "values"])
def test_every_kind_of_targets_is_learned(kind):
    task = make_task(kind)
    record = train(Run("mlp", "batch", "8", 0.05, 0, 512, True), task)
    metric = find_metric(task)
    assert record["status"] == "finished"
    assert record["test_score"] > metric.guessing / 100 + 0.2
    assert record["curve"]["loss"][1] > record["curve"]["loss"][-1]
    assert find_impossible(Plan(("mlp",), ("none", "batch"), ("8",), (0.1,), 1, 64), task) == {}


@pytest.mark.parametrize("kind", ["classes", "labels", "values"])
def test_a_run_of_any_kind_that_diverges_has_a_score_that_counts(kind):
    record = train(Run("mlp", "none", "8", 1e20, 0, 64, True), make_task(kind))
    assert record["status"] == "diverged"
    assert record["test_score"] is not None
    assert record["test_score"] <= 0.9


def test_ones_own_loss_metric_and_optimizer_are_used():
    own = {"loss": "torch.nn.functional:l1_loss", "metric": "torch.nn.functional:l1_loss:lower"}
    usual, mine = make_task("values"), make_task("values", **own, optimizer="torch.optim:Adam")
    run = Run("mlp", "none", "8", 0.01, 0, 512, True)
    first, second = train(run, usual), train(run, mine)
    assert first["validation_loss"] != second["validation_loss"]
    x, y, _ = mine.part("test")
    network = nn.Linear(4, 2)
    score, loss = mine.measure(network, (x, y, None))
    assert score == pytest.approx((mine.restore(network(x)) - mine.restore(y)).abs().mean().item(), rel=1e-5)
    assert loss == pytest.approx((network(x) - y).abs().mean().item(), rel=1e-5)


OWN = """
import torch
from torch import nn

class Recurrent(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv1d(2, 6, 3, padding=1), norm(6, 1), nn.Linear(6, 2)

    def forward(self, x, lengths):
        assert lengths.dtype == torch.int64 and len(lengths) == len(x)
        real = torch.arange(x.shape[-1]) < lengths[:, None]
        seen = torch.relu(self.norm(self.conv(x), lengths=lengths)) * real[:, None]
        return self.out(seen.sum(-1) / lengths[:, None])

def tokens(norm):
    return nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(30, 6), norm(6, 0), nn.Linear(6, 2))
"""


def test_lengths_reach_the_network_and_padding_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 8, 60)
    lengths[0] = 7
    x, y = generator.normal(size=(60, 2, 7)), np.arange(60) % 2
    longer = np.concatenate([x, generator.normal(size=(60, 2, 3))], 2)
    # Told apart by the longest sequence: of ten positions only seven are ever real.
    short, long = (Task(split("toy", array, y, lengths)) for array in (x, longer))
    plan = Plan(("own.py:Recurrent", "mlp"), ("none", "batch", "layer", "rms"), ("8",), (0.1,), 1, 64)
    found = find_impossible(plan, short)
    assert {(model, norm) for model, _, norm in found if model != "mlp"} == {("own.py:Recurrent", "rms")}
    assert "need a network of your own" in found["mlp", "8", "batch"]
    for norm in ("batch", "layer"):
        run = Run("own.py:Recurrent", norm, "8", 0.05, 0, 64, True)
        first, second = train(run, short), train(run, long)
        assert first["test_loss"] == pytest.approx(second["test_loss"], rel=1e-4)


def test_token_ids_reach_an_embedding_and_numbers_do_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    ids, y = np.random.default_rng(0).integers(0, 20, (60, 5)), np.arange(60) % 2
    plan = Plan(("own.py:tokens",), ("none", "batch"), ("8",), (0.1,), 1, 64)
    task = Task(split("toy", ids, y, reading=Reading(tokens=True)))
    assert find_impossible(plan, task) == {}
    assert train(Run("own.py:tokens", "batch", "8", 0.05, 0, 64, True), task)["status"] == "finished"
    assert (
        "need a network of your own"
        in find_impossible(Plan(("mlp",), ("batch",), ("8",), (0.1,), 1, 64), task)["mlp", "8", "batch"]
    )
    with pytest.raises(UserError, match="give --tokens, if x holds token ids"):
        find_impossible(plan, Task(split("toy", ids, y)))
