"""`fold`: a norm behind or before a layer becomes part of it, and outputs stay."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from surgery.fold_cases import check, draw, find_reason, shake

SIZES = {1: (9,), 2: (7, 8), 3: (5, 4, 6)}
EACH_DIMENSION = pytest.mark.parametrize("dims", SIZES)


def layer(kind: str, dims: int, *arguments, **options) -> nn.Module:
    return getattr(nn, f"{kind}{dims}d")(*arguments, **options)


@EACH_DIMENSION
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("bias", [True, False])
def test_behind_a_convolution(kind, dims, groups, bias):
    """Also grouped, depthwise and transposed ones, padded in any way."""
    conv = layer(kind, dims, 4, 8, 3, groups=groups, stride=2, padding=1, bias=bias)
    check(shake(nn.Sequential(conv, layer("BatchNorm", dims, 8))), draw(2, 4, *SIZES[dims]), changed=1, example=False)


@EACH_DIMENSION
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_before_a_convolution(dims, groups, bias, mode):
    options = {"padding": 1, "padding_mode": mode} if mode != "zeros" else {}
    if (dims, mode) == (3, "reflect"):
        options = {"padding": "valid", "padding_mode": mode}
    conv = layer("Conv", dims, 4, 8, 3, groups=groups, bias=bias, **options)
    model = shake(nn.Sequential(nn.ReLU(), layer("BatchNorm", dims, 4), conv))
    check(model, draw(2, 4, *SIZES[dims]), changed=1, example=False)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(4, 8, 3, padding="same"),
        nn.ConvTranspose2d(4, 8, 2, stride=2),
        nn.ConvTranspose2d(4, 8, 3),
        nn.ConvTranspose2d(4, 8, 1, stride=2),
    ],
    ids=str,
)
def test_before_borders_of_zeros_only_a_scale_is_folded(conv):
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), conv)
    check(shake(copy.deepcopy(model), shifted=False), draw(2, 4, 7, 8), changed=1)
    report = check(shake(model), draw(2, 4, 7, 8), changed=0)
    assert "padding is zeros" in find_reason(report, "1") or "one shift different sums" in find_reason(report, "1")


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(4, 8, 1, padding="same"), nn.ConvTranspose2d(4, 8, 1, groups=2, bias=False)], ids=str
)
def test_before_a_convolution_without_borders(conv):
    check(shake(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), conv)), draw(2, 4, 7, 8), changed=1)


@pytest.mark.parametrize("rank", [2, 3])
def test_linear_layers_of_rows(rank):
    """Over (N, C) the features are the channels; over (N, C, L) they are not, even if there are as many."""
    model = shake(
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 6))
    )
    x = draw(2, 6, 6)[:, 0] if rank == 2 else draw(2, 6, 6)
    report = check(model, x, changed=2 if rank == 2 else 0)
    assert rank == 2 or "the last axis" in find_reason(report, "1")
    report = check(model, x, changed=0, example=False)
    assert "pass example=" in find_reason(report, "1")


class Turned(nn.Module):
    """Linear layers over (N, L, C), norms over (N, C, L)."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)
        self.last, self.two = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        y = F.relu(self.norm(self.one(x).transpose(1, 2)))
        return self.two(self.last(y).permute(0, 2, 1))


@pytest.mark.parametrize("example", [True, False])
def test_linear_layers_whose_axes_are_turned(example):
    check(shake(Turned()), draw(2, 7, 5), changed=2, example=example)


HEADS = {
    "Flatten": lambda n, x: n.linear(n.flatten(n.norm(F.relu(x)))),
    "flatten": lambda n, x: n.linear(torch.flatten(n.norm(F.relu(x)), 1)),
    "view": lambda n, x: n.linear((y := n.norm(F.relu(x))).view(y.size(0), -1)),
    "shape": lambda n, x: n.linear((y := n.norm(F.relu(x))).reshape(y.shape[0], -1)),
    "channels last": lambda n, x: n.linear(n.norm(F.relu(x)).permute(0, 2, 3, 1).flatten(1)),
    "sizes of the input": lambda n, x: n.linear(n.norm(F.relu(x)).view(x.size(0), -1)),
    "features": lambda n, x: n.linear(n.norm(F.relu(x)).view(-1, 12)),
}
NEED_EXAMPLE = ("sizes of the input", "features")


