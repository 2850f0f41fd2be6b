"""`shorten` against the layers themselves, which are given each sample without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import anynorm
from anynorm.padding.shorten import make_windows

SIZE = 24


def count_alone(layer: nn.Module, *sizes: int) -> tuple[int, ...]:
    """How many positions the layer makes of a sample; 0 where it refuses it."""
    try:
        return tuple(layer(torch.zeros(1, 1, *sizes)).shape[2:])
    except RuntimeError:
        return (0,) * len(sizes)


def assert_as_alone(layer: nn.Module, lengths: list[int], found: torch.Tensor) -> None:
    """Each sample keeps, from the first position on, what it has alone."""
    kept = [count_alone(layer, length)[0] for length in lengths]
    assert torch.equal(found, anynorm.mask_of(kept, *count_alone(layer, max(lengths))))


@settings(deadline=None, max_examples=200)
@given(
    kernel_size=st.integers(1, 6),
    stride=st.integers(1, 7),
    padding=st.integers(0, 9),
    dilation=st.integers(1, 8),
    lengths=st.lists(st.integers(1, SIZE), min_size=1, max_size=3),
)
@example(kernel_size=2, stride=1, padding=8, dilation=8, lengths=[3])
def test_convolutions(kernel_size, stride, padding, dilation, lengths):
    layer = nn.Conv1d(1, 1, kernel_size, stride, padding, dilation)
    lengths = [*lengths, SIZE]
    assume(count_alone(layer, SIZE)[0])
    mask = anynorm.mask_of(lengths, SIZE)
    assert_as_alone(layer, lengths, anynorm.shorten(mask, kernel_size, stride, padding, dilation))
    assert_as_alone(layer, lengths, anynorm.shorten(mask, layer))
    attributes: Any = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    assert_as_alone(layer, lengths, anynorm.shorten(mask, *attributes))


@settings(deadline=None, max_examples=100)
@given(
    kind=st.sampled_from([nn.MaxPool1d, nn.AvgPool1d]),
    kernel_size=st.integers(2, 6),
    stride=st.none() | st.integers(1, 7),
    padding=st.integers(0, 3),
    ceil_mode=st.booleans(),
    lengths=st.lists(st.integers(1, SIZE), min_size=1, max_size=3),
)
def test_pooling(kind, kernel_size, stride, padding, ceil_mode, lengths):
    assume(2 * padding <= kernel_size)
    layer = kind(kernel_size, stride, padding, ceil_mode=ceil_mode)
    lengths = [*lengths, SIZE]
    assert_as_alone(layer, lengths, anynorm.shorten(anynorm.mask_of(lengths, SIZE), layer))


@settings(deadline=None, max_examples=100)
@given(
    kernel_size=st.integers(1, 6),
    stride=st.integers(1, 5),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 3),
    lengths=st.lists(st.integers(1, SIZE), min_size=1, max_size=3),
)
def test_transposed_convolutions(kernel_size, stride, padding, dilation, lengths):
    layer = nn.ConvTranspose1d(1, 1, kernel_size, stride, padding, output_padding=stride - 1, dilation=dilation)
    assume(stride > 1 or dilation > 0)
    lengths = [*lengths, SIZE]
    assert_as_alone(layer, lengths, anynorm.shorten(anynorm.mask_of(lengths, SIZE), layer))


@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 1), (4, 1), (2, 8), (4, 3)])
def test_padding_same_and_valid(kernel_size, dilation):
    lengths = [1, 5, SIZE]
    mask = anynorm.mask_of(lengths, SIZE)
    for padding in ("same", "valid"):
        layer = nn.Conv1d(1, 1, kernel_size, padding=padding, dilation=dilation)
        if count_alone(layer, SIZE)[0]:
            assert_as_alone(layer, lengths, anynorm.shorten(mask, kernel_size, 1, padding, dilation))
            assert_as_alone(layer, lengths, anynorm.shorten(mask, layer))


def test_axes_of_maps():
    layer = nn.Conv2d(1, 1, (3, 5), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    sizes = [(9, 20), (4, 12), (7, 9)]
    mask = torch.stack([(torch.arange(9)[:, None] < h) & (torch.arange(20) < w) for h, w in sizes])
    found = anynorm.shorten(mask, layer)
    for one, size in zip(found, sizes, strict=True):
        height, width = count_alone(layer, *size)
        assert int(one.sum()) == height * width
        assert bool(one[:height, :width].all())
    by_time = anynorm.shorten(anynorm.mask_of([20, 11], 20).unsqueeze(1), layer)
    assert by_time.shape == (2, 1, 12)
    assert by_time[:, 0].sum(1).tolist() == [12, 3]


def test_samples_that_do_not_begin_at_the_first_position():
    """Padding in front: a sample keeps as many as it would alone, not those that merely touch it."""
    mask = anynorm.mask_of([8, 5], 8).flip(1)
    assert anynorm.shorten(mask, 3, padding=1).sum(1).tolist() == [8, 5]
    assert anynorm.shorten(mask, 3).sum(1).tolist() == [6, 3]


def test_holes_count_where_a_window_touches_a_real_position():
    mask = torch.tensor([[1, 0, 0, 0, 0, 1, 1, 0]])
    assert anynorm.shorten(mask, 3, padding=1).int().tolist() == [[1, 1, 0, 0, 1, 1, 1, 0]]


def test_nothing_real_stays_nothing():
    mask = torch.zeros(2, 6)
    assert not anynorm.shorten(mask, 3, padding=4).any()
    assert not anynorm.shorten(mask, nn.ConvTranspose1d(1, 1, 3, 2)).any()


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((3, 1, "full"), ValueError, "padding must be 'same', 'valid' or whole numbers; got 'full'"),
        ((3, 2, "same"), ValueError, "padding='same' needs stride 1"),
        ((3.0,), TypeError, "kernel_size must be whole numbers; got 3.0"),
        (((3, 3),), ValueError, r"kernel_size must be one number .* for each axis of positions, 1; got \(3, 3\)"),
        ((3, 0), ValueError, "stride must be one number of 1 or more"),
        ((9,), ValueError, "reach must fit into the padded positions; got 8 positions"),
        ((nn.Linear(3, 3),), ValueError, "a layer must be a convolution or pooling .* got Linear"),
        ((nn.Conv2d(1, 1, 3),), ValueError, "over as many axes as the mask, 1; got Conv2d"),
    ],
)
def test_what_is_refused(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        anynorm.shorten(anynorm.mask_of([5, 3], 8), *arguments)


def test_a_mask_without_samples():
    with pytest.raises(ValueError, match=r"mask must be \(N, L\).*got \(8,\)"):
        anynorm.shorten(torch.ones(8), 3)


def test_windows_are_one_for_each_axis():
    assert [window.kernel_size for window in make_windows(2, (3, 5), 1, 0, 1, False)] == [3, 5]


def test_masks_that_are_none():
    with pytest.raises(TypeError, match="shorten: mask must be a tensor; got list"):
        anynorm.shorten([[1, 0]], 3)
    with pytest.raises(ValueError, match="shorten: mask must be True or 1 at real positions"):
        anynorm.shorten(torch.full((2, 6), 0.5), 3)
    with pytest.raises(ValueError, match="the layer's reach must fit into the padded positions; got 1 positions"):
        anynorm.shorten(torch.ones(2, 1, dtype=torch.bool), torch.nn.ConvTranspose1d(1, 1, 2, 3, padding=1))
    assert anynorm.shorten(torch.ones(0, 6), 3).shape == (0, 4)
