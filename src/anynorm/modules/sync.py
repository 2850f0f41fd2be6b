"""`SyncBatchNorm`: batch norm over the mini-batches of all ranks, on every device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from ..functional.batch import BATCH_OF_ONE
from ..padding.masks import describe
from ..padding.ragged import is_ragged, open_rows
from ..ranks.exchange import Ranks
from ..ranks.frames import BACKWARD, DTYPES, FORWARD, Call
from ..sources import Batch, Exchange, Merged, Source
from ..statistics import Moments
from ..torch_private import not_compiled
from . import batch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from .keywords import SyncKeywords


class OneValueError(ValueError):
    """All ranks together have one value per channel."""


class RankExchange(Exchange):
    """One call of a layer on all ranks, merged in the order of ranks, so that every rank finds the same bits."""

    ranks: Ranks
    layer: _Synchronized
    call: dict[str, Any]

    def __init__(self, ranks: Ranks, layer: _Synchronized, call: dict[str, Any]) -> None:
        self.ranks, self.layer, self.call = ranks, layer, call

    def merge(self, moments: Moments) -> Moments:
        # This rank's own moments are taken from what was sent, too, as the others see them.
        assert moments.mean is not None
        # float64 holds every count below 2**53 exactly, so that one message carries counts and statistics.
        own = [torch.tensor([float(moments.count)], dtype=torch.float64, device="cpu")]
        own += [t.detach().cpu().double().flatten() for t in (moments.mean, moments.m2)]
        found = self.ranks.exchange(Call(phase=FORWARD, **self.call), torch.cat(own))
        total = Moments(0, own[1], own[2])
        for part in found:
            mean, m2 = part[1:].chunk(2)
            total = total.merge(Moments(int(part[0]), mean, m2))
        if total.count == 1:
            raise OneValueError(
                f"{describe(self.layer)}: statistics need more than 1 value per channel on all ranks together, or "
                f"every output is beta; got 1; {BATCH_OF_ONE}"
            )
        assert total.mean is not None
        self.layer.merged_count = int(total.count)
        mean, m2 = (t.to(moments.m2).view_as(moments.m2) for t in (total.mean, total.m2))
        return Moments(total.count, mean, m2)

    def merge_sums(self, sums: Tensor) -> Tensor:
        found = self.ranks.exchange(Call(phase=BACKWARD, **self.call), sums.detach().cpu().double().flatten())
        total = found[0]
        for part in found[1:]:
            total = total + part
        return total.to(sums).view_as(sums)


class _Synchronized(batch._BatchNorm):
    """What `SyncBatchNorm` and `SyncBatchNormAct` share.

    Attributes:
        label: the layer's name in errors, the same on all ranks; `anynorm.sync` and `anynorm.accelerate` give the one
            that it has in the model.
        before: the class that `anynorm.sync` found; of an adapted norm what it is made of.
    """

    process_group: ProcessGroup | None = None
    before: Any = None
    serial: int = 0
    calls: int = 0
    merged_count: int = 0  # values per channel on all ranks, of the last call

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(
                f"expected at least 2D input (got {input.dim()}D input); got shape {tuple(input.shape)}; unsqueeze it"
            )

    def find_ranks(self) -> Ranks | None:
        """The ranks whose statistics are merged; None in evaluation and where this one is alone."""
        return Ranks.find(self.process_group) if self.training else None

    def normalize(
        self, input: Any, residual: Any = None, activation: Any = None, mask: Any = None, lengths: Any = None
    ) -> Any:
        """As batch norm does; one value per channel is one on all ranks together."""
        try:
            return super().normalize(input, residual, activation, mask, lengths)
        except OneValueError:
            if self.on_single == "error":
                raise
            return self._normalize_single(input, residual, activation, mask, lengths)

    def find_source(self, input: Any, moves: bool) -> Source:
        source: Any = super().find_source(input, moves)
        exchange = self.open_exchange(input, source[0] is not None) if type(source) is Batch else None
        return source if exchange is None else Merged(source[0], source[1], source[2], exchange)

    def is_part(self) -> bool:
        return self.find_ranks() is not None

    def _count(self, input: Any, mask: Any, lengths: Any) -> Any:
        return super()._count(input, mask, lengths) if self.find_ranks() is None else int(self.merged_count > 0)

    @not_compiled  # torch.compiler.disable would import the compiler, which takes seconds, with anynorm.
    def open_exchange(self, input: Any, moves: bool) -> RankExchange | None:
        """Count this call, and describe it, so that other ranks can be held against it."""
        ranks = self.find_ranks()
        if ranks is None:
            return None
        data = open_rows("batch_norm", input) if is_ragged(input) else input
        wants_gradient = torch.is_grad_enabled() and data.requires_grad
        call = {
            "label": self.label or f"{type(self).__name__} {self.serial}",
            "number": self.calls,
            "order": ranks.register_layer(self),
            "channels": self.num_features,
            "dtype": DTYPES.index(data.dtype) if data.dtype in DTYPES else len(DTYPES),
            "mode": int(wants_gradient) + 2 * moves,
        }
        self.calls += 1
        return RankExchange(ranks, self, call)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy in the same process group, which itself cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


class _SyncBatch(_Synchronized, batch._Batch):
    """The constructor of `torch.nn.SyncBatchNorm`, and the choices of `anynorm.BatchNorm2d`."""

    created: ClassVar[Iterator[int]] = count()
    serial: int

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[SyncKeywords],
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.process_group = process_group
        self.serial = next(self.created)


class SyncBatchNorm(_SyncBatch, nn.modules.batchnorm._BatchNorm):
    """`torch.nn.SyncBatchNorm` on every device, with exact counts and faults that are said.

    y[n,c,s] = (x[n,c,s] - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c], mean and var over all ranks

    Ranks may have batches of different sizes, also none, masks and lengths, channels_last and half types; every value
    counts once, and every rank finds the same bits. Outside torch.distributed, with one rank, and in evaluation it is
    `anynorm.BatchNorm1d/2d/3d`.

    Args:
        num_features: C.
        eps: in units of x squared.
        momentum: weight of the new value in the running averages; None for their cumulative average.
        affine, track_running_stats, device, dtype, bias: as for torch's batch norm.
        process_group: the ranks; None for all.
        on_single, on_nonfinite: as for `anynorm.BatchNorm2d`; both are about all ranks together.

    Raises:
        SyncError: at the call of forward or in backward, where ranks call other layers, or with other channels, dtypes
            or modes, or where a rank does not come within the timeout of its process group. The module's state is as it
            was before the call. The process group cannot be used for synchronization any more.

    Note:
        Statistics travel as float64 through the memory of the host, by gloo, on a group of their own with the ranks
        of `process_group`. So any device and any backend of the gradients will do; only the CPU has been tried. One
        message forward (two where the layer has more channels than any before) and one backward. It is no instance of
        torch.nn.SyncBatchNorm, which DistributedDataParallel refuses on the CPU. Under torch.compile it breaks the
        graph. It can be differentiated once. Every rank must call the same layers in the same order, and backward
        where the others do.

    Source:
        Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1; merged after Chan, Golub and LeVeque 1979.

    Example:
        >>> norm = anynorm.SyncBatchNorm(3)
        >>> norm.load_state_dict(torch.nn.BatchNorm2d(3).state_dict())
        <All keys matched successfully>
    """


batch.show_choices(SyncBatchNorm, nn.SyncBatchNorm)
