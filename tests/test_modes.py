"""Dispatch modes that watch, as FlopCounterMode: one operation for a norm, and torch's count."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import anynorm
from anynorm.engine import kernels
from specimens import Operations


@pytest.mark.parametrize("make", [lambda: anynorm.BatchNorm2d(4), lambda: anynorm.GroupNorm(2, 4)])
def test_a_norm_is_one_operation_with_the_same_numbers(make):
    norm = make()
    twin = copy.deepcopy(norm)
    x = torch.randn(3, 4, 5, 5)
    found = []
    for module, mode in ((twin, None), (norm, Operations())):
        leaf = x.clone().requires_grad_()
        if mode is None:
            y = module(leaf)
        else:
            with mode:
                y = module(leaf)
            assert kernels.OFF or mode.seen.count("anynorm.forward.default") == 1
            assert not any("rsqrt" in name for name in mode.seen) or kernels.OFF
        first = torch.autograd.grad(y.pow(3).sum(), [leaf, *module.parameters()], create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), leaf)
        found.append([y, *first, *second, *module.buffers()])
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


def test_flops_are_counted_as_torchs():
    counts = []
    for library in (nn, anynorm):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), library.BatchNorm2d(4), nn.ReLU(), library.GroupNorm(2, 4))
        with FlopCounterMode(display=False) as counter:
            net(torch.randn(2, 3, 8, 8)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_layout_without_a_walk_has_gradients(activation):
    """A channels_last map normalized over its last axis: autograd.grad raised inside the operation."""
    torch.manual_seed(0)
    norm = anynorm.LayerNormAct(4, activation=activation) if activation else anynorm.LayerNorm(4)
    x = torch.randn(2, 3, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    leaves = [x, *norm.parameters()]
    plain = torch.autograd.grad(norm(x).pow(3).sum(), leaves)
    with Operations():
        watched = torch.autograd.grad(norm(x).pow(3).sum(), leaves)
    for mine, its in zip(watched, plain, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
