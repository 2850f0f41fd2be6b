"""What the monitor measures equals the formula in NumPy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import anynorm
from anynorm.doctor.monitor.record import Record
from doctor.monitored import keep

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rel": 1e-6, "abs": 1e-12}
SHAPES = [(12, 5), (6, 5, 7), (6, 5, 4, 3), (2, 5, 3, 2, 2), (1, 5, 4, 4)]


def measure(norm: nn.Module, *inputs, **options) -> Record:
    """The record of one step of a norm alone."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, *given):
            return self.norm(*given, **options)

    model = Net()
    with anynorm.Monitor(model, warn=False) as monitor:
        model(*inputs).sum().backward()
    return monitor.records["norm"]


def draw(shape, seed=0):
    """Values whose samples differ in their means, so that the number of values would say too little of the noise."""
    generator = torch.Generator().manual_seed(seed)
    lift = torch.randn(shape[0], shape[1], *[1] * (len(shape) - 2), generator=generator)
    return torch.randn(shape, generator=generator) + 0.7 * lift + 3


def expect(x, running_mean, running_var, eps=1e-5, counted=None):
    """The numbers of a record, from the formula."""
    x = np.moveaxis(np.asarray(x, np.float64), 1, -1).reshape(len(x), -1, x.shape[1])
    counted = np.ones(x.shape[:2], bool) if counted is None else np.asarray(counted).reshape(len(x), -1)
    values = x[counted]
    mean, var = values.mean(0), values.var(0)
    means = np.stack([own[kept].mean(0) for own, kept in zip(x, counted) if kept.any()])
    weights = np.array([kept.mean() for kept in counted if kept.any()]) / counted.mean() / len(counted)
    number = len(means)
    if number > 1:
        error2 = number / (number - 1) * (weights[:, None] ** 2 * (means - mean) ** 2).sum(0)
    else:
        error2 = var / (len(values) - 1)
    std = np.sqrt(var + eps)
    gap = np.abs(mean - running_mean) / std
    return {
        "mean": values.mean(),
        "std": values.std(),
        "gap": np.sort(gap)[(len(gap) - 1) // 2],
        "gap_worst": gap.max(),
        "channel": gap.argmax(),
        "ratio": np.sort((var + eps) / (running_var + eps))[(len(gap) - 1) // 2],
        "noise": np.sqrt((error2 / std**2).mean()),
    }


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_norm(shape, ours):
    kind = "BatchNorm1d" if len(shape) < 4 else f"BatchNorm{len(shape) - 2}d"
    norm = getattr(anynorm if ours else nn, kind)(5)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.copy_(torch.tensor([-1.0, 0.005, 2.0, 1.0, -0.001]))
    before = norm.running_mean.double().numpy(), norm.running_var.double().numpy()
    x = draw(shape)
    found = measure(norm, x)
    for name, value in expect(x, *(np.array(t) for t in before)).items():
        assert getattr(found, name) == pytest.approx(value, **CLOSE), name
    assert (found.gamma_min, found.gamma_max) == (-1, 2)
    assert (found.gamma_zero, found.gamma_negative) == (0.4, 0.4)
    assert found.gradient == pytest.approx(float(norm.weight.grad.norm()), rel=1e-5, abs=1e-4)
    assert (found.layer, found.calls, found.constant, found.nonfinite, found.warned) == ("norm", 1, 0, "", "")


@pytest.mark.parametrize("how", ["mask", "lengths", "context"])
def test_padding_counts_nowhere(how):
    x, lengths = draw((4, 5, 7)), torch.tensor([7, 3, 1, 0])
    mask = torch.arange(7) < lengths[:, None]
    x = torch.where(mask[:, None], x, torch.nan if how == "mask" else 1e9)
    expected = expect(x.numpy(), np.zeros(5), np.ones(5), counted=mask.numpy())
    for norm in (anynorm.BatchNorm1d(5), anynorm.BatchNormAct1d(5)):
        if how == "context":
            with anynorm.masked(mask):
                found = measure(norm, x)
        else:
            found = measure(norm, x, **{how: mask if how == "mask" else lengths})
        for name, value in expected.items():
            assert getattr(found, name) == pytest.approx(value, **CLOSE), name
        assert not found.nonfinite
    instance = measure(anynorm.InstanceNorm1d(5, affine=True), x, mask=mask)
    assert (instance.mean, instance.std) == pytest.approx((expected["mean"], expected["std"]), rel=1e-5)
    assert not instance.nonfinite


def test_packed_sequences_are_their_rows():
    rows = [draw((length, 5), length) for length in (6, 4, 3)]
    found = measure(anynorm.LayerNorm(5), *[torch.cat(rows)])
    packed = torch.nn.utils.rnn.pack_sequence(rows)
    norm = anynorm.BatchNorm1d(5)
    model = nn.Sequential(norm)
    with anynorm.Monitor(model) as monitor:
        model(packed).data.sum().backward()
    record = monitor.records["0"]
    assert (record.mean, record.std) == pytest.approx((found.mean, found.std), rel=1e-5)


def test_a_fused_norm_with_a_residual_is_measured_by_its_input():
    x = draw((6, 5, 4, 3))
    norm = anynorm.BatchNormAct2d(5)
    expected = expect(x.numpy(), np.zeros(5), np.ones(5))
    found = measure(norm, x, torch.full_like(x, 1e6))
    assert (found.gap, found.std) == pytest.approx((expected["gap"], expected["std"]), **CLOSE)


def test_ghost_batches_are_noisier_and_synchronized_ones_less(monkeypatch):
    x = draw((12, 5, 4, 3))
    whole = measure(anynorm.BatchNorm2d(5), x).noise
    assert measure(anynorm.GhostBatchNorm2d(5, ghost_size=3), x).noise == pytest.approx(2 * whole)
    norm = anynorm.SyncBatchNorm(5)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 4)
    from anynorm.doctor.monitor.measure import Tally

    tally = Tally(norm)
    tally.add((x,), {})
    assert tally.finish(0, "")[0].noise == pytest.approx(whole / 2)


def test_the_noise_is_how_far_other_batches_lie():
    """Over batches of the same source, the deviation of the mean is what one batch said of it."""
    batches = [draw((16, 3, 6, 6), seed) for seed in range(200)]
    said = np.mean([measure(nn.BatchNorm2d(3), x).noise for x in batches[:40]])
    means = np.stack([x.double().mean((0, 2, 3)).numpy() for x in batches])
    std = np.sqrt(1 + 0.7**2)
    assert said == pytest.approx(np.sqrt(means.var(0, ddof=1).mean()) / std, rel=0.1)
    assert said > 3 / np.sqrt(16 * 36)  # values of one sample are alike


def test_other_norms_have_mean_and_deviation_and_gamma():
    x = draw((6, 8, 4, 3))
    for norm in (nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), anynorm.GroupNorm(2, 8), nn.LayerNorm(3)):
        found = measure(norm, x)
        expected = (float(x.double().mean()), float(x.double().std(correction=0)), 1.0, 1.0)
        assert (found.mean, found.std, found.gamma_min, found.gamma_max) == pytest.approx(expected, rel=1e-5)
        assert found.gap != found.gap and found.noise != found.noise


