"""`fold` takes norms of torch, ours, fused ones and those of other packages; and what operations share."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import anynorm
from anynorm.surgery import adapters
from surgery.fold_cases import check, draw, find_reason, shake

X = draw(2, 4, 9, 8)
OURS = ("BatchNorm2d", "SyncBatchNorm", "GhostBatchNorm2d", "BatchRenorm2d")


@pytest.mark.parametrize("name", OURS)
def test_ours(name):
    options = {"ghost_size": 2} if name.startswith("Ghost") else {}
    check(shake(nn.Sequential(nn.Conv2d(4, 6, 3), getattr(anynorm, name)(6, **options))), X, changed=1)


@pytest.mark.parametrize("library", [nn, anynorm])
def test_instance_norms_with_running_averages(library):
    norm = library.InstanceNorm2d(6, affine=True, track_running_stats=True)
    model = shake(nn.Sequential(nn.Conv2d(4, 6, 3), norm))
    check(model, X, changed=1)
    check(model, X[0], changed=1)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu(0.2)", "silu", "identity"])
def test_fused_ones_leave_their_activation(activation):
    """pytorch#187298: a tool that dropped it took F1 from 0.82 to 0."""
    fused = anynorm.BatchNormAct2d(6, activation=activation)
    model = shake(nn.Sequential(nn.Conv2d(4, 6, 3), fused, nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3)))
    check(model, X, changed=2)
    kind = {"relu": nn.ReLU, "leaky_relu(0.2)": nn.LeakyReLU, "silu": nn.SiLU, "identity": nn.Identity}[activation]
    assert type(anynorm.fold(model).model[1]) is kind
    report = anynorm.fold(shake(nn.Sequential(fused, nn.Conv2d(6, 2, 3))), example=draw(2, 6, 5, 5), strict=True)
    if activation != "identity":
        assert f"it applies {kind.__name__} itself" in find_reason(report, "0")
        assert "still holds classes of anynorm: 0" in report.note


def test_what_accelerate_fused_in_place():
    model = shake(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6), nn.ReLU()))
    with torch.no_grad():
        before = model(X)
    anynorm.accelerate(model, fuse=True)
    report = anynorm.fold(model, example=X, strict=True)
    assert [type(module) for module in model] == [nn.Conv2d, nn.ReLU, nn.Identity, nn.BatchNorm2d, nn.ReLU]
    (left,) = report.left
    assert (left.name, left.kind, left.became) == ("3", "anynorm.BatchNormAct2d", "torch.nn.BatchNorm2d")
    assert not vars(model[2]).keys() - vars(nn.Identity()).keys()
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-12 * float(before.abs().max()))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.two, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.last(self.two(F.relu(self.norm(self.one(x))))) + x)


def test_what_accelerate_fused_by_a_graph():
    """The given model shares its parameters with the fused one, which goes on computing what it did."""
    model = shake(Block())
    with torch.no_grad():
        before = model(X)
    fused = anynorm.accelerate(model, fuse=True).model
    assert fused is not model
    check(model, X, changed=2)
    anynorm.fold(model)
    torch.testing.assert_close(fused(X), before, rtol=0, atol=1e-12 * float(before.abs().max()))
    report = anynorm.fold(fused, example=X, strict=True)
    assert [entry.name for entry in report.changed] == ["norm"]
    assert "more than its input" in find_reason(report, "last")
    assert "still holds classes of anynorm" in report.note


class ActedNorm(nn.BatchNorm2d):
    """As other packages have it: an activation of its own behind."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(super().forward(x))


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's, of buffers."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        w, b, rv, rm = (t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_var, self.running_mean))
        scale = w * (rv + self.eps).rsqrt()
        return x * scale + (b - rm * scale)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(adapters, "KNOWN", list(adapters.KNOWN))
    anynorm.register(ActedNorm, "batch", then=("act",))
    anynorm.register(FrozenBatchNorm2d, "frozen")


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("kind", [ActedNorm, FrozenBatchNorm2d])
@pytest.mark.usefixtures("registered")
def test_norms_of_other_packages(kind, accelerated):
    model = shake(nn.Sequential(nn.Conv2d(4, 6, 3), kind(6)))
    if accelerated:
        assert len(anynorm.accelerate(model).changed) == 1
    check(model, X, changed=1)
    assert type(anynorm.fold(model).model[1]) is (nn.ReLU if kind is ActedNorm else nn.Identity)


def test_a_norm_with_code_of_its_own_is_left():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    report = check(shake(nn.Sequential(nn.Conv2d(4, 6, 3), Doubled(6))), X, changed=0)
    assert find_reason(report, "1")


def test_what_is_kept():
    """Class, mode, names, dtype, memory format, what is trained; and what models compute that share the parameters."""
    model = shake(Block()).to(memory_format=torch.channels_last)
    model.one.weight.requires_grad_(False)
    model.two.bias = None
    sharing = copy.copy(model)
    sharing._modules = {name: copy.copy(module) for name, module in model._modules.items()}
    for module in sharing._modules.values():
        module._parameters = dict(module._parameters)
    untouched = model.one.weight
    with torch.no_grad():
        before = model(X)
    model(X)
    anynorm.fold(model, example=X, strict=True)
    assert type(model) is Block and not model.training
    assert model.one.weight.is_contiguous(memory_format=torch.channels_last)
    assert (model.one.weight.requires_grad, model.one.bias.requires_grad) == (False, True)
    assert model.two.bias.requires_grad and model.two.bias.dtype == torch.float64
    assert list(model._modules) == ["one", "norm", "two", "last"]
    assert model.one.weight is not untouched
    assert torch.equal(sharing(X), before)
    again = torch.load(save(model), weights_only=False)
    torch.testing.assert_close(again(X), before, rtol=0, atol=1e-12 * float(before.abs().max()))


def save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_where_and_copy():
    model = shake(Block())
    report = anynorm.fold(model, where="last", copy=True, example=X)
    assert [entry.name for entry in report.changed] == ["last"] and not report.left
    assert type(model.last) is nn.BatchNorm2d and type(report.model.last) is nn.Identity
    assert report.differences[0].is_within(None)
    with pytest.raises(anynorm.UserError, match="names no module"):
        anynorm.fold(model, where="first")


def test_an_example_that_fails_changes_nothing():
    model = shake(Block())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        anynorm.fold(model, example=draw(2, 5, 3, 3))
    with pytest.raises(anynorm.NotProved, match="the outputs on the example may move"):
        anynorm.fold(model, example=X, strict=True, tolerance=0.0)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_report_says_into_what():
    report = anynorm.fold(shake(Block()))
    assert [(entry.name, entry.became) for entry in report.changed] == [
        ("norm", "part of one"),
        ("last", "part of two"),
    ]
    assert "folded for evaluation" in report.note


def test_random_numbers_are_not_drawn():
    model = shake(nn.Sequential(nn.Conv2d(4, 6, 3), ActedNorm(6), nn.Dropout()))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    anynorm.fold(model, example=X)
    assert torch.equal(torch.rand(3), expected)
