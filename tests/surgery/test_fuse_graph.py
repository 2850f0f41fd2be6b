"""`accelerate(model, fuse=True)` by a graph: every spelling of norm, sum and activation computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import anynorm
from surgery.fuse_cases import NORMS, SPELLINGS, Net, another_moves, check, draw, find_fused, find_left, shake


def augmented(n, x):
    y = n.norm(x)
    y += x.sin()
    return F.relu(y)


def later(n, x):
    y = n.norm(x)
    residual = n.other(x.cos()).sin()
    return n.act(residual + y)


SPELLINGS |= {"+=": augmented, "residual after the norm": later}


@pytest.mark.parametrize("name", SPELLINGS)
def test_graph_is_fused(name):
    model = Net(SPELLINGS[name])
    report = check(model, draw(5, 6, 4), fused=1)
    (entry,) = report.fused
    assert (entry.name, entry.became, entry.where) == ("norm", "anynorm.BatchNormAct1d", "report.model")
    assert find_left(report) == []
    assert type(model.norm) is anynorm.BatchNorm1d


@pytest.mark.parametrize("kind", NORMS)
def test_every_norm_is_fused_with_its_sum(kind):
    forward = (lambda n, x: F.gelu(n.norm(x) + n.other(x))) if kind != "RMSNorm" else SPELLINGS["gelu"]
    check(Net(forward, kind), draw(*NORMS[kind][2]), fused=1)


def test_what_moves_elsewhere_is_no_harm():
    check(Net(another_moves), draw(5, 6, 4), fused=1)


def test_one_activation_module_called_many_times_is_not_shared():
    """As in torchvision's residual blocks: it is called, not changed."""
    check(Net(lambda n, x: n.act(n.norm(n.act(n.other(x))) + x)), draw(5, 6, 4), fused=2)


class Sub(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = shake(nn.BatchNorm1d(6), 3)

    def forward(self, x):
        return F.silu(self.norm(x) + x)


def test_a_hooked_part_stays_a_call_of_its_own_and_is_named():
    calls = []
    model = Net(lambda n, x: F.relu(n.norm(n.sub(x)) + x), sub=Sub())
    model.sub.register_forward_hook(lambda *arguments: calls.append(1))
    report = anynorm.accelerate(model, fuse=True)
    assert [entry.name for entry in report.fused] == ["norm"]
    assert [(entry.name, "it has hooks" in entry.reason) for entry in find_left(report)] == [("sub", True)]
    report.model(draw(5, 6, 4))
    assert calls == [1]


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_hooks_elsewhere_go_on_working():
    """The very same callables, also those of weight norm, and parametrizations."""
    seen = []
    conv = nn.utils.weight_norm(nn.Conv1d(6, 6, 1))
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = Net(lambda n, x: F.relu(n.norm(n.linear(n.conv(x))) + x), conv=conv, linear=linear)
    conv(draw(5, 6, 4))  # its weight is now the result of a computation, which deepcopy refuses
    conv.register_forward_hook(lambda module, arguments, y: seen.append(y))
    model_before = copy_by_state(model)
    report = anynorm.accelerate(model, fuse=True)
    assert len(report.fused) == 1
    x = draw(5, 6, 4)
    torch.testing.assert_close(report.model(x), model_before(x), rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


class Watched(nn.Linear):
    """Its hook is a method of its own, as that of lazy modules."""

    def __init__(self):
        super().__init__(4, 4)
        self.register_forward_hook(self.see)

    def see(self, module, arguments, y):
        assert module is self
        return y * 2


def test_hooks_are_not_copied_unless_they_are_methods_of_the_model():
    class Watcher:
        seen = 0

        def see(self, module, arguments, y):
            self.seen += 1

    watcher, model = Watcher(), Net(lambda n, x: F.relu(n.norm(n.part(x)) + x), part=Watched())
    model.part.register_forward_hook(watcher.see)
    before = model(draw(5, 6, 4))
    torch.testing.assert_close(anynorm.accelerate(model, fuse=True).model(draw(5, 6, 4)), before, rtol=1e-5, atol=1e-5)
    assert watcher.seen == 2


class Block(nn.Module):
    """A residual block in torchvision's manner: one activation module, in place, called twice."""

    def __init__(self, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        shortcut = nn.Sequential(nn.Conv2d(channels, 6, 1, stride, bias=False), nn.BatchNorm2d(6))
        self.downsample = None if stride == 1 else shortcut

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def test_residual_blocks_of_torchvision():
    model = shake(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), Block(6, 2), Block(6, 1)))
    report = check(model, draw(2, 3, 9, 9), fused=5, inside=1)
    assert [(entry.name, entry.then) for entry in report.fused] == [
        ("1", "relu"), ("3.bn1", "relu"), ("3.bn2", "add, relu"), ("4.bn1", "relu"), ("4.bn2", "add, relu"),
    ]  # fmt: skip
    assert find_left(report) == []


def copy_by_state(model: Net) -> Net:
    conv = nn.utils.weight_norm(nn.Conv1d(6, 6, 1))
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    twin = Net(model.call, conv=conv, linear=linear)
    twin.load_state_dict(model.state_dict())
    return twin


ODD = {
    "broadcasts": lambda n, x: x.mean(-1, keepdim=True),
    "is a buffer": lambda n, x: n.offset[:, None],
    "is larger": lambda n, x: torch.stack([x, x]),
    "is narrower": lambda n, x: x.float(),
    "is a number": lambda n, x: x.shape[0],
    "is a scalar parameter": lambda n, x: n.scale,
}


@pytest.mark.parametrize("name", ODD)
def test_a_sum_that_broadcasts_or_promotes_computes_the_same(name):
    """What shape and dtype it has is not known when the model is fused."""
    residual = ODD[name]
    check(Net(lambda n, x: F.relu(n.norm(x) + residual(n, x))), draw(5, 6, 4), fused=1)


def add_in_place(n, x):
    y = n.norm(x)
    y += x.double()
    return F.relu(y)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_wider_residual_promotes_a_new_sum_and_no_sum_in_place(in_place):
    model = Net(add_in_place if in_place else lambda n, x: F.relu(n.norm(x) + x.double()))
    x, before = draw(5, 6, 4), copy.deepcopy(model)
    new = anynorm.accelerate(model, fuse=True).model
    assert list(find_fused(new)) == ["norm"]
    assert new(x).dtype == before(x).dtype == (torch.float32 if in_place else torch.float64)
    torch.testing.assert_close(new(x), before(x), rtol=1e-5, atol=1e-5)


def test_under_autocast():
    model = Net(lambda n, x: F.relu(n.norm(n.linear(x)) + x), linear=nn.Linear(4, 4))
    before = copy.deepcopy(model)
    fast = anynorm.accelerate(model, fuse=True).model
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fast(draw(5, 6, 4)), before(draw(5, 6, 4))
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
