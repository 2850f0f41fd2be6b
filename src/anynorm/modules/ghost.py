"""`GhostBatchNorm1d/2d/3d`: batch norm of a few samples at a time, however large the batch is."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from ..functional.batch import BatchFront
from ..functional.ghost import GHOST, check_ghost_size, count_real, cut
from ..padding.masks import find_mask
from . import batch

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import BatchNormKeywords


class _Ghost(batch._BatchNorm):
    """What ghost batch norm does otherwise than batch norm."""

    front: ClassVar[BatchFront] = GHOST
    ghost_size: int

    def find_sizes(self) -> int:
        """The number of samples in a ghost."""
        return self.ghost_size

    def normalize(
        self, input: Any, residual: Any = None, activation: Any = None, mask: Any = None, lengths: Any = None
    ) -> Any:
        """As batch norm does; real positions that are alone in their ghost go another way, where one was chosen."""
        lone = self._find_lone(input, mask, lengths) if self.training else None
        if lone is None:
            return super().normalize(input, residual, activation, mask, lengths)
        found, alone = lone
        # Both ways over all positions, then chosen: a selection would depend on the data, and break graphs.
        other = self._normalize_single(input, residual, activation, mask, lengths)
        y = super().normalize(input, residual, activation, (found - alone).squeeze(1))
        return torch.where(alone > 0, other, y)

    def _find_lone(self, input: Any, mask: Any, lengths: Any) -> tuple[Tensor, Tensor] | None:
        """The mask, and which real positions are alone in their ghost, where something else than an error is wanted."""
        if self.on_single == "error" or (mask is None and lengths is None):
            return None
        found = find_mask("ghost_batch_norm", input, (1,), mask, lengths)
        assert found is not None
        real = self._count_real(found)
        each = torch.full_like(real, self.ghost_size, dtype=torch.long)
        each[-1] = len(found) - self.ghost_size * (len(real) - 1)
        alone = (real == 1).repeat_interleave(each).view(-1, *[1] * (found.dim() - 1))
        return found, found * alone

    def _count_real(self, found: Tensor) -> Tensor:
        """The number of real positions in each ghost."""
        return count_real(found, self.ghost_size) if len(found) > self.ghost_size else found.sum().view(1)

    def _count(self, input: Any, mask: Any, lengths: Any) -> Any:
        """Every ghost is a batch; one of which nothing is real, or one value, is none."""
        if mask is None and lengths is None:
            full, rest = cut(input.shape, self.ghost_size)
            return full + (rest > 0)
        found = find_mask("ghost_batch_norm", input, (1,), mask, lengths)
        assert found is not None
        return (self._count_real(found) > 1).sum()


class _GhostBatch(_Ghost, batch._Batch):
    """The constructor of torch's batch norms, `ghost_size`, and the choices of `anynorm.BatchNorm2d`."""

    def __init__(
        self, num_features: int, *arguments: Any, ghost_size: int, **options: Unpack[BatchNormKeywords]
    ) -> None:
        super().__init__(num_features, *arguments, **options)
        check_ghost_size(type(self).__name__, ghost_size)
        self.ghost_size = ghost_size

    def extra_repr(self) -> str:
        """The arguments of batch norm, and the size of a ghost."""
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"


class GhostBatchNorm1d(_GhostBatch, nn.BatchNorm1d):
    """`anynorm.BatchNorm1d` of each `ghost_size` samples by themselves, for (N, C) or (N, C, L).

    y[b,m,c,s] = (x[b,m,c,s] - mean[b,c]) / sqrt(var[b,c] + eps) * weight[c] + bias[c]

    The batch is cut into ghosts of `ghost_size` samples in their order; the last may be shorter, and where it would be
    one value per channel it joins the ghost before. In evaluation it is batch norm, and so is its state_dict.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype, bias: as for torch's batch norm. Every ghost moves
            the running averages in its turn and is counted in `num_batches_tracked`, as if batch norm were called on
            one ghost after the other.
        ghost_size: samples that share statistics.
        on_single: as for `anynorm.BatchNorm1d`; with a mask also for a ghost with one real position.
        on_nonfinite: as there; a batch is counted or refused as a whole.

    Note:
        Averages forget faster than with batch norm at the same momentum: a batch of 8 ghosts moves them 8 times.
        torch.nn.SyncBatchNorm.convert_sync_batchnorm takes it for a batch norm and drops the ghosts; `anynorm.sync`
        leaves it and says so.

    Source:
        Hoffer, Hubara and Soudry 2017, arXiv:1705.08741, algorithm 1.

    Example:
        >>> norm = anynorm.GhostBatchNorm1d(1, ghost_size=2)
        >>> norm(torch.tensor([[1.0], [3.0], [10.0], [30.0]])).detach().T
        tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
        >>> norm.num_batches_tracked
        tensor(2)
    """

    _axes: tuple[int, ...] = (2, 3)


class GhostBatchNorm2d(_GhostBatch, nn.BatchNorm2d):
    """`anynorm.BatchNorm2d` of each `ghost_size` samples by themselves, for (N, C, H, W); see `GhostBatchNorm1d`.

    Example:
        >>> norm = anynorm.GhostBatchNorm2d(3, ghost_size=32)
        >>> norm.load_state_dict(torch.nn.BatchNorm2d(3).state_dict())
        <All keys matched successfully>
    """

    _axes: tuple[int, ...] = (4,)


class GhostBatchNorm3d(_GhostBatch, nn.BatchNorm3d):
    """`anynorm.BatchNorm3d` of each `ghost_size` samples by themselves, for (N, C, D, H, W); see `GhostBatchNorm1d`.

    Example:
        >>> anynorm.GhostBatchNorm3d(3, ghost_size=2)(torch.randn(5, 3, 4, 4, 4)).shape
        torch.Size([5, 3, 4, 4, 4])
    """

    _axes: tuple[int, ...] = (5,)


def show_options(kind: Any, theirs: type, **options: Any) -> None:
    """Add keywords to a class's signature, behind torch's and before the choices, for people and for `inspect`."""
    batch.show_choices(kind, theirs)
    known = list(kind.__signature__.parameters.values())
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in options.items()]
    end = len(known) - len(batch.CHOICES)
    kind.__signature__ = kind.__signature__.replace(parameters=[*known[:end], *added, *known[end:]])


for _kind, _theirs in (
    (GhostBatchNorm1d, nn.BatchNorm1d),
    (GhostBatchNorm2d, nn.BatchNorm2d),
    (GhostBatchNorm3d, nn.BatchNorm3d),
):
    show_options(_kind, _theirs, ghost_size=inspect.Parameter.empty)
