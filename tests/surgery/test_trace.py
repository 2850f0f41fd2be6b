"""Models that a graph would change are not traced, and operators in place keep their meaning in a graph."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import anynorm
from surgery.fuse_cases import SPELLINGS, Net, branch, check, draw, find_left, hook, patch


def drop(n, x):
    return F.dropout(F.relu(n.norm(x) + x), 0.5, n.training)


def frozen(n, x):
    with torch.no_grad():
        y = F.relu(n.norm(x) + x)
    return y + x


def constant(n, x):
    return F.relu(n.norm(x) + x) * torch.ones(4)


def noise(n, x):
    return F.relu(n.norm(x) + x) * random.random()


def numpy_noise(n, x):
    return F.relu(n.norm(x) + x) * float(np.random.rand())  # noqa: NPY002


def torch_noise(n, x):
    return F.relu(n.norm(x) + x) * torch.rand(1).item()


def remember(n, x):
    n.last = F.relu(n.norm(x) + x)
    return n.last


def collect(n, x):
    n.seen.append(x)
    return F.relu(n.norm(x) + x)


def count(n, x):
    n.calls += 1
    return F.relu(n.norm(x) + x) * n.calls


def recompute(n, x):
    return checkpoint(lambda x: F.relu(n.norm(x) + x), x, use_reentrant=False)


class Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


def turn(n, x):
    return F.relu(n.norm(Turn.apply(x)) + x)


def steer(n, x):
    return F.relu(n.norm(x) + x) if x.sum() > 0 else n.other(x)


def narrow(n, x):
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        return F.relu(n.norm(x) + x)


def narrowed(n, x):
    with torch.autocast("cpu", torch.bfloat16):
        return F.relu(n.norm(x) + x)


def enabled(n, x):
    with torch.enable_grad():
        return F.relu(n.norm(x) + x)


def plain_tensor(n, x):
    return F.relu(n.norm(x) + x) + n.plain


LOST = {
    "dropout by a flag": (drop, "differs between training and evaluation"),
    "a branch on the mode": (branch, "differs between training and evaluation"),
    "no_grad": (frozen, "part of its forward runs under torch.no_grad"),
    "a constant tensor": (constant, "tensors that are neither parameters nor buffers"),
    "a tensor as an attribute": (plain_tensor, "tensors that are neither parameters nor buffers"),
    "random": (noise, "draws random numbers"),
    "numpy.random": (numpy_noise, "draws random numbers"),
    "torch.rand": (torch_noise, "draws random numbers"),
    "an attribute": (remember, "changes attributes of the model"),
    "a list": (collect, "changes attributes of the model"),
    "a counter": (count, "changes attributes of the model"),
    "a checkpoint": (recompute, "under torch.no_grad, autocast, a checkpoint"),
    "an autograd function": (turn, "or an autograd function, which a graph would lose"),
    "a branch on values": (steer, "torch.fx cannot trace it"),
    "autocast off": (narrow, "part of its forward runs under torch.no_grad, autocast"),
    "autocast on": (narrowed, "part of its forward runs under torch.no_grad, autocast"),
    "enable_grad": (enabled, "part of its forward runs under torch.no_grad, autocast"),
}


@pytest.mark.parametrize("name", LOST)
def test_models_that_a_graph_would_change_stay(name):
    forward, reason = LOST[name]
    model = Net(forward)
    model.calls, model.seen, model.plain = 0, [], torch.ones(4)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    report = anynorm.accelerate(model, fuse=True)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert report.model is model
    assert report.fused == []
    (entry,) = find_left(report)
    assert (entry.name, entry.kind) == ("", f"{Net.__module__}.Net")
    assert reason in entry.reason
    assert "left the model" in str(report)
    assert (model.calls, model.seen, hasattr(model, "last")) == (0, [], False)


def test_the_chain_of_these_models_would_be_fused_otherwise():
    """So that the reasons above are reasons."""
    check(Net(lambda n, x: F.relu(n.norm(x) + x) * 0.5), draw(5, 6, 4), fused=1)


class Optional(Net):
    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask)


class Several(Net):
    def forward(self, *inputs):
        return super().forward(inputs[0])


class Frozen(Net):
    def train(self, mode=True):
        self.calls = getattr(self, "calls", 0) + 1
        return super().train(False)


def test_a_train_method_of_its_own_is_kept_and_not_called():
    model = Frozen(SPELLINGS["operator"])
    report = anynorm.accelerate(model, fuse=True)
    assert report.fused
    assert not hasattr(model, "calls")
    assert not report.model.train().training
    assert report.model.calls == 1


def test_models_whose_class_does_more_than_forward_stay():
    call = SPELLINGS["operator"]
    hooked = hook(Net(call), "forward_hook")
    for model, reason in (
        (Net(call, lazy=nn.LazyLinear(4)), "it has lazy modules that do not know their size yet"),
        (Optional(call), "takes optional arguments (mask)"),
        (Several(call), "takes optional arguments (inputs)"),
        (hooked, "it has hooks or a replaced forward"),
        (patch(Net(call)), "it has hooks or a replaced forward"),
    ):
        report = anynorm.accelerate(model, fuse=True)
        assert (report.model, report.fused) == (model, [])
        assert reason in find_left(report)[0].reason


def bump(n, x):
    """`+=` on a tensor with a second name, and on a number."""
    y = x.sin()
    alias = y
    y += 1
    rows = x.shape[0]
    more = rows
    more += 1
    return F.relu(n.norm(x) + x) * alias * rows / more


def test_in_place_operators_keep_their_meaning():
    """torch.fx alone makes them new tensors."""
    model = Net(bump)
    check(model, draw(5, 6, 4), fused=1)
    x = draw(5, 6, 4).double()
    assert not torch.allclose(torch.fx.symbolic_trace(model)(x), model(x))
    new = anynorm.accelerate(model, fuse=True).model
    del new.call  # a function of this file, which pickle may not find
    assert torch.equal(pickle.loads(pickle.dumps(new))(x), new(x))
