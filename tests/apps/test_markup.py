"""No text of the user's is markup: names like :train:, [bold]x[/bold] and $x$ are printed as they are."""

import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from anynorm.apps import cli
from anynorm.apps.terminal import open_console, plain_table, say

NAMES = ("train", "[bold]x[/bold]", ":train:")
CODE = """
import torch
from torch import nn

class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("[red]:key:[/red]", nn.BatchNorm1d(4))

    def forward(self, x):
        return self._modules["[red]:key:[/red]"](x)

def train():
    return Holder(), torch.randn(6, 4)

def no_norm():
    return nn.Linear(4, 4)

def fails():
    raise RuntimeError("[bold]:train:[/bold] is not there")

def make(norm):
    return nn.Sequential(nn.Linear(8, 4), norm(4, 0), nn.ReLU(), nn.Linear(4, 3))
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """A function that runs the command line in a folder with the models above, and returns all that it printed."""
    monkeypatch.chdir(tmp_path)
    for name in ("[bold]x[/bold]".replace("/", "-"), "a:watch:b"):
        (tmp_path / f"{name}.py").write_text(CODE)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["anynorm", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        done = capfd.readouterr()
        return " ".join((done.out + done.err).split())

    return main


@pytest.mark.parametrize("stem", ["[bold]x[-bold]", "a:watch:b"])
def test_try_explain_and_their_errors(run, stem):
    printed = run("try", f"{stem}.py:train", "--seconds", "0.1", "--threads", "1")
    assert printed.startswith(f"{stem}.py:train: 8 parameters")
    assert f"{stem}.py:no_norm: 20" in run("try", f"{stem}.py:no_norm")
    assert "RuntimeError: [bold]:train:[/bold] is not there" in run("try", f"{stem}.py:fails")
    printed = run("explain", "--mine", f"{stem}.py:train", "--out", "[red]$x_$:key:.svg")
    for text in (f"{stem}.py:train: [red]:key:[/red]", "picture: [red]$x_$:key:.svg"):
        assert text in printed
    assert "[red]:nothing:[/red]" in run("explain", "--mine", f"{stem}.py:train", "--layer", "[red]:nothing:[/red]")


def test_compare(run):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    np.savez("[red]:key:.npz", x=rng.normal(size=(300, 8)) + 3 * y[:, None], y=y)
    options = [
        "--norms",
        "batch,none",
        "--batch-sizes",
        "32",
        "--rates",
        "0.1",
        "--seeds",
        "1",
        "--images",
        "64",
        "--minutes",
        "0.5",
    ]
    name = "a:watch:b.py:make"
    printed = run("compare", "--data", "[red]:key:.npz", "--model", name, "--out", "[bold]:train:", *options)
    assert f"{name}: test accuracy" in printed
    assert "Report: [bold]:train:/report.html" in printed
    assert "'[b]:key:[/b]'" in run("compare", "--norms", "[b]:key:[/b]")


@pytest.mark.parametrize("command", ["list", "env", "speed", "try", "explain", "compare"])
def test_errors_of_the_command_line(command):
    printed = CliRunner().invoke(cli.app, [command, "--[red]:train:[/red]"]).output
    assert "--[red]:train:[/red]" in printed


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_print(name):
    console = open_console(record=True)
    table = plain_table(name, "n")
    table.add_row(name, "1")
    say(console, name)
    console.print(name)
    console.print(table)
    assert console.export_text().count(name) == 4


STEERING = "a\x1b[2J\x9b\x07\u202eb"
SHOWN = r"a\x1b[2J\x9b\x07\u202eb"


def test_text_that_would_steer_the_terminal_is_shown(tmp_path, monkeypatch, capfd):
    console = open_console()
    table = plain_table(STEERING)
    table.add_row(STEERING)
    console.print(STEERING, soft_wrap=True)
    console.print(table)
    assert capfd.readouterr().out.count(SHOWN) == 3
    (tmp_path / "net.py").write_text(CODE)
    own = {f"[red]:key:[/red].{key}": value for key, value in torch.nn.BatchNorm1d(4).state_dict().items()}
    torch.save({**own, f"{STEERING}{'x' * 10000}": torch.ones(1)}, tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["anynorm", "fold", "--model", "net.py:train", "--weights", "weights.pt"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capfd.readouterr().err
    assert SHOWN in said
    assert "\x1b" not in said
    assert len(said) < 2000
