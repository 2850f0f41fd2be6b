"""Loss, metric and optimizer: the usual ones, the user's own, and what guessing reaches."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score, roc_auc_score
from torch import nn

from anynorm.apps.studies.data import split
from anynorm.apps.studies.guessing import find_metric, find_own_metric
from anynorm.apps.studies.metrics import Metric, accuracy, explained, mean_auc
from anynorm.apps.studies.targets import find_targets
from anynorm.apps.studies.task import Task, align, check_functions, check_optimizer, split_direction
from anynorm.errors import UserError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(100, 4))
OWN = """
import torch
from torch import nn

def absolute(outputs, targets):
    assert outputs.shape == targets.shape
    return (outputs - targets).abs().mean()

def right(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()

def correlation(outputs, targets):
    return torch.corrcoef(torch.stack([outputs[:, 0], targets[:, 0]]))[0, 1]

def share(outputs, targets):
    return 1 - (outputs - targets).square().sum() / (targets - targets.mean()).square().sum()

def vector(outputs, targets):
    return (outputs - targets).abs()

def detached(outputs, targets):
    return absolute(outputs, targets).item()

def raises(outputs, targets):
    raise RuntimeError("no luck")

def slow(parameters, rate):
    return torch.optim.SGD(parameters, lr=rate / 10)

def alone(parameters):
    return torch.optim.SGD(parameters, lr=1.0)

def network(parameters, rate):
    return nn.Linear(1, 1)
"""


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)


def make(y, **options):
    return Task(split("t", X, find_targets("t", y, len(y), options.pop("kind", "auto"))), **options)


VALUES = 1000 + 50 * X[:, :1] + 5 * RNG.normal(size=(100, 1))
LABELS = (X[:, :3] + RNG.normal(size=(100, 3)) > 0.5).astype(int)


def test_scores_equal_those_of_scikit_learn():
    y = torch.tensor(LABELS, dtype=torch.float32)
    outputs = torch.from_numpy(RNG.normal(size=(100, 3)).round(1))  # rounded, so that there are ties
    assert mean_auc(outputs, y) == pytest.approx(roc_auc_score(LABELS, outputs.numpy(), average="macro"))
    truth = torch.from_numpy(RNG.normal(size=(100, 2)))
    guess = truth + torch.from_numpy(RNG.normal(size=(100, 2)))[:, [0, 0]] / 2
    assert explained(guess, truth) == pytest.approx(r2_score(truth.numpy(), guess.numpy()))


def test_outputs_that_are_no_numbers_get_the_worst_score():
    bad = torch.full((100, 3), float("nan"))
    assert mean_auc(bad, torch.tensor(LABELS, dtype=torch.float32)) == 0
    assert explained(bad, torch.from_numpy(RNG.normal(size=(100, 3)))) == -1
    assert explained(torch.full((100, 1), 1e30), torch.from_numpy(VALUES)) == -1
    assert accuracy(bad, torch.zeros(100, dtype=torch.int64)) == 0


@pytest.mark.parametrize(
    ("y", "kind", "name", "loss"),
    [
        (np.arange(100) % 4, "classes", "accuracy", "cross-entropy"),
        (LABELS, "labels", "mean AUC", "binary cross-entropy"),
        (VALUES, "values", "R²", "mean squared error"),
    ],
)
def test_each_kind_of_targets_has_its_loss_and_metric(y, kind, name, loss):
    task = make(y)
    metric = find_metric(task)
    assert (task.data.kind, metric.name, metric.percent, task.describe()["loss"]) == (kind, name, True, loss)
    guess = {"classes": 25.0, "labels": 50.0, "values": 0.0}[kind]
    assert metric.guessing == pytest.approx(guess)
    assert task.guessing_loss() == pytest.approx(
        {"classes": np.log(4), "labels": np.log(2), "values": 1.0}[kind], rel=1e-4
    )
    x, y, lengths = task.part("test")
    network = nn.Linear(4, task.data.classes)
    score, found = task.measure(network, (x, y, lengths))
    assert found == pytest.approx(task.loss_function(network(x), y).item())
    assert -1 <= score <= 1


@pytest.mark.parametrize("kind", ["labels", "values"])
def test_outputs_that_know_nothing_stay_within_the_margin(kind):
    """Of 400 random outputs about one in 700 would be above three standard errors."""
    task = make(LABELS if kind == "labels" else VALUES)
    metric, score, y = find_metric(task), task.score_function, task.part("test")[1]
    reached = [
        100 * score(scale * torch.from_numpy(RNG.normal(size=y.shape)), y) for scale in (1.0, 0.3) for _ in range(200)
    ]
    over = [value for value in reached if value > metric.guessing + metric.margin]
    assert len(over) <= 6
    assert metric.margin < 60


def test_the_users_metric_sees_the_units_of_the_file():
    task = make(VALUES, metric="own.py:absolute:lower")
    metric = find_metric(task)
    assert (metric.name, metric.higher, metric.percent) == ("absolute", False, False)
    _, y, _ = task.part("test")
    assert task.score_function(y + 1.0, y) == pytest.approx(task.data.y_std[0], rel=1e-4)
    restored = task.restore(y).numpy()
    assert metric.guessing == pytest.approx(np.abs(restored - task.data.y_mean[0]).mean(), rel=1e-4)
    assert 0 < metric.margin < metric.guessing


def test_the_users_metric_of_classes_has_the_guess_and_the_error_of_accuracy():
    y = np.arange(100) % 4 // 3  # three quarters are 0
    usual, own = find_metric(make(y)), find_own_metric(make(y, metric="own.py:right"))
    assert 100 * own.guessing == pytest.approx(usual.guessing)
    assert 100 * own.margin == pytest.approx(usual.margin, rel=0.25)
    assert 100 * own.resolution(20) == pytest.approx(usual.resolution(20), rel=0.7)


def test_the_margin_of_the_users_metric_is_what_chance_gives():
    """A correlation of 20 samples has the standard error 1 / sqrt(20); an R² is at best 9 / 20."""
    correlation = find_metric(make(VALUES, metric="own.py:correlation"))
    assert abs(correlation.guessing) < 0.1
    assert correlation.margin == pytest.approx(3 / 20**0.5, rel=0.25)
    y = RNG.normal(size=(1000, 1))
    data = split("t", RNG.normal(size=(1000, 4)), find_targets("t", y, 1000))
    own, usual = find_metric(Task(data, metric="own.py:share")), find_metric(Task(data))
    assert own.guessing == pytest.approx(0, abs=0.02)
    assert 100 * own.margin == pytest.approx(usual.margin, rel=0.5)


def test_a_metric_without_any_value_has_no_guess():
    assert find_metric(make(VALUES, metric="own.py:raises")).guessing is None


def test_torchs_own_functions_can_be_named():
    task = make(VALUES, loss="torch.nn.functional:smooth_l1_loss", optimizer="torch.optim:AdamW")
    network = nn.Linear(4, 1)
    assert isinstance(task.make_optimizer(network, 0.25), torch.optim.AdamW)
    assert task.make_optimizer(network, 0.25).param_groups[0]["lr"] == 0.25
    assert task.describe()["optimizer"] == "torch.optim:AdamW(parameters, rate)"
    check_optimizer(task, network.parameters())


def test_a_task_goes_to_another_process():
    task = make(VALUES, loss="own.py:absolute", metric="own.py:absolute:lower", optimizer="own.py:slow")
    assert task.loss_function is not None
    again = pickle.loads(pickle.dumps(task))
    y = again.part("test")[1]
    assert again.score_function(y[:, 0], y) == 0, "outputs of shape (N,) are those of one value"
    assert align(y[:, 0], y).shape == y.shape


BAD = [
    ("loss", "own.py:vector", "--loss: 'own.py:vector' fails"),
    ("loss", "own.py:detached", "tensor with a gradient"),
    ("loss", "own.py:raises", "no luck"),
    ("metric", "own.py:raises", "no luck"),
    ("metric", "own.py:absent", "nothing of that name"),
    ("metric", "nowhere", "takes module:function"),
    ("optimizer", "own.py:alone", "called with (parameters, rate)"),
    ("optimizer", "own.py:network", "returned a Linear"),
]


@pytest.mark.parametrize(("option", "spec", "said"), BAD, ids=[f"{o}={s}" for o, s, _ in BAD])
def test_bad_functions_end_in_one_sentence(option, spec, said):
    task = make(VALUES, **{option: spec})
    outputs = torch.zeros(5, 1, requires_grad=True)

    def check():
        check_functions(task, outputs, task.part("train")[1][:5])
        check_optimizer(task, nn.Linear(1, 1).parameters())

    with pytest.raises(UserError) as caught:
        check()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert f"--{option}" in str(caught.value)


def test_the_direction_of_a_metric_is_read_from_its_end():
    assert split_direction("a:b:lower") == ("a:b", False)
    assert split_direction("a:b:higher") == ("a:b", True)
    assert split_direction("lower:b") == ("lower:b", True)


def test_labels_that_cannot_be_judged_are_refused():
    task = make(LABELS)
    empty = SimpleNamespace(**{**vars(task.data), "test_y": np.zeros_like(task.data.test_y)})
    with pytest.raises(UserError, match="no label of 't'"):
        find_metric(Task(empty))


def test_numbers_are_printed_with_their_units():
    share, own = Metric(), Metric("absolute", higher=False, percent=False)
    assert (share.say(88.44), share.say_gain(-3.21), share.title) == ("88.4 %", "−3.2 points", "accuracy, %")
    assert (own.say(0.123456), own.say_gain(1.5)) == ("absolute 0.1235", "+1.5")
    assert (own.write_half(1.9481, 43.28), share.write_half(3.13, 92.5)) == ("1.95", "3.1")
    assert own.title == "absolute (lower is better)"
    assert (share.gain(3, 1), own.gain(3, 1)) == (2, -2)
