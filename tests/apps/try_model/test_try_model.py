"""`anynorm try`: what it prints of a model, and nothing of the user's is changed."""

import random
import textwrap

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from anynorm.apps import cli
from anynorm.apps.terminal import open_console
from anynorm.apps.timing.steps import PairedTimings
from anynorm.apps.try_model.accuracy import compare_outputs
from anynorm.apps.try_model.sentences import describe_speed
from anynorm.apps.try_model.try_model import print_trial
from anynorm.doctor.call import Call
from anynorm.doctor.outputs import largest_difference
from anynorm.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_model_without_norms_is_no_error(models):
    ended = CliRunner().invoke(cli.app, ["try", models + "without_norms"])
    assert ended.exit_code == 0
    assert "no normalization layer" in ended.stdout


def test_the_users_model_and_random_state_stay(monkeypatch):
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)).eval()
    monkeypatch.setattr("anynorm.apps.models.load.ZOO", {"own": lambda: model})
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    state = {name: value.clone() for name, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    print_trial("own", seconds=0.05, threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert type(model[1]) is nn.BatchNorm1d
    assert not model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


def test_differences():
    one = [torch.tensor([1.0, -4.0, float("nan")])]
    assert largest_difference(one, one).largest == 0.0
    other = [torch.tensor([1.0, -4.5, float("nan")])]
    assert largest_difference(one, other).largest == 0.5
    assert largest_difference(one, other).scale == 4.0
    assert largest_difference(one, [torch.tensor([1.0, float("nan"), 0.0])]).largest == float("inf")
    assert largest_difference([torch.zeros(2)], [torch.zeros(3)]).largest == float("inf")


def test_accuracy_is_measured_against_float64():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    accuracy = compare_outputs(model, model, Call((torch.randn(8, 3),)), training=True)
    assert accuracy.difference.largest == 0.0
    assert accuracy.errors is not None
    assert 0.0 < accuracy.errors[0].largest < 1e-5
    assert accuracy.errors[0] == accuracy.errors[1]


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_the_whole_trial_fits_80_columns_without_colour_codes(name):
    ended = CliRunner().invoke(cli.app, ["try", name, "--seconds", "0.1"])
    assert ended.exit_code == 0, ended.exception
    assert "\x1b" not in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 80
    for part in ("Norms", "before", "after", "times the speed", "evaluation", "training", "padding"):
        assert part in ended.stdout
    assert ended.stdout.rstrip().endswith("import anynorm; anynorm.accelerate(model)")


def test_outputs_in_dicts_and_tuples_work_and_what_was_left_is_said(models, tmp_path):
    (tmp_path / "subclass.py").write_text(
        textwrap.dedent("""
        from torch import nn
        class OwnNorm(nn.BatchNorm1d):
            def forward(self, x): return super().forward(x) + 1
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.mine, self.norm = OwnNorm(4), nn.BatchNorm1d(4)
            def forward(self, x): return {"y": self.norm(self.mine(x)), "nothing": None}
        """)
    )
    ended = CliRunner().invoke(cli.app, ["try", "subclass.py:Model", "--seconds", "0.1", "--batch", "5"])
    assert ended.exit_code == 0, ended.exception
    assert "input 5x4 float32 (made up by anynorm)" in ended.stdout
    assert "1 BatchNorm1d: replaced" in ended.stdout
    assert "1 OwnNorm: left" in ended.stdout
    assert "left mine" in ended.stdout


def test_a_model_that_fails_in_evaluation_or_backward_ends_in_one_sentence(monkeypatch):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            if not self.training:
                raise RuntimeError("no evaluation")
            return self.norm(x)

    class Spoils(Fails):
        def forward(self, x):
            y = self.norm(x).sigmoid()
            y.register_hook(lambda grad: grad / "two") if y.requires_grad else None
            return y

    for model, sentence in ((Fails, "in evaluation mode the model raised"), (Spoils, "a training step raised")):
        monkeypatch.setattr("anynorm.apps.models.load.ZOO", {"own": lambda model=model: (model(), torch.randn(4, 5))})
        with pytest.raises(UserError, match=sentence):
            print_trial("own", seconds=0.05)


@pytest.mark.filterwarnings("ignore")
def test_nothing_replaced_is_neither_timed_nor_compared(tmp_path, monkeypatch):
    """A model timed against itself was called faster or slower in 9 of 63 runs."""
    monkeypatch.chdir(tmp_path)
    code = "import torch\nfrom torch import nn\nclass Mine(nn.BatchNorm1d):\n"
    code += "    def forward(self, x):\n        return super().forward(x) + 1\n"
    (tmp_path / "left_nets.py").write_text(f"{code}def build():\n    return Mine(4), torch.randn(6, 4)\n")
    console = open_console(record=True)
    print_trial("left_nets.py:build", seconds=0.1, threads=1, console=console)
    printed = console.export_text()
    assert "Nothing was replaced, so there is nothing to time, to compare or to paste" in " ".join(printed.split())
    for word in ("verdict", "ratio", "before", "training step"):
        assert word not in printed
    assert "Does a sample's output depend" in printed


def test_a_ratio_that_the_medians_do_not_show_is_explained():
    """Pairs at two speeds of the machine: the medians come from different pairs."""
    lines = dict(describe_speed(PairedTimings([1.0, 1.0, 3.0, 3.0, 3.0], [0.9, 0.9, 0.9, 2.7, 2.7])))
    assert (lines["before"], lines["after"]) == ("3000.00 ms", "900.00 ms")
    assert lines["ratio"].startswith("1.11 times the speed, the median over pairs")
    assert "have the ratio 3.33" in lines["ratio"]
    assert "the two medians" not in dict(describe_speed(PairedTimings([2.0] * 6, [1.0] * 6)))["ratio"]
