"""`anynorm fold`, `convert` and `freeze`, as a user types them."""

import pytest
import torch
import torch.nn as nn
from typer.testing import CliRunner

import anynorm
from anynorm.cli import app

FACTORY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(4, 3, 8, 8)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(FACTORY)

    def call(*arguments):
        return CliRunner().invoke(app, [*arguments[:1], "--model", "net.py:make", *arguments[1:]])

    return call


def train(tmp_path):
    space = {}
    exec(FACTORY, space)
    model, x = space["make"]()
    for _ in range(5):
        model(x + 1)
    model[1].weight.data.uniform_(-1, 1)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return model.eval(), x


def test_fold_writes_the_weights_of_a_plain_model(run, tmp_path):
    model, x = train(tmp_path)
    result = run("fold", "--weights", "weights.pt", "--out", "folded.pt")
    assert result.exit_code == 0, result.output
    assert "2 norms changed, 0 left" in result.output
    assert "output: largest difference" in result.output
    assert "wrote folded.pt" in result.output
    plain = nn.Sequential(*(nn.Identity() if isinstance(m, nn.BatchNorm2d) else m for m in model))
    expected = model(x)
    plain.load_state_dict(torch.load("folded.pt", weights_only=True))
    assert torch.allclose(plain(x), expected, atol=1e-5)
    result = run("fold", "--weights", "weights.pt", "--out", "folded.pt")
    assert isinstance(result.exception, anynorm.UserError)
    assert "is there already; choose another name, or pass --force" in str(result.exception)
    assert run("fold", "--weights", "weights.pt", "--out", "folded.pt", "--force", "--where", "1").exit_code == 0
    assert "4.running_var" in torch.load("folded.pt", weights_only=True)


def test_convert_writes_where_to_train_on_from(run, tmp_path):
    model, x = train(tmp_path)
    result = run("convert", "--to", "group", "--groups", "2", "--weights", "weights.pt", "--out", "group.pt")
    assert result.exit_code == 0, result.output
    assert "2 x torch.nn.BatchNorm2d -> anynorm.GroupNorm" in result.output
    twin = nn.Sequential(*model)
    twin[1], twin[4] = nn.GroupNorm(2, 8), nn.GroupNorm(2, 4)
    twin.load_state_dict(torch.load("group.pt", weights_only=True))
    assert twin(x).shape == (4, 4)
    result = run("convert", "--to", "group", "--strict", "--out", "other.pt")
    assert isinstance(result.exception, anynorm.NotProved)
    assert not (tmp_path / "other.pt").exists()
    result = run("convert", "--to", "nothing")
    assert "to must be one of" in str(result.exception)


def test_freeze_says_what_would_be_frozen(run, tmp_path):
    train(tmp_path)
    result = run("freeze", "--weights", "weights.pt", "--where", "1", "--no-affine")
    assert result.exit_code == 0, result.output
    assert "anynorm.BatchNorm2d, frozen: statistics, updates" in result.output


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(run, tmp_path):
    model, _ = train(tmp_path)
    state = model.state_dict()
    state["1.running_var"] = -state["1.running_var"]
    torch.save(state, "weights.pt")
    result = run("fold", "--weights", "weights.pt", "--out", "folded.pt")
    assert "fold --weights: 'weights.pt' does not fit the model" in str(result.exception)
    assert "1.running_var must not be negative" in str(result.exception)
    assert not (tmp_path / "folded.pt").exists()
