"""`anynorm.accumulate` with buffers, checkpoints, autocast, compiled code, other models and ranks around it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import anynorm
from accumulate_tasks import (
    EXACT,
    MODES,
    SIZES,
    accumulate_and_compare,
    assert_near,
    assert_same_state,
    cut,
    draw,
    find_loss,
    find_state,
    make_blocks,
    make_chain,
    on_ranks,
)
from gloo import Processes


def test_other_buffers_move_once():
    """Equals the large batch: instance norm's averages, and spectral norm's vectors, which move at every forward."""
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 1))
    model = nn.Sequential(
        spectral, anynorm.InstanceNorm2d(4, track_running_stats=True), anynorm.BatchNorm2d(4), nn.Flatten()
    )
    large = copy.deepcopy(model.double())
    large(draw(13)[0]).square().mean().backward()
    anynorm.accumulate(
        model, [(x,) for x in draw(13)[0].split(SIZES)], lambda model, batch: model(*batch).square().mean()
    )
    for name, wanted in find_state(large).items():
        assert_near(find_state(model)[name].double(), wanted.double(), 1e-9, 1.0)


def test_update_once_counts_one_batch():
    model = make_chain(2)
    with anynorm.update_once():
        for _ in range(2):
            anynorm.accumulate(model, cut(draw(13), SIZES), find_loss)
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("mode", ["sweep", "estimate"])
def test_checkpoints_equal_plain_forwards(mode):
    """Activation checkpointing computes norms again in backward, with what is known of them."""
    model, twin = make_chain(3), make_chain(3)

    def loss(model, batch):
        y = checkpoint(model[:6], batch[0], use_reentrant=False)
        return F.cross_entropy(model[6:](y), batch[1])

    anynorm.accumulate(model, cut(draw(13), SIZES), loss, mode=mode)
    anynorm.accumulate(twin, cut(draw(13), SIZES), find_loss, mode=mode)
    assert_same_state(find_state(model), find_state(twin), 1e-9)


def test_autocast_reaches_the_threads():
    seen = []

    def loss(model, x):
        seen.append(model[0](x).dtype)
        return model(x).float().square().mean()

    model = nn.Sequential(nn.Conv2d(3, 4, 1), anynorm.BatchNorm2d(4))
    with torch.autocast("cpu", torch.bfloat16):
        anynorm.accumulate(model, torch.randn(4, 3, 5, 5).split(2), loss, mode="lockstep")
    assert seen == [torch.bfloat16] * 2


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("way", ["model", "in place", "forward", "part", "loss", "step"])
def test_compiled_code_equals_the_large_batch(way, mode):
    """It runs without its compiler meanwhile, whatever was compiled."""
    inside, large = make_chain(2), make_chain(2)
    find_loss(large, draw(13))[0].backward()
    model, loss, step = inside, find_loss, anynorm.accumulate
    if way == "model":
        model = torch.compile(inside, backend="eager")
    if way == "in place":
        inside.compile(backend="eager")
    if way == "forward":
        inside.forward = torch.compile(inside.forward, backend="eager")
    if way == "part":
        inside[1].forward = torch.compile(inside[1].forward, backend="eager")
    if way == "loss":
        loss = torch.compile(find_loss, backend="eager")
    if way == "step":
        step = torch.compile(lambda *given, mode: anynorm.accumulate(*given, mode=mode), backend="eager")
    step(model, cut(draw(13), SIZES), loss, mode=mode)
    assert_same_state(find_state(inside), find_state(large), 1e-9)


class Moving(nn.Module):
    """Forward puts new tensors in the place of buffers: a float, a whole number, one that grows, a new one."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([anynorm.BatchNorm2d(3), anynorm.BatchNorm2d(3)])
        self.register_buffer("share", torch.ones(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        self.share, self.steps = self.share * 0.5, self.steps + 1
        self.seen, self.last = torch.cat([self.seen, torch.ones(1)]), torch.ones(2)
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(3))
        return self.norms[1](self.norms[0](x) * self.share)


@pytest.mark.parametrize("mode", ["sweep", "estimate"])
def test_replaced_buffers_move_once(mode):
    """Equals the large batch; whoever holds a buffer still does."""
    model, large = Moving(), Moving()
    large(draw(8)[0].float()).square().mean().backward()
    held = model.share
    anynorm.accumulate(model, draw(8)[0].float().split(2), lambda model, x: model(x).square().mean(), mode=mode)
    assert model.share is held
    assert list(model.state_dict()) == list(large.state_dict())
    for name in ("share", "steps", "seen", "last", "late"):
        assert torch.equal(getattr(model, name), getattr(large, name)), name


@pytest.mark.parametrize("mode", MODES)
def test_replaced_buffers_are_as_before_after_an_error(mode):
    def fail(model, x):
        model(x)
        raise KeyError("the user's own")

    model = Moving()
    before, held = copy.deepcopy(model.state_dict()), model.steps
    with pytest.raises(KeyError):
        anynorm.accumulate(model, draw(8)[0].float().split(2), fail, mode=mode)
    assert model.steps is held
    assert model.last is None
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("mode", EXACT)
def test_two_models_equal_the_large_batch(mode):
    """What a norm outside the model is told to do."""
    model = nn.ModuleList([nn.Conv2d(3, 6, 1), anynorm.BatchNorm2d(6)]).double()

    def loss(both, batch):
        y = both[1](both[0](batch[0]))
        return y.pow(3).mean(), y

    accumulate_and_compare(model, SIZES, draw(13), loss, mode)


@pytest.fixture(scope="module")
def ranks():
    processes = Processes(2)
    yield processes
    processes.close()


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("sizes", [[[3, 4], [2, 2]], [[4, 1, 3], [5]]], ids=str)
def test_ranks_equal_the_large_batch(ranks, sizes, mode):
    """Micro-batches of two ranks, uneven in size and number; gradients are summed over ranks."""
    large = make_blocks()
    batch = draw(sum(map(sum, sizes)))
    loss, outputs = find_loss(large, batch)
    loss.backward()
    found = ranks.run(on_ranks, mode, sizes)
    assert_near(sum(one["loss"] for one in found), loss, 1e-9)
    assert_near(torch.cat([one["outputs"] for one in found]), outputs, 1e-9)
    for one in found:
        for name, wanted in find_state(large).items():
            got = sum(other["state"][name] for other in found) if name.startswith("grad") else one["state"][name]
            assert_near(got, wanted, 1e-9, 1.0)


def test_ranks_estimate_alike(ranks):
    """Keeps an invariant: running averages of both ranks have the same bits, and are near the large batch's."""
    sizes = [[3, 4], [2, 5, 2]]
    large = make_blocks()
    find_loss(large, draw(16))[0].backward()
    found = [one["state"] for one in ranks.run(on_ranks, "estimate", sizes)]
    for name, buffer in large.named_buffers():
        assert torch.equal(found[0][name], found[1][name])
        assert_near(found[0][name].double(), buffer.double(), 0.05)
