"""Where a model cannot be traced, the largest blocks that can be get graphs of their own."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn

import anynorm


class Block(nn.Module):
    def __init__(self, channels=6):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)) + x)


class Model(nn.Module):
    """Branches on a value, which no graph can."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x, flag=None):
        for block in self.blocks:
            x = block(x)
        return x if flag is None else -x


class Outsider(Model):
    """Calls a block's norm by itself, where another activation follows."""

    def forward(self, x, flag=None):
        first, second = self.blocks
        return torch.tanh(first.bn(first.conv(x))) + second(x)


def step(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *[p.grad for p in model.parameters()], *[b.clone() for b in model.buffers()]]


def test_blocks_are_fused_and_the_numbers_stay():
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 6, 5, 5)
    theirs = copy.deepcopy(model)
    report = anynorm.accelerate(model, fuse=True)
    assert [(entry.name, entry.then) for entry in report.fused] == [(f"blocks.{i}.bn", "add, relu") for i in (0, 1)]
    assert report.left == []
    assert report.model is not model
    assert isinstance(report.model, Model)
    assert [*map(id, report.model.parameters())] == [*map(id, model.parameters())]
    for one, other in zip(step(report.model, x), step(theirs, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_norm_that_other_code_calls_by_itself_is_not_fused():
    torch.manual_seed(0)
    model, x = Outsider(), torch.randn(3, 6, 5, 5)
    theirs = copy.deepcopy(model)
    report = anynorm.accelerate(model, fuse=True)
    torch.testing.assert_close(report.model(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert report.fused == []
    assert "not fused beyond Sequentials" in report.left[0].reason
