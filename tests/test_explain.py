"""`anynorm explain`: its numbers are the reference's, its claims hold, its pages fit and its pictures are drawn."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from anynorm import reference
from anynorm.apps import cli
from anynorm.apps.explain import numbers
from anynorm.apps.explain.explain import print_explanation
from anynorm.apps.explain.layer import evaluate, observe
from anynorm.apps.explain.notation import COLOURS, SENTENCES, SHOWN
from anynorm.apps.models.call import Call
from anynorm.apps.models.load import LoadedModel, load_model
from anynorm.errors import UserError


def close(found, expected, tolerance=1e-12):
    """Assert that two arrays agree to this absolute and relative tolerance."""
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def page():
    """The page as it is printed where nobody watches."""
    ended = CliRunner().invoke(cli.app, ["explain"])
    assert ended.exit_code == 0, ended.exception
    return ended.stdout


def test_steps_are_the_references():
    steps = numbers.take_steps()
    x = steps.x.numpy()
    mean, var = reference.moments(x, (0,))
    close(steps.mean, mean[0])
    close(steps.var, var[0])
    close(steps.normalized, reference.forward(x, (0,), eps=numbers.EPS))
    close(steps.y, reference.forward(x, (0,), numbers.GAMMA.numpy(), numbers.BETA.numpy(), eps=numbers.EPS))


def test_running_averages_and_evaluation_are_torchs():
    norm = nn.BatchNorm1d(2, eps=numbers.EPS, momentum=numbers.MOMENTUM, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(numbers.GAMMA)
        norm.bias.copy_(numbers.BETA)
        for running in numbers.follow_running(tuple(range(12))):
            close(running.mean, norm.running_mean)
            close(running.var, norm.running_var)
            close(numbers.evaluate(running), norm.eval()(numbers.PEOPLE))
            norm.train()(numbers.PEOPLE)


AXES = {"batch": (0, 2), "layer": (1, 2), "instance": (2,)}


@pytest.mark.parametrize("norm", SHOWN)
def test_pools_are_the_references(norm):
    pools = numbers.find_pools(norm)
    samples, channels, positions = numbers.SMALL.shape
    if norm == "group":
        x = numbers.SMALL.reshape(samples, numbers.GROUPS, channels // numbers.GROUPS, positions)
        axes = (2, 3)
    else:
        x, axes = numbers.SMALL, AXES[norm]
    mean, var = reference.moments(x.numpy(), axes)
    close(pools.mean, mean.ravel())
    close(pools.var, var.ravel())
    close(pools.y, reference.forward(x.numpy(), axes, eps=numbers.EPS).reshape(numbers.SMALL.shape))
    functions = {
        "batch": lambda x: F.batch_norm(x, None, None, training=True, eps=numbers.EPS),
        "layer": lambda x: F.layer_norm(x, x.shape[1:], eps=numbers.EPS),
        "instance": lambda x: F.instance_norm(x, eps=numbers.EPS),
        "group": lambda x: F.group_norm(x, numbers.GROUPS, eps=numbers.EPS),
    }
    close(pools.y, functions[norm](numbers.SMALL))
    for pool in range(pools.count):
        chosen = numbers.SMALL[pools.label == pool]
        assert len(chosen) == pools.size
        close(chosen.mean(), pools.mean[pool])


def test_what_the_page_says_of_the_norms_is_so():
    assert [norm for norm in SHOWN if numbers.depends_on_others(norm)] == ["batch"]
    channels = numbers.SMALL.shape[1]
    for groups, other in ((1, "layer"), (channels, "instance")):
        close(numbers.find_pools("group", sizes=(("g", groups),)).y, numbers.find_pools(other).y)
    square = numbers.SMALL.square().mean((1, 2), keepdim=True)
    close(numbers.find_pools("rms").y, numbers.SMALL / torch.sqrt(square + numbers.EPS))
    assert torch.equal(numbers.find_pools("rms").label, numbers.find_pools("layer").label)


def test_colours_and_letters_suffice():
    assert max(numbers.find_pools(norm).count for norm in SHOWN) <= len(COLOURS)
    assert set(SENTENCES) == set(SHOWN)


def test_black_text_is_legible_on_every_colour():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert min((luminance(colour) + 0.05) / 0.05 for colour in COLOURS) >= 7.0  # WCAG's strictest level


def test_the_page_holds_the_numbers_and_fits(page):
    steps = numbers.take_steps()
    for value in steps.normalized.flatten().tolist() + steps.y.flatten().tolist():
        assert f"{value:.3f}".replace("-0.000", "0.000") in page
    assert "\x1b" not in page
    assert max(map(len, page.splitlines())) <= 80
    assert not re.search(r"\bnan\b|None|tensor", page)


def test_cells_are_legible_without_colour(page):
    block = page[page.index("Group norm: ") :]
    assert "1a  2a  3a     5c  7c  3c" in block
    assert "8b  9b  7b     9d  6d  9d" in block


def test_a_picture_is_drawn(tmp_path):
    out = tmp_path / "page.png"
    ended = CliRunner().invoke(cli.app, ["explain", "--out", str(out)])
    assert ended.exit_code == 0, ended.exception
    assert out.stat().st_size > 20_000
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("page.jpeg", "ends in .png, .svg or .pdf"),
        ("page", "ends in .png, .svg or .pdf"),
        ("missing/page.png", "there is no folder 'missing'"),
        ("folder.png", "cannot be written"),
    ],
)
def test_a_bad_place_is_one_sentence(tmp_path, monkeypatch, out, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        print_explanation(out=Path(out))
    assert "\n" not in str(error.value)


def test_missing_matplotlib_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"needs matplotlib.*pip install 'anynorm\[compare\]'"):
        print_explanation(out=tmp_path / "page.png")


def test_layer_without_a_model_is_one_sentence():
    with pytest.raises(UserError, match="--mine module:factory"):
        print_explanation(layer="bn1")


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
