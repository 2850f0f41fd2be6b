"""Which batches move the running averages: recomputations and repeats do not, and what is not finite can be refused.

Of the three kinds of tests these equal torch without checkpointing, or keep an invariant.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import anynorm

KINDS = ["BatchNorm2d", "BatchNormAct2d", "InstanceNorm2d"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 2


def make(kind, **options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), getattr(anynorm, kind)(4, track_running_stats=True, **options), nn.Tanh())


def keep_convolutions(_, operation, *args, **kwargs):
    is_kept = operation == torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def selective():
    return create_selective_checkpoint_contexts(keep_convolutions)


WAYS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": selective},
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_recomputation_does_not_count(kind, way, momentum):
    """pytorch#96136, fairscale#1035: torch moves the averages twice."""
    if kind == "InstanceNorm2d" and momentum is None:
        momentum = 0.2  # without momentum instance norm's averages stay, as torch's do
    found = []
    for how in (None, WAYS[way]):
        model, x = make(kind, momentum=momentum), draw(4, 3, 6, 6).requires_grad_()
        for _ in range(2):
            y = model(x) if how is None else checkpoint(model, x, **how)
            y.square().sum().backward()
        found.append((model.state_dict(), [x.grad, *(p.grad for p in model.parameters())]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-4)  # sums in another order
    assert int(found[1][0]["1.num_batches_tracked"]) == (2 if "Batch" in kind else 0)


def test_torch_counts_a_recomputation():
    """The defect that the test above is about; it fails when torch has mended it."""
    norm = nn.BatchNorm2d(3)
    checkpoint(norm, draw(4, 3, 6, 6).requires_grad_(), use_reentrant=False).square().sum().backward()
    assert int(norm.num_batches_tracked) == 2


def test_nested_checkpoints():
    model, x = make("BatchNorm2d"), draw(4, 3, 6, 6).requires_grad_()

    def inner(x):
        return checkpoint(model, x, use_reentrant=False)

    checkpoint(inner, x, use_reentrant=False).sum().backward()
    assert int(model[1].num_batches_tracked) == 1


def test_a_compiled_block_in_a_checkpoint_counts_twice():
    """The limit: a compiled graph cannot tell a recomputation; the checkpoint belongs inside what is compiled."""
    model, x = make("BatchNorm2d"), draw(4, 3, 6, 6).requires_grad_()
    checkpoint(torch.compile(model, backend="aot_eager"), x, use_reentrant=False).sum().backward()
    assert int(model[1].num_batches_tracked) == 2
    if torch.__version__.startswith("2.8."):
        pytest.skip("torch 2.8 runs a checkpoint inside what is compiled twice, and so it counts twice, too")
    model = make("BatchNorm2d")

    def block(x):
        return checkpoint(model, x, use_reentrant=False)

    torch.compile(block, backend="aot_eager")(x).sum().backward()
    assert int(model[1].num_batches_tracked) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_repeats_count_unless_told_otherwise(kind):
    once, twice, within = (make(kind) for _ in range(3))
    x, other = draw(4, 3, 6, 6), draw(4, 3, 6, 6, seed=1)
    once(x)
    twice(x), twice(other)
    with anynorm.update_once():
        within(x), within(other)
    torch.testing.assert_close(within.state_dict(), once.state_dict(), rtol=0, atol=0)
    assert not torch.equal(twice[1].running_mean, once[1].running_mean)
    with anynorm.update_once():
        within(other)
    torch.testing.assert_close(within.state_dict(), twice.state_dict(), rtol=0, atol=0)


def test_update_once_ends_with_an_exception_and_nests():
    norm, x = anynorm.BatchNorm1d(3), draw(4, 3)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        with anynorm.update_once():
            norm(x), norm(x), norm(x[0])
    assert int(norm.num_batches_tracked) == 1
    with anynorm.update_once():
        with anynorm.update_once():
            norm(x), norm(x)
        norm(x), norm(x)
    assert int(norm.num_batches_tracked) == 3


def test_update_once_takes_the_first_batch_that_is_not_refused():
    norm, good = anynorm.BatchNorm1d(3, on_nonfinite="skip"), draw(8, 3)
    with anynorm.update_once():
        with pytest.raises(ValueError, match="more than 1 value"):
            norm(draw(1, 3))
        with pytest.raises(RuntimeError, match="channels"):
            norm(draw(8, 4))
        with pytest.warns(UserWarning, match="was not counted"):
            norm(good * float("nan"))
        norm(good), norm(good)
    once = anynorm.BatchNorm1d(3)
    once(good)
    torch.testing.assert_close(norm.state_dict(), once.state_dict(), rtol=0, atol=0)


def spoil(x, value):
    x = x.clone()
    x[1, 2, 0, 0] = value
    return x


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["BatchNorm2d", "BatchNormAct2d"])
def test_a_batch_that_is_not_finite_can_be_skipped(kind, value):
    """pytorch#90342, #115500: one Inf under mixed precision stays in the averages for ever."""
    model = getattr(anynorm, kind)(3, on_nonfinite="skip")
    anynorm.accelerate(model)
    model(draw(4, 3, 5, 5))
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=rf"{kind}\(3.*a batch with NaN or Inf was not counted"):
        y = model(spoil(draw(4, 3, 5, 5), value))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not y[:, 2].isfinite().all()  # the gradient scaler sees it
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        model(spoil(draw(4, 3, 5, 5), value))
        model(draw(4, 3, 5, 5))
    assert (model.nonfinite_batches, int(model.num_batches_tracked)) == (2, 2)


def test_or_refused_with_an_error_that_names_the_layer():
    model = nn.Sequential(nn.BatchNorm2d(3))
    anynorm.accelerate(model)
    model[0].on_nonfinite = "error"
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"^0 = BatchNorm2d\(3.*statistics that are NaN or Inf"):
        model(spoil(draw(4, 3, 5, 5), float("nan")))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_or_propagates_as_in_torch():
    ours, theirs = anynorm.BatchNorm2d(3), nn.BatchNorm2d(3)
    for norm in (ours, theirs):
        norm(spoil(draw(4, 3, 5, 5), float("nan")))
    assert ours.running_mean.isnan().equal(theirs.running_mean.isnan())
    assert ours.running_mean.isnan().tolist() == [False, False, True]


def test_finite_values_whose_variance_overflows_are_refused_too():
    norm = anynorm.BatchNorm1d(1, on_nonfinite="skip")
    with pytest.warns(UserWarning, match="was not counted"):
        norm(torch.tensor([[-3e38], [3e38]]))
    assert norm.running_var == 1


def test_a_choice_that_is_none():
    with pytest.raises(ValueError, match="on_nonfinite must be one of propagate, skip, error; got 'drop'"):
        anynorm.BatchNorm1d(3, on_nonfinite="drop")
