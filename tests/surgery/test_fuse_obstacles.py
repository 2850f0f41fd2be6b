"""`accelerate(model, fuse=True)` by a graph: chains that are left, each with its reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import anynorm
from surgery.fuse_cases import ONLY, SHARED, SHARED_NORM, SPELLINGS, Net, check, draw, find_left, hook


def twice(n, x):
    return F.relu(n.norm(F.relu(n.norm(x) + x)))


def sum_seen(n, x):
    total = n.norm(x) + x
    return F.relu(total) * total


def output_seen(n, x):
    y = n.norm(x)
    return F.relu(y + x) * y


def ignored_result(n, x):
    y = n.norm(x)
    F.relu_(y)
    return y


def into_another(n, x):
    z = x.sin()
    total = z
    total += n.norm(x)
    return F.relu(total) * z


def input_moves(n, x):
    x = x.sin()
    y = n.norm(x)
    x.mul_(2)
    return F.relu(y + x)


def residual_moves(n, x):
    """A sum does not keep what it adds; torch allows this."""
    residual = x.sin()
    total = n.norm(x) + residual
    residual.mul_(2)
    return F.relu(total) * 2


def view_of_residual_moves(n, x):
    residual = x.sin()
    view = residual.flatten(1)
    total = n.norm(x) + residual
    F.relu(view, inplace=True)
    return F.relu(total) * 2


def base_of_residual_moves(n, x):
    base = x.sin()
    total = n.norm(x) + base.view(x.shape)
    base.mul_(2)
    return F.relu(total) * 2


STAY = {
    "the norm is called twice": (twice, "the norm or its tensors are used 2 times"),
    "its weight is read": (lambda n, x: F.relu(n.norm(x) + x) * n.norm.weight[0], "used 2 times"),
    "the sum is seen": (sum_seen, "the sum is used elsewhere too"),
    "the output is seen": (output_seen, "the norm's output is used elsewhere too"),
    "the activation's result is ignored": (ignored_result, "the norm's output is used elsewhere too"),
    "the sum goes into another tensor": (into_another, "the sum is written into a tensor that others may see"),
    "the residual moves afterwards": (residual_moves, "mul_ may change the residual after the sum"),
    "a view of it moves": (view_of_residual_moves, "relu may change the residual after the sum"),
    "its base moves": (base_of_residual_moves, "mul_ may change the residual after the sum"),
    "a number is added": (lambda n, x: F.relu(n.norm(x) + 1), "what is added is no other tensor"),
    "added to itself": (lambda n, x: F.relu((y := n.norm(x)) + y), "what is added is no other tensor"),
    "a multiple is added": (lambda n, x: F.relu(torch.add(n.norm(x), x, alpha=2)), "the sum has further arguments"),
    "elu of a scaled input": (lambda n, x: torch._C._nn.elu(n.norm(x) + x, 1.0, 2.0), "it has further arguments"),
    "hardtanh": (lambda n, x: F.hardtanh(n.norm(x) + x), f"not fused with hardtanh: {ONLY}"),
    "softplus": (lambda n, x: F.softplus(n.norm(x)), f"not fused with softplus: {ONLY}"),
}


@pytest.mark.parametrize("name", STAY)
def test_what_is_left_in_graphs_and_why(name):
    forward, reason = STAY[name]
    report = check(Net(forward), draw(5, 6, 4), fused=0)
    (entry,) = find_left(report)
    assert entry.name == "norm"
    assert reason in entry.reason


def test_a_result_that_is_written_elsewhere():
    """Without gradients, which `out` cannot have."""
    model = Net(lambda n, x: (y := torch.empty_like(x), torch.tanh(n.norm(x), out=y), y)[2])
    (entry,) = find_left(anynorm.accelerate(model.eval().requires_grad_(False), fuse=True))
    assert "it has further arguments" in entry.reason


def input_moves_later(n, x):
    x = x * 1
    total = n.norm(x) + x * 2
    x.mul_(2)
    return F.relu(total)


@pytest.mark.parametrize("forward", [input_moves, input_moves_later])
def test_an_input_that_moves(forward):
    """Without gradients, which such a model cannot have: before the sum it is left, afterwards it is no harm."""
    model = Net(forward).double().eval().requires_grad_(False)
    x = draw(5, 6, 4).double()
    before = model(x)
    report = anynorm.accelerate(model, fuse=True)
    reasons = [entry.reason for entry in find_left(report)]
    assert (
        reasons == []
        if forward is input_moves_later
        else "mul_ may change the norm's input before the sum" in reasons[0]
    )
    assert len(report.fused) == (forward is input_moves_later)
    torch.testing.assert_close(report.model(x), before, rtol=1e-9, atol=1e-9)


def test_hooked_and_shared_members_of_a_chain_are_left():
    for changes, reason in (
        ({"norm": hook(nn.BatchNorm1d(6), "forward_hook")}, "norm has hooks"),
        ({"act": hook(nn.ReLU(), "full_backward_hook")}, "act has hooks"),
        ({"act": SHARED, "second": SHARED}, "act is shared, it has 2 places"),
        ({"norm": SHARED_NORM, "second": SHARED_NORM}, "norm is shared, it has 2 places"),
    ):
        report = check(Net(SPELLINGS["module"], **changes), draw(5, 6, 4), fused=0)
        assert [reason in entry.reason for entry in find_left(report)] == [True]


class MaskedNorm(nn.Module):
    """A norm of this library's that is given a mask, a sum and an activation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = anynorm.BatchNorm1d(4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(x, mask=mask) + x)


def test_a_norm_that_takes_a_mask_is_left():
    report = anynorm.accelerate(MaskedNorm(), fuse=True)
    assert "the norm takes more than its input" in report.left[0].reason
