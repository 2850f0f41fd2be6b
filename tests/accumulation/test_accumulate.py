"""`anynorm.accumulate`: equal to the large batch, or as near as mode "estimate" promises."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

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
)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # times the largest gradient of the model, or value of a buffer


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["BatchNorm2d", "BatchNormAct2d"])
@pytest.mark.parametrize("norms", [1, 3, 20])
def test_equals_the_large_batch(norms, kind, dtype, mode):
    model = make_chain(norms, kind, dtype)
    result = accumulate_and_compare(model, SIZES, draw(13, dtype), mode=mode, tolerance=TOLERANCE[dtype])
    assert result.calls == (norms if mode == "sweep" else None)


@pytest.mark.parametrize("mode", EXACT)
def test_equals_the_large_batch_with_reused_norms_and_branches(mode):
    accumulate_and_compare(make_blocks(), SIZES, draw(13), mode=mode)


@pytest.mark.parametrize("mode", EXACT)
def test_equals_torch(mode):
    """Of the three kinds: equals torch, on torch's own norms."""
    model = make_chain(3)
    theirs = nn.Sequential(
        *(nn.BatchNorm2d(6) if isinstance(m, anynorm.BatchNorm2d) else copy.deepcopy(m) for m in model)
    )
    theirs = theirs.double()
    theirs.load_state_dict(model.state_dict())
    found, _ = find_loss(theirs, draw(13))
    found.backward()
    anynorm.accumulate(model, cut(draw(13), SIZES), find_loss, mode=mode)
    assert_same_state(find_state(model), find_state(theirs), 1e-9)


class Sequences(nn.Module):
    """(N, 4, L) with lengths, two masked norms, one of them fused with a residual and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv1d(4, 4, 1) for _ in range(2))
        self.norm, self.act = anynorm.BatchNorm1d(4), anynorm.BatchNormAct1d(4, activation="silu")

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.norm(self.first(x), lengths=lengths)
        return self.act(self.second(x), residual=x, lengths=lengths)


def find_sequence_loss(model, batch):
    y = model(*batch)
    return y.square().sum() / len(y), y


@pytest.mark.parametrize("mode", EXACT)
def test_lengths_equal_the_large_batch(mode):
    """A micro-batch of nothing but padding among them."""
    batch = torch.randn(7, 4, 6).double(), torch.tensor([6, 2, 0, 0, 5, 1, 3])
    accumulate_and_compare(Sequences().double(), [2, 2, 3], batch, find_sequence_loss, mode)


@pytest.mark.parametrize("mode", EXACT)
def test_masked_context_equals_the_large_batch(mode):
    mask = anynorm.mask_of([6, 2, 5, 1, 3], 6)

    def loss(model, batch):
        with anynorm.masked(batch[1]):
            y = model(batch[0])
        return y.square().sum() / len(y), y

    model = nn.Sequential(anynorm.BatchNorm1d(4), nn.Conv1d(4, 4, 1), anynorm.BatchNorm1d(4)).double()
    accumulate_and_compare(model, [2, 3], (torch.randn(5, 4, 6).double(), mask), loss, mode)


@pytest.mark.parametrize("mode", EXACT)
def test_single_samples_equal_the_large_batch(mode):
    """One value per channel in each micro-batch, which alone would be refused."""
    model = nn.Sequential(nn.Linear(3, 4), anynorm.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)).double()
    batch = torch.randn(5, 3).double(), torch.randint(4, (5,))
    accumulate_and_compare(model, [1] * 5, batch, mode=mode)


@pytest.mark.parametrize("mode", EXACT)
def test_empty_micro_batch_changes_nothing(mode):
    accumulate_and_compare(make_chain(2), [4, 0, 3], draw(7), mode=mode)


@pytest.mark.parametrize("mode", EXACT)
def test_images_of_different_sizes_equal_one_norm_over_all_positions(mode):
    """What no large batch can hold: the reference is each layer on all images' positions as rows."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), anynorm.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).double()
    images = [torch.randn(2, 3, 4, 4).double(), torch.randn(1, 3, 2, 5).double()]
    rows = torch.cat([x.movedim(1, -1).reshape(-1, 3) for x in images])[:, :, None, None]
    large = copy.deepcopy(model)
    large(rows).square().sum().backward()
    anynorm.accumulate(model, images, lambda model, x: model(x).square().sum(), mode=mode, weights=[1, 1])
    for name, wanted in find_state(large).items():
        assert_near(find_state(model)[name], wanted, 1e-9, 1.0)


