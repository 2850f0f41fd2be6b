"""The study of internal covariate shift: its verdict on invented numbers, its noise, what it watches, its picture."""

import warnings
from functools import partial

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from anynorm.apps.studies.claims import covshift
from anynorm.apps.studies.data import load_data
from anynorm.apps.studies.models import dense
from anynorm.apps.studies.study import Results, Setting, Trial

SHIFTED = {"none": -0.5, "batch": -1.5, "batch + noise": -0.2, "none + noise": -0.1}  # log10 of drift
STEADY = SHIFTED | {"batch": -0.3}
UNSHAKEN = SHIFTED | {"batch + noise": -1.0}
LOST = {"none": 2.5, "batch": 2.0, "batch + noise": 2.4, "none + noise": 2.9}  # log10 of steps
KEPT, USELESS = LOST | {"batch + noise": 2.05}, LOST | {"batch": 2.5}


@pytest.fixture(scope="module")
def setting():
    """Digits, which need no file."""
    return Setting(load_data("digits"), 4)


def invent(setting, drift, steps):
    def find(trial):
        swing = 0.01 * (trial.seed % 2) * (1 + covshift.ARMS.index(trial.arm))
        if trial["kind"] == "speed":
            log = steps[trial.arm] + swing
            return {"status": "finished", "reached": True, "steps": round(10**log), "log_steps": log, "cost": 10**log}
        smooth = 0.0 if trial.arm.startswith("none") else -0.3
        return {
            "status": "finished", "drift": drift[trial.arm] + swing, "turn": -1.0, "error": smooth + swing, "range": 0.0
        }  # fmt: skip

    return Results(setting, list(dict.fromkeys(covshift.plan(setting, find))), find)


@pytest.mark.parametrize(
    ("drift", "steps", "outcome", "preferred"),
    [
        (SHIFTED, LOST, "confirmed", "neither over the other|reduced shift"),
        (SHIFTED, KEPT, "refuted", "a smoother loss"),
        (STEADY, LOST, "refuted", "neither clearly"),
        (SHIFTED, USELESS, "inconclusive", "no explanation"),
        (UNSHAKEN, KEPT, "inconclusive", "no explanation"),
    ],
)
def test_verdict_needs_less_shift_and_a_benefit_that_goes_with_it(setting, drift, steps, outcome, preferred):
    verdict = covshift.judge(invent(setting, drift, steps))
    assert verdict.outcome == outcome
    assert any(f"prefer {text}" in verdict.sentence for text in preferred.split("|"))


def test_noise_moves_each_unit_anew_and_equally_far_at_any_scale():
    torch.manual_seed(0)
    noise, x = covshift.Noise(), torch.randn(500, 200)
    torch.manual_seed(1)
    first, second = noise(x), noise(x)
    torch.manual_seed(1)
    large = noise(1000 * x + 7000)
    torch.testing.assert_close(large, 1000 * first + 7000, rtol=1e-4, atol=1e-2)
    assert covshift.measure_drift(first, second) > 0.3
    moved = (first.mean(0) - x.mean(0)) / x.std(0, unbiased=False)
    assert moved.abs().max() <= covshift.SHIFT + 1e-5
    ratio = first.std(0) / x.std(0)
    assert 1 / covshift.SCALE - 1e-5 <= ratio.min() < 0.8 and 1.25 < ratio.max() <= covshift.SCALE + 1e-5
    assert noise.eval()(x) is x


def test_drift_is_of_distributions_and_in_standard_deviations():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator)
    order = torch.randperm(400, generator=generator)
    assert covshift.measure_drift(x, x[order]) == 0
    by_half = covshift.measure_drift(x, x + 0.5 * x.std(0))
    assert by_half == pytest.approx(0.5, rel=1e-5)
    assert covshift.measure_drift(1000 * x, 1000 * (x + 0.5 * x.std(0))) == pytest.approx(by_half, rel=1e-4)


def build(setting, arm):
    own = partial(dense, activation=nn.Sigmoid, start=nn.init.xavier_uniform_)
    return setting.build(partial(covshift.make_norm, arm), 0, own)


@pytest.mark.parametrize("arm", covshift.ARMS)
def test_looking_around_leaves_no_trace(setting, arm):
    network = build(setting, arm)
    x, y = torch.from_numpy(setting.data.train_x[:60]), torch.from_numpy(setting.data.train_y[:60])
    before, random = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    covshift.look_around(network, x, y, 1.0, 0)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_short_step_keeps_the_promise_and_turns_nothing(setting):
    network = build(setting, "batch")
    x, y = torch.from_numpy(setting.data.train_x[:60]), torch.from_numpy(setting.data.train_y[:60])
    short, long = (covshift.look_around(network, x, y, rate, 0) for rate in (1e-2, 3.0))
    assert short["error"] < 0.1 < long["error"]
    assert short["turn"] < 1e-3 < long["turn"]
    assert short["range"] < long["range"]


def test_watching_trains_and_measures_the_noise(setting):
    plain, noisy = (
        covshift.perform(Trial.of(arm, 0.1, 0, kind="watch", most=12), setting) for arm in ("batch", "batch + noise")
    )
    assert plain["status"] == noisy["status"] == "finished"
    assert noisy["drift"] > plain["drift"] + 0.5


def test_picture_is_drawn_without_a_warning(setting):
    figure = Figure(layout="constrained")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        covshift.paint(invent(setting, SHIFTED, KEPT), figure.add_subplot())
        figure.draw_without_rendering()
    assert len(figure.axes) == 2