class Head(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.norm, self.flatten, self.linear, self.way = nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5), way

    def forward(self, x):
        return self.way(self, x)


@pytest.mark.parametrize("name", HEADS)
def test_channels_that_become_features(name):
    model = shake(Head(HEADS[name]))
    check(model, draw(2, 3, 2, 2), changed=1)
    report = check(model, draw(2, 3, 2, 2), changed=name not in NEED_EXAMPLE, example=False)
    assert name not in NEED_EXAMPLE or "pass example=" in find_reason(report, "norm")


@pytest.mark.parametrize("way", ["mean", "pool"])
def test_the_mean_over_positions(way):
    ways = {
        "mean": lambda n, x: n.linear(n.norm(F.relu(x)).mean((2, 3)).repeat(1, 1)),
        "pool": lambda n, x: n.linear(F.adaptive_avg_pool2d(n.norm(F.relu(x)), 1).flatten(1)),
    }
    if way == "mean":
        ways["mean"] = lambda n, x: n.linear(n.norm(F.relu(x)).mean((2, 3)))
    model = Head(ways[way])
    model.linear = nn.Linear(3, 5)
    check(shake(model), draw(2, 3, 2, 2), changed=1, example=False)


def test_the_mean_over_channels_is_none_of_positions():
    """Three channels of three positions each: sizes agree, and the axis is another one."""
    model = Head(lambda n, x: n.linear(n.norm(F.relu(x)).mean((1, 2))))
    model.linear = nn.Linear(3, 5)
    check(shake(model), draw(2, 3, 3, 3), changed=0)