@pytest.mark.parametrize("mode", EXACT)
def test_packed_sequences_equal_the_large_batch(mode):
    model = nn.ModuleList([anynorm.BatchNorm1d(4), anynorm.BatchNorm1d(4)]).double()
    rows = [torch.randn(n, 4).double() for n in (5, 3, 2, 1)]

    def loss(model, sequences):
        y = model[1](model[0](nn.utils.rnn.pack_sequence(sequences)))
        return y.data.pow(3).sum()

    large = copy.deepcopy(model)
    loss(large, rows).backward()
    anynorm.accumulate(model, [rows[:2], rows[2:]], loss, mode=mode, weights=[1, 1])
    for name, wanted in find_state(large).items():
        assert_near(find_state(model)[name], wanted, 1e-9, 1.0)


class Dropped(nn.Module):
    """Dropout between two norms, of what a seed of each sample says, so that the large batch drops the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([anynorm.BatchNorm2d(3), anynorm.BatchNorm2d(4)])
        self.middle, self.last = nn.Conv2d(3, 4, 3), nn.Linear(36, 4)

    def forward(self, x: Tensor, seeds: Tensor) -> Tensor:
        keep = [torch.rand(x[0].shape, generator=torch.Generator().manual_seed(int(seed))) > 0.5 for seed in seeds]
        x = self.norms[0](x) * torch.stack(keep) * 2
        return self.last(self.norms[1](self.middle(x)).relu().flatten(1))


@pytest.mark.parametrize("mode", EXACT)
def test_dropout_equals_the_large_batch(mode):
    def loss(model, batch):
        y = model(batch[0], batch[2])
        return F.cross_entropy(y, batch[1]), y

    accumulate_and_compare(Dropped().double(), SIZES, (*draw(13), torch.arange(13)), loss, mode)


@pytest.mark.parametrize("mode", ["sweep", "estimate"])
def test_random_numbers_are_those_of_plain_accumulation(mode):
    """Keeps an invariant: every run of a micro-batch draws what plain accumulation draws, from every generator."""
    drawn: list[tuple] = []

    def loss(model, batch):
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))  # noqa: NPY002 # the global one
        return find_loss(model, batch)

    def seed():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002

    model = nn.Sequential(*make_chain(2)[:-1], nn.Dropout(0.5), nn.Linear(150, 4)).double()
    seed()
    for batch in cut(draw(13), SIZES):
        loss(copy.deepcopy(model), batch)
    plain, after = list(drawn), torch.get_rng_state()
    drawn.clear()
    seed()
    anynorm.accumulate(model, cut(draw(13), SIZES), loss, mode=mode)
    assert drawn[: len(SIZES)] == plain
    assert set(drawn) == set(plain)
    assert torch.equal(torch.get_rng_state(), after)


def test_sweep_with_dropout_is_lockstep_with_the_same_draws():
    """Dropout behind the last norm, where lockstep draws in the order of micro-batches, too."""
    model = nn.Sequential(*make_chain(2)[:-1], nn.Dropout(0.5), nn.Linear(150, 4)).double()
    states = []
    for mode in EXACT:
        torch.manual_seed(5)
        twin = copy.deepcopy(model)
        anynorm.accumulate(twin, cut(draw(13), SIZES), find_loss, mode=mode)
        states.append(find_state(twin))
    assert_same_state(states[0], states[1], 1e-9)


def find_errors(model, batch, sizes) -> tuple[dict[str, float], dict[str, float]]:
    """Of outputs and of gradients, against the large batch, of plain accumulation and of the estimate."""
    large, plain, cheap = (copy.deepcopy(model) for _ in range(3))
    found, wanted = find_loss(large, batch)
    found.backward()
    outputs = []
    for share, size in zip(cut(batch, sizes), sizes):
        loss, y = find_loss(plain, share)
        (loss * size / sum(sizes)).backward()
        outputs.append(y)
    result = anynorm.accumulate(cheap, cut(batch, sizes), find_loss, mode="estimate")
    errors = {}, {}
    for name, twin, y in (("plain", plain, outputs), ("estimate", cheap, result.outputs)):
        gradients = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (twin, large)]
        errors[0][name] = float((torch.cat(y) - wanted).norm().detach())
        errors[1][name] = float((gradients[0] - gradients[1]).norm())
    return errors


@pytest.mark.parametrize("norms", [1, 3, 9])
def test_estimate_is_nearer_than_plain_accumulation(norms):
    """Keeps an invariant: smaller errors of outputs and of gradients; outputs of one norm are exact."""
    outputs, gradients = find_errors(make_chain(norms), draw(32), [8] * 4)
    assert outputs["estimate"] < (1e-9 if norms == 1 else 0.7 * outputs["plain"])
    assert gradients["estimate"] < 0.9 * gradients["plain"]


def test_estimate_of_one_micro_batch_is_exact():
    accumulate_and_compare(make_blocks(), [13], draw(13), mode="estimate")


def test_estimate_is_the_same_by_kernels_and_by_the_formula(monkeypatch):
    states = []
    for off in (False, True):
        monkeypatch.setattr(
            anynorm.engine.merged, "is_plain", anynorm.engine.watch.is_plain if not off else lambda *_: False
        )
        model = make_blocks()
        anynorm.accumulate(model, cut(draw(13), SIZES), find_loss, mode="estimate")
        states.append(find_state(model))
    assert_same_state(states[1], states[0], 1e-9)


def test_parts_by_kernels_and_by_the_formula_go_together(monkeypatch):
    """Sums mean the same on both paths."""
    monkeypatch.setattr(anynorm.engine.merged, "is_plain", lambda x, *_: len(x) > 3)
    accumulate_and_compare(make_blocks(), SIZES, draw(13))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_added_in_place(mode):
    model, twin = make_chain(2), make_chain(2)
    anynorm.accumulate(twin, cut(draw(13), SIZES), find_loss, mode=mode)
    before = {}
    for name, p in model.named_parameters():
        p.grad = before[name] = torch.ones_like(p)
    anynorm.accumulate(model, cut(draw(13), SIZES), find_loss, mode=mode)
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert p.grad is before[name]
        torch.testing.assert_close(p.grad, q.grad + 1)


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}], ids=str)
def test_options_equal_the_large_batch(options, mode):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), anynorm.BatchNorm2d(6, **options), nn.Flatten(), nn.Linear(150, 4)
    )
    accumulate_and_compare(model.double(), SIZES, draw(13), mode=mode)


@pytest.mark.parametrize("mode", EXACT)
def test_frozen_norms_and_frozen_layers_equal_the_large_batch(mode):
    """A norm in evaluation takes no part; below a frozen layer no input wants a gradient."""
    model = make_chain(3)
    model[1].eval()
    model[0].requires_grad_(False)
    model[3].requires_grad_(False)
    large = copy.deepcopy(model)
    find_loss(large, draw(13))[0].backward()
    anynorm.accumulate(model, cut(draw(13), SIZES), find_loss, mode=mode)
    for name, wanted in find_state(large).items():
        assert_near(find_state(model)[name], wanted, 1e-9, 1.0)
