"""recalibrate: the errors it estimates, what it reports, and which norms it leaves."""

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import anynorm
from anynorm.modules import batch as ours
from anynorm.statistics import Moments
from anynorm.surgery.recalibration.statistics import KEPT, Tally, merge_groups
from surgery.recalibration_cases import IMAGES, draw, find_truth, make_net


def test_error_is_the_spread_between_batches():
    """Equals the formula, written out on numbers that can be followed; the same in groups as without."""
    tally = Tally()
    for mean, m2 in ((1.0, 2.0), (3.0, 2.0)):
        tally.add(Moments(2, torch.tensor([mean], dtype=torch.float64), torch.tensor([m2], dtype=torch.float64)))
    found = merge_groups(tally.groups, tally.batches)
    assert found is not None
    # mean 2, var (2 + 2 + 4) / 4 = 2; offsets -1 and 1, each of weight 1/4, times 2
    assert float(found.mean_error) == pytest.approx((2 * (1 / 4 + 1 / 4)) ** 0.5 / 2**0.5)
    assert float(found.var_error) == 0  # both groups have the mean square 2 about 2
    assert float(found.var) == pytest.approx(8 / 3)


def test_error_tells_how_far_a_sample_is_from_the_truth():
    """Invariant: over 40 sets of data the true error, in units of the estimated one, has mean square near 1."""
    mean_ratios, var_ratios = [], []
    for seed in range(40):
        norm = nn.BatchNorm1d(24)
        report = anynorm.recalibrate(norm, list(draw(480, 24, seed=seed).split(8))).moved[0]
        mean_ratios.append(norm.running_mean.double() / report.mean_error)
        var_ratios.append((norm.running_var.double() - 1) / report.var_error)
    for ratios in (mean_ratios, var_ratios):
        assert 0.8 < float(torch.stack(ratios).square().mean()) < 1.25


def test_groups_keep_memory_bounded_and_the_total_exact():
    """Equals the reference; at most KEPT groups whatever comes."""
    tally, xs = Tally(), draw(4 * KEPT + 5, 3, 2, seed=1, mean=50, dtype=torch.float64)
    for number, x in enumerate(xs, 1):
        tally.add(Moments(3, x.mean(0), (x - x.mean(0)).square().sum(0)))
        assert len(tally.groups) <= KEPT and sum(g.count for g in tally.groups) == 3 * number
    found = merge_groups(tally.groups, tally.batches)
    assert found is not None and tally.total is not None
    torch.testing.assert_close(found.var, xs.flatten(0, 1).var(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(found.mean, tally.total.mean, rtol=1e-14, atol=0)


def test_rtol_ends_the_pass_when_the_error_is_small_enough():
    """Invariant: fewer batches for a looser demand; what was asked for is reached."""
    xs = list(draw(64 * 200, 4).split(64))
    taken = {}
    for rtol in (0.05, 0.02, 1e-9):
        report = anynorm.recalibrate(nn.BatchNorm1d(4), xs, rtol=rtol)
        taken[rtol] = report.batches
        assert report.moved[0].error <= rtol or report.batches == 200
    assert 8 <= taken[0.05] < taken[0.02] < taken[1e-9] == 200


def test_report_prints_a_line_for_each_norm():
    model = make_net()
    report = anynorm.recalibrate(model, IMAGES)
    lines = str(report).splitlines()
    assert lines[0] == "2 batch norms recalibrated, 0 left; earlier='batch', 1 pass of 3 batches"
    assert [line.split()[0] for line in lines[3:]] == ["1", "4"]
    assert max(map(len, lines)) <= 100
    entry = anynorm.recalibrate(model, IMAGES).moved[0]
    assert float(entry.shift.abs().max()) < 1e-6 and float((entry.ratio - 1).abs().max()) < 1e-6
    one = anynorm.recalibrate(model, IMAGES[:1])
    assert one.moved[0].error == float("inf") and "unknown" in str(one)


def test_shift_is_in_old_std_and_ratio_of_variances():
    """Equals the reference."""
    x, norm = draw(100, 2, mean=3, std=2), nn.BatchNorm1d(2)
    norm.running_var.fill_(16)
    entry = anynorm.recalibrate(norm, [x]).moved[0]
    mean, var = find_truth(x)
    torch.testing.assert_close(entry.shift, mean / (16 + 1e-5) ** 0.5)
    torch.testing.assert_close(entry.ratio, (var + 1e-5) / (16 + 1e-5))


def test_progress_is_drawn_where_it_is_asked_for(capsys):
    anynorm.recalibrate(make_net(), IMAGES)
    assert capsys.readouterr().out == ""
    anynorm.recalibrate(make_net(), IMAGES, progress=True)  # no terminal: rich draws its last state or nothing
    anynorm.recalibrate(make_net(), iter(IMAGES), progress=True)


# ---- what is left --------------------------------------------------------------------------------------------------


class Scaled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input)


class Activated(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(super().forward(x))


class Later(ours._Batch, nn.BatchNorm2d):
    """A subclass without a forward of its own."""

    _axes = (4,)


def test_norms_with_code_of_their_own_are_left_and_said():
    """Invariant: left as they are; `trust` takes them in."""
    model = nn.Sequential(nn.BatchNorm2d(3), Scaled(3), Activated(3), nn.BatchNorm2d(3), Later(3))
    model[3].forward = model[3].forward
    report = anynorm.recalibrate(model, IMAGES)
    assert [entry.name for entry in report.moved] == ["0", "4"]
    assert [entry.name for entry in report.left] == ["1", "2", "3"]
    assert int(model[1].num_batches_tracked) == 0 and float(model[1].running_mean.abs().max()) == 0
    assert "left 1 (" in str(report) and "name it in trust=" in str(report)
    report = anynorm.recalibrate(model, IMAGES, trust=(Activated,))
    assert [entry.name for entry in report.moved] == ["0", "2", "4"]


def test_recurrent_any_and_scripted_norms_are_left_and_said():
    """Invariant: nothing of them moves."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.lstm = anynorm.LSTM(3, 4, norm="batch-sequence")
            self.pattern = anynorm.AnyNorm("n c -> c", affine="c", track_running_stats=True, c=4)
            self.scripted = torch.jit.script(nn.BatchNorm1d(4))
            self.never = nn.BatchNorm1d(9)

        def forward(self, x: Tensor) -> Tensor:
            return self.scripted(self.pattern(self.lstm(self.norm(x)[None])[0][0]))

    model = Mixed()
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("norm.")}
    report = anynorm.recalibrate(model, [draw(6, 3), draw(6, 3, seed=1)])
    assert [entry.name for entry in report.moved] == ["norm"]
    left = {entry.name.split(".")[0]: entry.reason for entry in report.left}
    assert set(left) == {"lstm", "pattern", "scripted", "never"}
    assert left["never"] == "the model did not call it" and "jit.script" in left["scripted"]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())
