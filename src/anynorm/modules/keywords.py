"""What constructors take by keyword, for type checkers; at run time torch's arguments are passed on as they are."""

from __future__ import annotations

from typing import TypedDict

import torch


class ModuleKeywords(TypedDict, total=False):
    """Of every module with parameters."""

    device: torch.device | str | int | None
    dtype: torch.dtype | None


class TorchBatchNormKeywords(ModuleKeywords, total=False):
    """Of torch's batch norms."""

    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    bias: bool


class SyncKeywords(TypedDict, total=False):
    """Of `anynorm.SyncBatchNorm`, beside those with a place."""

    bias: bool
    on_single: str
    on_nonfinite: str


class BatchNormKeywords(TorchBatchNormKeywords, total=False):
    """Of `anynorm.BatchNorm2d`."""

    on_single: str
    on_nonfinite: str


class RecurrentKeywords(ModuleKeywords, total=False):
    """Of torch's LSTM and GRU."""

    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
