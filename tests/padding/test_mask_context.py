"""`anynorm.masked` without a model: which mask each norm inside takes, in which thread, under which compiler."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import anynorm
from anynorm import functional


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        anynorm.BatchNorm1d(3), nn.Conv1d(3, 4, 3, stride=2, padding=1), anynorm.InstanceNorm1d(4), nn.ReLU()
    )


MASK = anynorm.mask_of([8, 4], 8)
SHORT = anynorm.shorten(MASK, 3, 2, 1)


def test_the_context_serves_the_norms_inside():
    net, x = build(), torch.randn(2, 3, 8)
    with anynorm.masked(MASK, SHORT):
        y = net(x)
    by_hand = build()
    z = by_hand[3](by_hand[2](by_hand[1](by_hand[0](x, mask=MASK)), mask=SHORT))
    assert torch.equal(y, z)
    assert not torch.equal(net(x), y)


def test_a_shortened_mask_is_that_of_the_sample_alone():
    for kernel_size, stride, padding, dilation in [
        (3, 1, 1, 1),
        (3, 2, 1, 1),
        (5, 3, 2, 1),
        (3, 2, 2, 2),
        (4, 4, 0, 1),
    ]:
        conv = nn.Conv1d(1, 1, kernel_size, stride, padding, dilation)
        found = anynorm.shorten(anynorm.mask_of(range(9, 21), 24), kernel_size, stride, padding, dilation)
        assert found.shape[1] == conv(torch.zeros(1, 1, 24)).shape[2]
        assert found.sum(1).tolist() == [conv(torch.zeros(1, 1, size)).shape[2] for size in range(9, 21)]


def test_a_mask_that_fits_no_layer():
    with anynorm.masked(MASK), pytest.raises(ValueError, match=r"InstanceNorm1d.*\(2, 4, 4\).*\(2, 4\); got \(2, 8\)"):
        build()(torch.randn(2, 3, 8))


@pytest.mark.filterwarnings("ignore:masked. no layer inside took a mask")
def test_behind_the_pooling_of_positions_no_mask_is_needed():
    with anynorm.masked(MASK):
        assert anynorm.BatchNorm1d(3)(torch.randn(2, 3)).shape == (2, 3)


@pytest.mark.filterwarnings("ignore:masked. no layer inside took a mask")
def test_the_context_is_the_threads_own():
    norm, x, found = anynorm.BatchNorm1d(3), torch.randn(2, 3, 8), []
    with anynorm.masked(MASK):
        thread = threading.Thread(target=lambda: found.append(norm(x)))
        thread.start()
        thread.join()
    assert bool((found[0][1, :, 4:] != 0).all())


def test_the_context_is_the_tasks_own():
    norm, x, found = anynorm.BatchNorm1d(3), torch.randn(2, 3, 8), {}

    async def inside(opened: asyncio.Event, done: asyncio.Event) -> None:
        with anynorm.masked(MASK):
            opened.set()
            await done.wait()
            found["inside"] = norm(x)

    async def outside(opened: asyncio.Event, done: asyncio.Event) -> None:
        await opened.wait()
        found["outside"] = norm(x)
        done.set()

    async def both() -> None:
        opened, done = asyncio.Event(), asyncio.Event()
        await asyncio.gather(inside(opened, done), outside(opened, done))

    asyncio.run(both())
    assert bool((found["inside"][1, :, 4:] == 0).all())
    assert bool((found["outside"][1, :, 4:] != 0).all())


def test_the_context_under_compile():
    """The graph breaks at the norm, and the mask is there; without a context a whole graph is made."""
    torch._dynamo.reset()
    net, x = build(), torch.randn(2, 3, 8)
    whole, broken = (torch.compile(net, backend="aot_eager", fullgraph=full) for full in (True, False))
    whole(x)
    with anynorm.masked(MASK, SHORT):
        torch.testing.assert_close(broken(x), net(x), atol=1e-6, rtol=1e-6)
    torch._dynamo.reset()
    torch.testing.assert_close(whole(x), net(x), atol=1e-6, rtol=1e-6)


def test_a_mask_under_vmap():
    x = torch.randn(4, 2, 3, 8)
    y = torch.func.vmap(lambda x: functional.instance_norm(x, mask=MASK))(x)
    for got, one in zip(y, x, strict=True):
        torch.testing.assert_close(got, functional.instance_norm(one, mask=MASK), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_does_not_forget_the_mask(use_reentrant):
    net, x = build(), torch.randn(2, 3, 8, requires_grad=True)
    with anynorm.masked(MASK, SHORT):
        y = checkpoint(net, x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match=r"computes this norm again outside the anynorm\.masked context"):
        y.sum().backward()
    with anynorm.masked(MASK, SHORT):
        checkpoint(net, x, use_reentrant=use_reentrant).sum().backward()
        (true,) = torch.autograd.grad(net(x).sum(), x)
    torch.testing.assert_close(x.grad, true)


@pytest.mark.filterwarnings("ignore:masked. no layer inside took a mask")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_context_that_forward_had_not(use_reentrant):
    y = checkpoint(build(), torch.randn(2, 3, 8, requires_grad=True), use_reentrant=use_reentrant)
    with anynorm.masked(MASK, SHORT), pytest.raises(RuntimeError, match="inside one that forward had not"):
        y.sum().backward()


def test_masks_may_not_be_left_out():
    with pytest.raises(TypeError, match="one or more masks are needed"):
        anynorm.masked()
