"""`fold` leaves what it cannot fold exactly, with the reason, and refuses models in training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import anynorm
from anynorm.surgery.fold.norms import normalizes_by_running
from surgery.fold_cases import check, draw, find_reason, shake

X = draw(2, 4, 9, 8)


class Pair(nn.Module):
    def __init__(self, way=lambda n, x: n.norm(n.conv(x))):
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), way
        self.other = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.way(self, x)


def test_a_layer_that_is_called_twice():
    """pytorch#104593, #197539: folding it corrupts the other call."""
    report = check(shake(Pair(lambda n, x: n.norm(n.conv(x)) + n.other(n.conv(x)))), X, changed=0)
    assert "conv is called 2 times" in find_reason(report, "norm")
    assert "conv is called 2 times" in find_reason(report, "other")


def test_a_norm_that_is_called_twice():
    report = check(shake(Pair(lambda n, x: n.norm(F.relu(n.norm(n.conv(x)))))), X, changed=0)
    assert "norm is called 2 times" in find_reason(report, "norm")
    assert "never calls it" in find_reason(report, "other")


def test_a_layer_that_has_two_names():
    """Called once, it may have as many as it likes."""
    model = Pair()
    model.again, model.norm_again = model.conv, model.norm
    check(shake(model), X, changed=1)
    assert type(anynorm.fold(model).model.norm_again) is nn.Identity


def test_tied_weights():
    model = Pair(lambda n, x: n.norm(n.conv(x)) + n.extra(x))
    model.extra = nn.Conv2d(4, 4, 3)
    model.extra.weight = model.conv.weight
    assert "conv shares a parameter" in find_reason(check(shake(model), X, changed=0), "norm")
    model.extra.weight = nn.Parameter(model.conv.weight.detach().view(4, 4, 3, 3))
    assert "conv shares a parameter" in find_reason(anynorm.fold(model), "norm")


def test_tensors_that_forward_reads_by_themselves():
    report = check(shake(Pair(lambda n, x: n.norm(n.conv(x)) * n.conv.weight.sum())), X, changed=0)
    assert "reads tensors of conv" in find_reason(report, "norm")
    report = check(shake(Pair(lambda n, x: n.norm(n.conv(x)) * n.norm.weight.sum())), X, changed=0)
    assert "reads tensors of norm" in find_reason(report, "norm")


def hook(model, name):
    model.get_submodule(name).register_forward_hook(lambda *arguments: None)


def parametrize(model, name):
    nn.utils.parametrizations.weight_norm(model.get_submodule(name))


def spectral(model, name):
    nn.utils.parametrizations.spectral_norm(model.get_submodule(name))


def replace(model, name):
    module = model.get_submodule(name)
    module.forward = module.forward


@pytest.mark.parametrize(
    ("change", "name"), [(hook, "conv"), (hook, "norm"), (parametrize, "conv"), (spectral, "conv"), (replace, "conv")]
)
def test_what_others_see_or_change(change, name):
    model = shake(Pair())
    change(model, name)
    report = anynorm.fold(model)
    assert not report.changed
    assert "hooks or a parametrization" in find_reason(report, "norm") or "replaced" in find_reason(report, "norm")


@pytest.mark.filterwarnings("ignore")
def test_weight_norm_by_hooks():
    model = shake(Pair())
    nn.utils.weight_norm(model.conv)
    assert "hooks" in find_reason(anynorm.fold(model), "norm")


def test_a_hooked_pool_would_see_another_tensor():
    model = shake(nn.Sequential(nn.Conv2d(4, 4, 3), nn.AvgPool2d(2), nn.BatchNorm2d(4)))
    hook(model, "1")
    assert "AvgPool2d 1: it has hooks" in find_reason(anynorm.fold(model), "2")


def test_a_hooked_part_is_folded_inside():
    model = shake(nn.Sequential(Pair(), nn.BatchNorm2d(4)))
    hook(model, "0")
    report = anynorm.fold(model, example=X, strict=True)
    assert [entry.name for entry in report.changed] == ["0.norm"]
    assert "Pair 0: " in find_reason(report, "1")


