"""First and second derivatives in float64, by finite differences, in reverse and in forward mode."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import anynorm
from specimens import SPECIMENS, TRACKING

F = anynorm.functional
MEAN = torch.tensor([0.5, -1.0, 2.0, 3.0], dtype=torch.float64)
SMALL = {
    "batch": lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
    "running": lambda x, w, b: F.batch_norm(x, MEAN, MEAN.square() + 1, w, b),
    "instance": lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
    "group": lambda x, w, b: F.group_norm(x, 2, w, b),
    "layer": lambda x, w, b: F.layer_norm(
        x, x.shape[1:], w[:, None].expand(x.shape[1:]), b[:, None].expand(x.shape[1:])
    ),
    "rms": lambda x, w, b: F.rms_norm(x, x.shape[1:], w[:, None].expand(x.shape[1:])) + 0 * b.sum(),
}


def draw(layout: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) + 2
    if layout == "transposed":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    w, b = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(2))
    return tuple(t.requires_grad_() for t in (x, w, b))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("name", SMALL)
def test_gradcheck(name, layout):
    assert gradcheck(SMALL[name], draw(layout), check_forward_ad=True, check_batched_grad=False)


@pytest.mark.parametrize("name", SMALL)
def test_gradgradcheck(name):
    assert gradgradcheck(SMALL[name], draw("contiguous"))


@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
def test_second_derivative_equals_that_of_torch(specimen):
    results = []
    for library in (anynorm, torch.nn):
        module = specimen.make(library, dtype=torch.float64)
        x = specimen.draw(dtype=torch.float64).requires_grad_()
        (dx,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.pow(2).sum(), [x, module.weight]))
    for mine, its in zip(*results, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-6 * float(its.abs().max()))


@pytest.mark.parametrize("specimen", TRACKING, ids=str)
def test_two_forwards_before_a_backward(specimen):
    """Nothing saved for backward is a buffer that the second forward changes (pytorch#175024)."""
    module = specimen.make(track_running_stats=True)
    for training in (True, False):
        module.train(training)
        x = specimen.draw().requires_grad_()
        first = module(x).square().sum()
        (alone,) = torch.autograd.grad(first, x, retain_graph=True)
        module(x)
        with torch.no_grad():
            module.running_mean.add_(1)
            module.running_var.mul_(2)
        assert torch.equal(torch.autograd.grad(first, x)[0], alone)


def test_gamma_that_depends_on_the_input():
    """With create_graph and with batched gradients too, the path through gamma counts once, and hooks run once."""
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    calls = []
    x.register_hook(lambda g: calls.append(1))
    gamma = x.pow(2).mean((0, 2))
    loss = F.batch_norm(x, None, None, gamma, None, True).pow(3).sum()
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    (graph,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(graph, plain, rtol=1e-12, atol=1e-12)
    (batched,) = torch.autograd.grad(loss, x, torch.ones(2, dtype=torch.float64), is_grads_batched=True)
    torch.testing.assert_close(batched[1], plain, rtol=1e-12, atol=1e-12)
    assert len(calls) == 3


def test_beta_may_change_before_backward():
    """As in torch, whose batch norm does not keep it."""
    norm = anynorm.BatchNorm1d(3)
    y = norm(torch.randn(4, 3))
    with torch.no_grad():
        norm.bias.add_(1)
    y.square().sum().backward()
    assert torch.isfinite(norm.bias.grad).all()


def test_saved_input_changed_in_place_is_noticed():
    x = torch.randn(4, 3, requires_grad=True)
    doubled = x * 1
    y = anynorm.BatchNorm1d(3)(doubled)
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
