"""Keeps an invariant: what type checkers are told of the public functions. mypy reads this file; it runs as well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import anynorm
from anynorm import functional
from anynorm.accumulation.accumulate import Accumulated
from anynorm.surgery.recalibration.report import Recalibration
from anynorm.surgery.report import SurgeryReport


def test_the_package_says_that_it_has_types() -> None:
    assert (Path(anynorm.__file__).parent / "py.typed").is_file()


def test_functions_return_what_they_got() -> None:
    x, residual = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    y = assert_type(
        functional.batch_norm(x, None, None, training=True, residual=residual, lengths=[5, 3, 2, 1]), Tensor
    )
    assert type(y) is Tensor
    assert_type(functional.ghost_batch_norm(x, None, None, ghost_size=2, training=True), Tensor)
    assert_type(functional.instance_norm(x, activation="relu"), Tensor)
    assert_type(functional.group_norm(x, 2), Tensor)
    assert_type(functional.rms_norm(x, (5,)), Tensor)
    packed = pack_sequence([torch.randn(3, 6), torch.randn(2, 6)])
    assert type(assert_type(functional.layer_norm(packed, (6,)), PackedSequence)) is PackedSequence


def test_constructors_take_torchs_arguments_and_their_own() -> None:
    assert_type(anynorm.BatchNorm2d(3, eps=1e-3, on_single="running").forward(torch.randn(2, 3, 4, 4)), Tensor)
    assert_type(anynorm.GhostBatchNorm1d(3, ghost_size=2, affine=False).ghost_size, int)
    assert_type(anynorm.BatchRenorm2d(3, r_max=2.0, on_nonfinite="skip").r_max, float)
    assert_type(anynorm.LayerNorm([3, 4], dtype=torch.float64).normalized_shape, tuple[int, ...])
    assert_type(anynorm.BatchNormAct2d(3, activation="silu").activation, str)
    assert_type(anynorm.LSTM(3, 5, batch_first=True, norm="layer").norm, str | None)
    assert_type(anynorm.AnyNorm("n c s -> n", c=3, s=4).eps, float)
    with pytest.raises(TypeError, match="epsilon"):
        anynorm.BatchNorm2d(3, epsilon=1e-3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="ghost_size"):
        anynorm.GhostBatchNorm1d(3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="bidirectionally"):
        anynorm.LSTM(3, 5, bidirectionally=True)  # type: ignore[call-arg]


def test_models_are_changed_in_place_and_reported() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    batches = [torch.randn(8, 4) for _ in range(3)]
    assert type(assert_type(anynorm.accelerate(model), SurgeryReport)) is SurgeryReport
    assert type(assert_type(anynorm.recalibrate(model, batches), Recalibration)) is Recalibration
    accumulated = anynorm.accumulate(model, batches, lambda network, batch: network(batch).square().mean())
    assert type(assert_type(accumulated, Accumulated)) is Accumulated
    with anynorm.masked(torch.ones(8, dtype=torch.bool)):
        model(batches[0])
    assert_type(anynorm.mask_of([1, 3], 3), Tensor)
