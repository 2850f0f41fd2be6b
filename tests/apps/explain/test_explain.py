"""`anynorm explain`: its numbers are the reference's, its claims hold, its page fits and its picture is drawn."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from anynorm import reference
from anynorm.apps import cli
from anynorm.apps.explain import numbers
from anynorm.apps.explain.explain import print_explanation
from anynorm.apps.explain.notation import COLOURS, SENTENCES, SHOWN
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