def test_what_is_not_finite_is_named():
    x = draw((6, 5, 4, 3))
    x[0, 0, 0, 0] = torch.inf
    norm = nn.BatchNorm2d(5)
    assert measure(norm, x).nonfinite.split() == ["input", "running_mean", "running_var", "gradient"]
    assert measure(nn.GroupNorm(1, 5), x).nonfinite.split() == ["input", "gradient"]
    with torch.no_grad():
        norm = nn.BatchNorm2d(5)
        norm.weight[2] = torch.nan
    assert "gamma" in measure(norm, draw((6, 5, 4, 3))).nonfinite.split()


def test_half_precision_is_measured_in_wider_numbers():
    x = (100 + draw((6, 5, 4, 3))).bfloat16()
    found = measure(anynorm.BatchNorm2d(5).bfloat16(), x)
    expected = expect(x.double().numpy(), np.zeros(5), np.ones(5))
    assert (found.std, found.noise) == pytest.approx((expected["std"], expected["noise"]), **CLOSE)


def test_records_go_to_a_summary_writer():
    class Writer:
        def __init__(self):
            self.seen = {}

        def add_scalar(self, tag, value, step):
            self.seen[tag, step] = value

    writer, model = Writer(), nn.Sequential(nn.BatchNorm2d(5), nn.GroupNorm(1, 5, affine=False))
    with anynorm.Monitor(model, every=2, writer=writer) as monitor:
        records = keep(monitor)
        for seed in range(3):
            model(draw((6, 5, 4, 3), seed)).square().sum().backward()
    assert {step for _, step in writer.seen} == {0, 2}
    first = records[0]
    assert writer.seen["norm_gap/0", 0] == first.gap
    assert writer.seen["norm_gradient/0", 0] == first.gradient
    assert ("norm_gap/1", 0) not in writer.seen
    assert ("norm_std/1", 2) in writer.seen