def test_rows_of_rows():
    """As LeViT has it: the axes before the last become one, and the other use reads a shape alone."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)

        def forward(self, x):
            y = self.linear(x)
            return self.norm(y.flatten(0, 1)).reshape_as(y)

    check(shake(Rows()), draw(2, 7, 5), changed=1)


def test_features_that_become_channels():
    """As a generator begins."""
    model = shake(nn.Sequential(nn.Linear(5, 24), nn.Unflatten(1, (6, 2, 2)), nn.BatchNorm2d(6), nn.ReLU()))
    check(model, draw(2, 5), changed=1, example=False)


PASSED = {
    "Identity": (nn.Identity(), {}),
    "Dropout": (nn.Dropout(), {}),
    "MaxPool": (nn.MaxPool2d(2, padding=1), {"positive": True}),
    "AvgPool": (nn.AvgPool2d(2), {}),
    "AvgPool, ceil": (nn.AvgPool2d(2, ceil_mode=True), {}),
    "AvgPool, padding not counted": (nn.AvgPool2d(2, padding=1, count_include_pad=False), {}),
    "AvgPool, padding counted": (nn.AvgPool2d(2, padding=1), {"shifted": False}),
    "AvgPool, divisor": (nn.AvgPool2d(2, divisor_override=3), {"shifted": False}),
    "ReflectionPad": (nn.ReflectionPad2d(1), {}),
    "ReplicationPad": (nn.ReplicationPad2d(1), {}),
    "CircularPad": (nn.CircularPad2d(1), {}),
    "ZeroPad": (nn.ZeroPad2d(1), {"shifted": False}),
    "Upsample": (nn.Upsample(scale_factor=2, mode="bilinear"), {}),
    "PixelShuffle": (nn.PixelShuffle(1), {}),
}


@pytest.mark.parametrize("name", PASSED)
def test_what_lies_between(name):
    """Before the norm and behind it; where it does not commute, the norm stays."""
    between, options = PASSED[name]
    x = draw(2, 4, 7, 8)
    conv = nn.Conv2d(4, 4, 3)
    for model in (
        nn.Sequential(conv, between, nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), between, conv),
    ):
        check(shake(copy.deepcopy(model), **options), x, changed=1)
        check(shake(copy.deepcopy(model)), x, changed=0 if options else 1)


def test_each_function_of_torch_is_passed_as_its_module():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = F.dropout(F.max_pool2d(F.avg_pool2d(self.conv(x), 2), 2), training=self.training)
            return self.norm(F.interpolate(F.pad(y, (1, 1, 1, 1), mode="reflect"), scale_factor=2))

    model = shake(Between(), positive=True)
    check(model, draw(2, 4, 17, 17), changed=1, example=False)
    assert "max_pool2d: of scales below 0" in find_reason(check(shake(model), draw(2, 4, 17, 17), changed=0), "norm")


def test_chains_are_folded_until_nothing_is_left():
    norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8)]
    check(shake(nn.Sequential(nn.Conv2d(4, 8, 3), *copy.deepcopy(norms), nn.ReLU())), draw(2, 4, 7, 8), changed=3)
    check(shake(nn.Sequential(nn.ReLU(), *copy.deepcopy(norms), nn.Conv2d(8, 2, 3))), draw(2, 8, 7, 8), changed=3)
    report = check(shake(nn.Sequential(nn.ReLU(), *norms, nn.ReLU())), draw(2, 8, 7, 8), changed=2)
    assert find_reason(report, report.left[0].name).startswith("before it, ")


class Paths(nn.Module):
    def __init__(self, way, **options):
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(4, 4, 3, **options) for _ in range(3))
        self.norm, self.other, self.way = nn.BatchNorm2d(4), nn.BatchNorm2d(4), way
        self.wide = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.way(self, x)


def test_branches_sums_and_concatenations():
    x = draw(2, 4, 9, 8)
    check(shake(Paths(lambda n, x: n.norm(n.one(x) + n.two(x)))), x, changed=1)
    check(shake(Paths(lambda n, x: n.wide(torch.cat((n.one(x), n.two(x) + n.three(x)), 1)))), x, changed=1)
    check(shake(Paths(lambda n, x: n.one(y := n.norm(F.relu(x))) * n.two(y))), x, changed=1)
    used = check(shake(Paths(lambda n, x: n.norm(y := n.one(x)) + y)), x, changed=0)
    assert "the output of Conv2d one is used elsewhere too" in find_reason(used, "norm")
    some = check(shake(Paths(lambda n, x: n.one(y := n.norm(F.relu(x))) + y[:, :, 1:-1, 1:-1])), x, changed=0)
    assert "getitem: no norm passes it" in find_reason(some, "norm")
    half = check(shake(Paths(lambda n, x: n.wide(torch.cat((n.one(x), F.relu(n.two(x))), 1)))), x, changed=0)
    assert "relu: no norm passes it" in find_reason(half, "wide")


def test_an_input_that_changes_meanwhile():
    """Folded, the convolution would read it later than the norm did."""

    def moved(n, x):
        x = x + 0
        y = n.norm(x)
        x.mul_(2)
        return n.one(y) + n.two(x)

    report = check(shake(Paths(moved)), draw(2, 4, 9, 8), changed=0)
    assert "mul_ may change its input meanwhile" in find_reason(report, "norm")


@pytest.mark.parametrize("value", [True, False])
def test_a_switch_among_the_arguments(value):
    """Both ways count: here one returns what the other folds."""

    class Switch(Paths):
        def forward(self, x, early=value):
            y = self.norm(F.relu(self.other(self.one(x))))
            return y if early else self.two(y)

    report = check(shake(Switch(None)), draw(2, 4, 9, 8), changed=1)
    assert [entry.name for entry in report.changed] == ["other"]
    assert "its output is one of the model" in find_reason(report, "norm")
