"""`anynorm speed` runs and says what it measured."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import anynorm
from anynorm.apps import cli
from anynorm.apps.speed import layers, speed, training
from anynorm.apps.timing.cases import Case
from anynorm.apps.timing.interleaved import InterleavedTimings
from anynorm.engine.allocator import AllocatorReport

pytestmark = pytest.mark.usefixtures("one_thread")


TINY = Case("tiny", "BatchNorm2d", (4,), (6, 4, 2, 2), channels_last=True)


def test_a_slow_machine_gets_fewer_images():
    asked = []

    def step(each: float):
        return lambda count: asked.append(count) or each * count

    assert [training.find_count(16, 50.0, step(each)) for each in (0.1, 0.9, 0.5, 30.0)] == [16, 2, 5, 2]
    assert training.find_count(1, 50.0, step(9.0)) == 1
    assert training.find_count(16, -1.0, step(0.1)) == 2
    assert asked == [2, 2, 2, 2, 1, 2]


def test_what_is_left_of_the_time_is_shared():
    end = time.perf_counter() + 10.0
    assert 4.0 < training.find_share(end, 0.2, 0.4) <= 5.0
    assert training.find_share(end - 60.0, 0.2, 0.4) == 0.0


class Small(nn.Module):
    """Two norms, one of them before an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Softplus())

    def forward(self, x):
        return self.layers(x)


def test_speed_prints_layers_and_steps(monkeypatch):
    monkeypatch.setattr(speed, "CASES", (TINY, Case("tiny", "LayerNorm", (16,), (8, 16))))
    monkeypatch.setattr(training, "MODELS", {"small": Small})
    tuned = AllocatorReport({"M_MMAP_MAX": 0}, False, "tuned, as it were")  # cannot be undone, so not in a test
    monkeypatch.setattr(anynorm, "tune_allocator", lambda keep_large: tuned)
    arguments = ["speed", "--seconds", "0.1", "--threads", "1", "--batch", "2", "--side", "32"]
    printed = CliRunner().invoke(cli.app, arguments)
    assert printed.exit_code == 0, printed.exception
    for text in ("batch 6x4x2x2, last", "layer 8x16", "geometric mean", "worst", "slower by more than 5 %"):
        assert text in printed.stdout
    for text in (
        "This takes about 0 seconds",
        "the median over rounds",
        "2x3x32x32",
        "small: 2 norms, 1 of them fused",
        "accelerate, fuse=True",
        "tuned, as",
        "It cannot be undone",
    ):
        assert text in printed.stdout
    assert printed.stdout.count("torch.nn ") >= 2
    assert max(map(len, printed.stdout.splitlines())) <= 80
    assert "…" not in printed.stdout


@pytest.mark.parametrize(("times", "busy"), [([1.0, 1.1, 1.2], False), ([1.0, 2.0, 1500.0], True)])
def test_a_table_measured_on_a_busy_machine_says_so_and_fits(monkeypatch, times, busy):
    timings = InterleavedTimings({"torch": times, "anynorm": [1.0] * 3, "copy": [1.0] * 3})
    monkeypatch.setattr(layers, "_time_layer", lambda *_: timings)
    console = Console(file=io.StringIO(), width=80)
    layers.print_layers(console, [TINY], 0.0)
    printed = console.file.getvalue()
    assert ("The machine was busy" in printed) == busy
    assert "…" not in printed


def test_the_usual_layers_are_a_dozen_different_ones_of_every_norm():
    assert len(layers.CASES) == 12
    assert {case.norm for case in layers.CASES} == {"batch", "group", "instance", "layer", "rms"}
    names = [case.name + (", channels_last" if case.channels_last else "") for case in layers.CASES]
    assert len(set(names)) == len(names)
