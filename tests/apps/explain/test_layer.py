"""`anynorm explain --mine` shows the input that a layer of a model really receives."""

import re

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from anynorm import reference
from anynorm.apps import cli
from anynorm.apps.explain.explain import print_explanation
from anynorm.apps.explain.layer import evaluate, observe
from anynorm.apps.models.load import LoadedModel, load_model
from anynorm.doctor.call import Call
from anynorm.errors import UserError


def close(found, expected, tolerance):
    """Assert that two arrays agree to this absolute and relative tolerance."""
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=tolerance, atol=tolerance)


def own(model, *shape):
    """Return a target of this model and a random input."""
    return LoadedModel("own", model, Call((3.0 + 2.0 * torch.randn(shape),)), guessed=False)


def test_a_layers_real_input_is_caught():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))
    target = own(model, 16, 5)
    x = model[0](target.call.args[0]).detach().double()
    observed = observe(target, None)
    assert observed.name == "1"
    close(observed.x, x, 1e-6)
    mean, var = observed.statistics(observed.x)
    close(mean, x.mean(0), 1e-6)
    close(var, x.var(0, correction=0), 1e-6)
    close(observed.norm.running_mean, 0.1 * x.mean(0), 1e-5)
    expected = reference.forward(x.numpy(), (0,), given=(observed.norm.running_mean, observed.norm.running_var))
    close(evaluate(observed), expected, 1e-5)
    assert observe(target, "3").name == "3"


@pytest.mark.parametrize(
    ("norm", "shape", "pools", "first"),
    [
        (nn.LayerNorm(6), (2, 3, 6), 6, lambda x: x[0, 0]),
        (nn.LayerNorm([3, 6]), (2, 3, 6), 2, lambda x: x[0]),
        (nn.InstanceNorm1d(3), (2, 3, 6), 6, lambda x: x[0, 0]),
        (nn.GroupNorm(2, 4), (2, 4, 6), 4, lambda x: x[0, :2]),
        (nn.RMSNorm(6), (2, 3, 6), 6, lambda x: x[0, 0]),
        (nn.BatchNorm2d(3), (2, 3, 4, 4), 3, lambda x: x[:, 0]),
    ],
)
def test_every_norm_of_the_family_can_be_shown(capsys, monkeypatch, norm, shape, pools, first):
    observed = observe(own(norm, *shape), None)
    mean, _ = observed.statistics(observed.x)
    assert mean.numel() == pools
    close(mean[0], first(observed.x).mean(), 1e-6)
    monkeypatch.setattr("anynorm.apps.explain.layer.load_model", lambda spec: own(norm, *shape))
    print_explanation(model="own", console=Console(width=80, highlight=False))
    printed = capsys.readouterr().out
    assert f"{pools} mean" in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(
    ("model", "layer", "sentence"),
    [
        (nn.Linear(5, 2), None, "holds no normalization layer"),
        (nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)), "2", "has no norm '2'; it has 1"),
        (nn.Sequential(nn.Linear(5, 4), nn.LocalResponseNorm(2)), None, "which is not in the family"),
    ],
)
def test_a_layer_that_cannot_be_shown_is_one_sentence(model, layer, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        observe(own(model, 8, 5), layer)


def test_a_layer_that_the_call_does_not_reach_is_one_sentence():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(5)

        def forward(self, x):
            return x * 2

    with pytest.raises(UserError, match="does not reach norm"):
        observe(own(Unused(), 8, 5), None)


def test_a_layer_of_a_model_is_drawn(tmp_path):
    out = tmp_path / "layer.svg"
    ended = CliRunner().invoke(cli.app, ["explain", "--mine", "lstm", "--layer", "norm", "--out", str(out)])
    assert ended.exit_code == 0, ended.exception
    assert out.read_bytes().startswith(b"<?xml")
    assert "LayerNorm" in ended.stdout


def test_watching_leaves_no_hook():
    target = load_model("mlp")
    observed = observe(target, None)
    assert not observed.norm._forward_hooks