def test_lazy_and_scripted_modules():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4), nn.LazyBatchNorm2d()).eval()
    report = anynorm.fold(model)
    assert "does not know its size yet" in find_reason(report, "1")
    assert "does not know its size yet" in find_reason(report, "2")
    scripted = nn.Sequential(nn.Conv2d(4, 4, 3), torch.jit.script(nn.BatchNorm2d(4).eval())).eval()
    assert not anynorm.fold(scripted).changed


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("weight", math.nan, "its weight is not finite"),
        ("running_var", math.inf, "its running_var is not finite"),
        ("running_var", -0.5, "its running_var is negative (-0.5)"),
        ("running_mean", -math.inf, "its running_mean is not finite"),
    ],
)
def test_numbers_that_are_none(name, value, said):
    model = shake(Pair())
    with torch.no_grad():
        getattr(model.norm, name)[1] = value
    assert find_reason(anynorm.fold(model), "norm") == said
    model = shake(Pair())
    with torch.no_grad():
        model.conv.weight[0, 0] = math.nan
    assert "conv: its weight is not finite" in find_reason(anynorm.fold(model), "norm")


def test_weights_that_would_be_too_large():
    model = shake(Pair()).half()
    with torch.no_grad():
        model.norm.running_var.fill_(1e-7)
        model.norm.weight.fill_(1e4)
        model.norm.eps = 0.0
    assert "not be finite in torch.float16" in find_reason(anynorm.fold(model), "norm")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(dtype):
    model = shake(Pair()).to(dtype)
    wide = anynorm.fold(copy.deepcopy(model).double()).model
    report = anynorm.fold(model, example=X.to(dtype), strict=True)
    assert model.conv.weight.dtype == model.conv.bias.dtype == dtype
    assert torch.equal(model.conv.weight, wide.conv.weight.to(dtype))
    assert len(report.changed) == 1


def test_a_norm_of_another_dtype():
    model = shake(Pair()).float()
    model.conv.half()
    report = anynorm.fold(model)
    assert len(report.changed) == 1 and model.conv.weight.dtype == torch.float16
    model = shake(Pair()).float()
    model.norm.half()
    assert "conv: its weight is of torch.float32" in find_reason(anynorm.fold(model), "norm")


def test_norms_that_compute_by_their_input():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.LocalResponseNorm(2),
        anynorm.RMSNorm(6),
    )
    report = check(model.double().eval(), X, changed=0)
    reasons = {entry.name: entry.reason for entry in report.left}
    assert all("its statistics are those of its input" in reasons[name] for name in "145")
    assert all("it keeps no running averages" in reasons[name] for name in "23")
    assert {entry.name: entry.became for entry in report.left}["5"] == "torch.nn.RMSNorm"


def test_models_in_training_are_refused():
    model = shake(Pair()).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(anynorm.UserError, match=r"got norm and 1 more in training; call model.eval\(\) first"):
        anynorm.fold(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.norm.eval()
    report = anynorm.fold(model, where="norm")
    assert len(report.changed) == 1 and model.training and model.norm.training is False


class Frozen:
    statistics = True


def test_frozen_norms_are_constants_in_training_too():
    model = shake(Pair()).train()
    assert not normalizes_by_running(model.norm)
    model.norm.frozen, model.other.frozen = Frozen(), Frozen()
    assert normalizes_by_running(model.norm)
    assert [entry.name for entry in anynorm.fold(model).changed] == ["norm"]
    model.other.frozen.statistics = False
    assert not normalizes_by_running(model.other)


def test_dropout_in_training_is_none_to_pass():
    model = shake(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout(), nn.BatchNorm2d(4)))
    model[1].train()
    assert "Dropout 1: it is in training" in find_reason(anynorm.fold(model), "2")


def test_wrapped_models_are_refused():
    model = nn.DataParallel(shake(Pair()))
    with pytest.raises(anynorm.UserError, match=r"got DataParallel; call it on the model inside"):
        anynorm.fold(model)


def test_a_norm_alone():
    assert "never calls it" in find_reason(anynorm.fold(nn.BatchNorm2d(3).eval()), "")


def before(n, x):
    return n.conv(n.norm(F.relu(x)))


class Choosing(nn.Module):
    """Nothing that torch.fx can trace; its parts are."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.second, self.norm = Pair(before), nn.BatchNorm2d(4)

    def forward(self, x):
        if x.sum() > 0:
            x = self.second.conv(x)
        return self.norm(self.second(self.first(x)))


def test_parts_of_what_cannot_be_traced():
    report = check(shake(Choosing()), X, changed=1)
    assert [entry.name for entry in report.changed] == ["first.1"]
    assert "code of another module may call second.conv by itself" in find_reason(report, "second.norm")
    assert "torch.fx cannot trace it" in find_reason(report, "norm")


def test_optional_arguments():
    class Optional(Pair):
        def forward(self, x, scale=None):
            return self.norm(self.conv(x)) if scale is None else self.conv(x) * scale

    assert "takes optional arguments (scale)" in find_reason(check(shake(Optional()), X, changed=0), "norm")
