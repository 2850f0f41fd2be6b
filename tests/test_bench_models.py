"""Whole models in the benchmark: what is timed, what is a loss beyond noise, and that it is read back.

It keeps an invariant; times are made up but in one run on a tiny model.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from rich.console import Console
from torch import nn

from anynorm.apps.timing.cases import Case
from anynorm.apps.timing.forms import ACCELERATED, AGAIN, BUILT, FUSED, Forms, make_forms
from anynorm.apps.timing.interleaved import InterleavedTimings
from anynorm.doctor.call import Call
from anynorm.engine import kernels
from bench_rows import make_model_row
from benchmarks import bench, model_norms, page, report, steps, verdicts
from benchmarks.models import MODELS, QUICK

pytestmark = pytest.mark.usefixtures("one_thread")


def make_small() -> tuple[nn.Module, torch.Tensor]:
    """Two norms, one of them before an activation."""
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.LayerNorm(4)), torch.randn(6, 5)


def judge(*rows: steps.ModelRow) -> verdicts.Verdict:
    return next(verdict for verdict in verdicts.judge([], [*rows]) if verdict.goal.startswith("whole models"))


BASE = (make_model_row(1.0, BUILT), make_model_row(1.0, AGAIN))


def test_the_models_are_those_that_were_promised():
    assert len(MODELS) == 9
    assert set(QUICK) < set(MODELS)
    parameters = sum(p.numel() for p in MODELS["ResNet-50"]()[0].parameters())
    assert parameters == 25_557_032
    assert MODELS["transformer, pre-norm"]()[1].shape == (8, 24, 96)
    assert {name: len(MODELS[name]()[1]) for name in ("MLP, batch 16", "MLP, batch 96")} == {
        "MLP, batch 16": 16,
        "MLP, batch 96": 96,
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_form_of_a_model_computes_the_same(name):
    model, x = MODELS[name]()
    forms = make_forms(model, x[:2])
    assert forms.norms
    steps.check_forms(forms)


def test_a_form_that_computes_something_else_is_not_timed(monkeypatch):
    def make_wrong(model, x):
        forms = make_forms(model, x)
        with torch.no_grad():
            forms.models[ACCELERATED][0].weight.mul_(2)
        return forms

    monkeypatch.setattr(steps, "make_forms", make_wrong)
    problems = []
    assert list(steps.measure_models({"small": make_small}, 0.0, problems.append)) == [[]]
    assert problems[0].startswith("small was not timed: ValueError: accelerate is ")


def test_a_loss_lies_below_one_and_below_what_a_model_differs_from_itself():
    assert judge(*BASE, make_model_row(1.2)).result == "met"
    assert judge(*BASE, make_model_row(0.99), make_model_row(1.4, FUSED)).result == "met", "the interval holds 1"
    lost = judge(*BASE, make_model_row(0.9), make_model_row(1.6, FUSED))
    assert lost.result == "missed: 1 below 1.0"
    assert lost.causes == (
        "0.90 (0.88 to 0.92) net, step, accelerate: 11.1 us longer; "
        "its 2 norms by themselves take 10 us, torch.nn's 8 us: kernel 20 %, memory 30 %, call 50 %"
    )
    unsure = make_model_row(0.9, AGAIN)  # so much slower was the very same model
    assert judge(BASE[0], unsure, make_model_row(0.9), make_model_row(1.6, FUSED)).result == "met"
    slow = judge(*BASE, make_model_row(1.0), make_model_row(1.1, FUSED))
    assert slow.result == "missed: the mean by 9 %"
    assert slow.causes.startswith("1.00 (0.98 to 1.02) net, step, accelerate: 0 us shorter; its 2 norms")
    assert "; 1.10 (1.08 to 1.12) net, step, accelerate, fuse=True: 9.09 us shorter" in slow.causes
    assert judge(*BASE, make_model_row(1.2)).causes == ""
    assert judge().result == "not measured"
    assert judge(*BASE).result == "not measured"


def test_each_model_and_mode_is_held_against_itself():
    others = [dataclasses.replace(row, mode="evaluation") for row in (BASE[0], make_model_row(0.5, AGAIN))]
    found = judge(*BASE, *others, make_model_row(0.8), make_model_row(0.8, mode="evaluation"))
    assert found.result == "missed: 1 below 1.0 and the mean by 30 %"
    assert "net, step" in found.causes


def test_disturbed_rows_are_marked(monkeypatch):
    noisy = InterleavedTimings({name: [1.0, 1.0, 3.0, 3.0] for name in (BUILT, AGAIN, ACCELERATED, FUSED)})
    asked = []
    monkeypatch.setattr(Forms, "time", lambda self, names, seconds, training: asked.append(seconds) or noisy)
    problems = []
    rows = next(steps.measure_models({"small": make_small}, 1.0, problems.append))
    assert not problems
    assert {row.disturbed for row in rows} == {"the same call of torch.nn differed by 200 %"}
    assert asked == [6.0, 3.0, 3.0, 3.0, 1.5, 1.5], "three attempts at the step, three at the evaluation"
    assert "4 disturbed by other work" in judge(*rows).found
    marked = judge(*BASE, make_model_row(0.9, disturbed="torch.nn differed from itself by 12 %"))
    assert "11.1 us longer, disturbed; its 2 norms" in marked.causes
    assert page.write_models(rows)[-1] == (
        "- small, step: the same call of torch.nn differed by 200 %.\n"
        "- small, evaluation: the same call of torch.nn differed by 200 %."
    )


def test_norms_are_found_on_the_shapes_they_have_in_the_model():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm(5), nn.RMSNorm(5)
    )
    model.add_module("again", model[1])
    x = torch.randn(2, 3, 6, 5).to(memory_format=torch.channels_last)
    found = model_norms.find_norm_cases(model.to(memory_format=torch.channels_last), Call((x,)))
    kinds = {(case.kind, case.arguments, case.layout): count for case, count in found.items()}
    assert {case.shape for case in found} == {(2, 4, 6, 5)}
    assert kinds[("BatchNorm2d", (4,), "channels_last")] + kinds.get(("BatchNorm2d", (4,), "contiguous"), 0) == 2
    assert {name for name, *_ in kinds} == {"BatchNorm2d", "GroupNorm", "InstanceNorm2d", "LayerNorm", "RMSNorm"}
    assert kinds[("GroupNorm", (2, 4), "channels_last")] == 1
    assert [case.arguments for case in found if case.kind == "LayerNorm"] == [(5,)]
    resnet, x = MODELS["ResNet-50"]()
    assert sum(model_norms.find_norm_cases(resnet, Call((x,))).values()) == 53


@pytest.mark.skipif(bool(kernels.OFF), reason="without kernels there are none to be timed alone")
def test_a_norm_that_runs_twice_counts_twice(monkeypatch):
    rounds = InterleavedTimings(
        {"anynorm": [1e-5] * 3, "kernel": [2e-6] * 3, "fresh": [5e-6] * 3, "torch": [2e-5] * 3, "copy": [1e-6] * 3}
    )
    monkeypatch.setattr(model_norms, "time_mode", lambda *_: (rounds, {}))
    one, two = Case("", "BatchNorm1d", (4,), (6, 4)), Case("", "LayerNorm", (4,), (6, 4))
    found = model_norms.time_norms(Counter({one: 2, two: 1}), "evaluation")
    assert found.torch == pytest.approx(60)
    assert (found.ours.kernel, found.ours.memory, found.ours.call) == pytest.approx((6, 9, 15))
    assert model_norms.time_norms(Counter(), "evaluation") is None


def test_a_tiny_model_is_measured_printed_and_read_back(tmp_path):
    plan = bench.Plan([], {"small": make_small})
    console = Console(record=True, width=200)
    found = bench.run(console, plan, ["anynorm", "tuned"], seconds=0.01)
    assert not found.problems
    assert [(row.mode, row.form) for row in found.models] == [
        (mode, form) for mode in ("step", "evaluation") for form in (BUILT, AGAIN, ACCELERATED, FUSED)
    ]
    assert {(row.form, row.norms, row.fused) for row in found.models} == {
        *((form, 2, 0) for form in (BUILT, AGAIN, ACCELERATED)),
        (FUSED, 2, 1),
    }
    for row in found.models:
        assert bool(kernels.OFF) or (row.torch_norms_us > 0 and row.kernel_us > 0)
        assert 0 < row.q1_us <= row.median_us <= row.q3_us
        assert row.low <= row.ratio <= row.high
    steps.write_models(found.models, {"cpu": "one"}, tmp_path / "run.csv")
    assert steps.read_models(tmp_path / "run.csv") == found.models
    assert steps.read_models(tmp_path / "older.csv") == []
    assert "1 of 2" in console.export_text()
    titles, cells = report.list_models(found.models)
    assert len(cells) == 4
    assert {len(line) for line in cells} == {len(titles)}
    assert page.write_models(found.models)[0] == "## Whole models"
    assert page.write_models([]) == []
