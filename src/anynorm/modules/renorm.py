"""`BatchRenorm1d/2d/3d`: batch norm that in training already looks at the running averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn as nn
from torch import Tensor

from ..engine.watch import has_memory
from ..errors import has_values
from ..functional.batch import BatchFront
from ..functional.renorm import RENORM, check_limits
from ..sources import Batch, Renorm, Source, find_momentum
from . import batch
from .ghost import show_options
from .recomputation import read_or_replay

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import BatchNormKeywords

Warmup = tuple[int, int, int] | Callable[[Tensor], tuple[Any, Any]]
PAPERS_WARMUP = (5_000, 40_000, 25_000)


class _Renorm(batch._BatchNorm):
    """What batch renormalization does otherwise than batch norm."""

    front: ClassVar[BatchFront] = RENORM
    r_max: float
    d_max: float
    warmup: Warmup
    batches: Tensor
    start_share: Tensor

    def find_limits(self) -> tuple[Any, Any]:
        """The limits r_max and d_max of the next batch."""
        if callable(self.warmup):
            return self.warmup(self.batches)
        start, r_end, d_end = self.warmup
        return 1 + (self.r_max - 1) * self._find_progress(start, r_end), self.d_max * self._find_progress(start, d_end)

    def _find_progress(self, start: int, end: int) -> Tensor:
        """How far the schedule is: 0 until batch `start`, 1 from batch `end` on, linear between."""
        if end <= start:
            return (self.batches >= start).to(self.start_share)
        return ((self.batches.to(self.start_share) - start) / (end - start)).clamp(0, 1)

    def find_source(self, input: Any, moves: bool) -> Source:
        source = super().find_source(input, moves)
        known = self._find_known() if self.training else None
        return source if known is None else Renorm(*cast(Batch, source), *known)

    def _is_warming_up(self) -> bool:
        """Whether the next batch certainly is batch norm."""
        return not callable(self.warmup) and has_memory(self.batches) and int(self.batches) < self.warmup[0]

    def _find_known(self) -> Any:
        """What r and d of this call are found from; None for batch norm."""
        now = self.running_mean, self.running_var, self.find_limits(), self.start_share
        return read_or_replay(self, None if self._is_warming_up() else now)

    def _count(self, input: Any, mask: Any, lengths: Any) -> Any:
        """How many batches batch norm counts; the schedule and the share of the start go on with it."""
        counted = super()._count(input, mask, lengths)
        momentum = find_momentum(self.momentum, self.num_batches_tracked)
        self.batches.add_(counted)
        # A number times a bool or whole tensor is float32, or what the default dtype is.
        self.start_share.mul_(1 - momentum * (counted.to(self.start_share) if isinstance(counted, Tensor) else counted))
        return counted

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and convert as torch does, but the share of the start stays wide: in half precision it would stop."""
        share = self.start_share
        super()._apply(fn, recurse)
        if self.start_share.dtype != share.dtype:
            moved = self.start_share
            self.start_share = moved.to(share.dtype) if share.is_meta else share.to(moved.device)
        return self

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batch counted, and the schedule at its begin."""
        super().reset_running_stats()
        if "batches" in self._buffers and (self.frozen is None or not self.frozen.updates):
            self.batches.zero_()
            self.start_share.fill_(1)

    def extra_state(self) -> dict[str, float]:
        """What is remembered beside the state_dict: see `anynorm.extra_state`."""
        return {"batches": int(self.batches), "start_share": float(self.start_share)}

    def load_extra_state(self, state: dict[str, float]) -> None:
        """Take what `extra_state` gave; call it after `load_state_dict`."""
        if set(state) != {"batches", "start_share"}:
            raise RuntimeError(
                f"{type(self).__name__}: extra state holds batches and start_share; got {sorted(state)}; pass what "
                "extra_state() returned"
            )
        self.batches.fill_(int(state["batches"]))
        self.start_share.fill_(state["start_share"])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        errors = len(rest[-1])
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + "running_mean" in state_dict and len(rest[-1]) == errors:
            self._guess_extra_state()

    def _guess_extra_state(self) -> None:
        """From batch norm's state alone: that averages started at 0 and 1 and moved by this momentum at each batch.

        Without a counted batch they are the start itself, or come from elsewhere and hold none of it.
        """
        mean, var, counter = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is None or var is None or counter is None or not all(map(has_values, (mean, var, counter))):
            return
        batches = int(counter)
        if batches == 0:
            share = float(not mean.any() and bool((var == 1).all()))
        else:
            share = 0.0 if self.momentum is None else (1 - self.momentum) ** batches
        self.load_extra_state({"batches": batches, "start_share": share})


class _BatchRenorm(_Renorm, batch._Batch):
    """The constructor of torch's batch norms, limits and schedule, and the choices of `anynorm.BatchNorm2d`."""

    r_max: float
    d_max: float
    warmup: Warmup

    def __init__(
        self,
        num_features: int,
        *arguments: Any,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: Warmup = PAPERS_WARMUP,
        **options: Unpack[BatchNormKeywords],
    ) -> None:
        super().__init__(num_features, *arguments, **options)
        name = type(self).__name__
        if not self.track_running_stats:
            raise ValueError(
                f"{name}: r and d need running averages; got track_running_stats=False; leave it out, or use batch norm"
            )
        check_limits(name, r_max, d_max)
        if not callable(warmup) and (len(warmup) != 3 or min(warmup) < 0):
            raise ValueError(
                f"{name}: warmup must be (batches as batch norm, batches until r_max, batches until d_max) or a "
                f"function; got {warmup!r}; the paper's is {PAPERS_WARMUP}"
            )
        self.r_max, self.d_max, self.warmup = r_max, d_max, warmup
        # Not in the state_dict, which is batch norm's; buffers, so that they are where the averages are.
        device = None if self.running_mean is None else self.running_mean.device
        wide = torch.float32 if device is not None and device.type == "mps" else torch.float64
        self.register_buffer("batches", torch.zeros((), dtype=torch.long, device=device), persistent=False)
        # One axis: torch.compile takes a float64 without axes for a number, and forgets what is written to it.
        self.register_buffer("start_share", torch.ones(1, dtype=wide, device=device), persistent=False)

    def extra_repr(self) -> str:
        """The arguments of batch norm, limits and schedule."""
        warmup = getattr(self.warmup, "__name__", self.warmup)
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, warmup={warmup}"


class BatchRenorm1d(_BatchRenorm, nn.BatchNorm1d):
    """`anynorm.BatchNorm1d` whose output in training is moved towards evaluation's, for (N, C) or (N, C, L).

    y[n,c,s] = ((x[n,c,s] - mean[c]) / sqrt(var[c] + eps) * r[c] + d[c]) * weight[c] + bias[c]
    r[c] = clip(sqrt(var[c] + eps) / sqrt(running_var[c] + eps), 1 / r_max, r_max)
    d[c] = clip((mean[c] - running_mean[c]) / sqrt(running_var[c] + eps), -d_max, d_max)

    No gradient flows through r and d. In evaluation it is batch norm, and so is its state_dict.

    Args:
        num_features: C.
        eps, momentum, affine, device, dtype, bias: as for torch's batch norm. The paper takes a momentum of 0.01.
        track_running_stats: must be True.
        r_max, d_max: limits at the end of the schedule; 1 or more, and 0 or more.
        warmup: (start, r_end, d_end), in batches: batch norm until `start`, then limits that rise linearly from 1 and 0
            to r_max at r_end and to d_max at d_end; (0, 0, 0) for the limits at once. Or a function of the number of
            batches counted so far, a 0-dimensional tensor, that returns both limits; r_max and d_max are not used then.
        on_single, on_nonfinite: as for `anynorm.BatchNorm1d`.

    Note:
        Averages start at mean 0 and variance 1, which is no history: r and d are found from averages without that part
        (`start_share`). How many batches the schedule has counted and what is left of the start is not in the
        state_dict; when one is loaded, both are found from num_batches_tracked and momentum, which is exact where
        training alone moved the averages and momentum was constant. `anynorm.extra_state` saves them exactly. r uses
        running_var as evaluation does, with n/(n-1): see `anynorm.functional.batch_renorm`.

    Source:
        Ioffe 2017, arXiv:1702.03275, algorithm 1; the default schedule is section 4's.

    Example:
        >>> norm = anynorm.BatchRenorm1d(1, warmup=(0, 0, 0)).train()
        >>> for _ in range(50):
        ...     _ = norm(torch.tensor([[1.0], [3.0]]))
        >>> norm(torch.tensor([[2.0], [4.0]])).detach().round(decimals=2).T  # not -1 and 1, as batch norm gives
        tensor([[0.0000, 1.4100]])
    """

    _axes: tuple[int, ...] = (2, 3)


class BatchRenorm2d(_BatchRenorm, nn.BatchNorm2d):
    """`anynorm.BatchNorm2d` moved towards evaluation's output in training, for (N, C, H, W); see `BatchRenorm1d`.

    Example:
        >>> norm = anynorm.BatchRenorm2d(3, momentum=0.01, warmup=(500, 4_000, 2_500))
        >>> norm.load_state_dict(torch.nn.BatchNorm2d(3).state_dict())
        <All keys matched successfully>
    """

    _axes: tuple[int, ...] = (4,)


class BatchRenorm3d(_BatchRenorm, nn.BatchNorm3d):
    """`anynorm.BatchNorm3d` moved towards evaluation's output in training, for (N, C, D, H, W); see `BatchRenorm1d`.

    Example:
        >>> anynorm.BatchRenorm3d(3)(torch.randn(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])
    """

    _axes: tuple[int, ...] = (5,)


for _kind, _theirs in (
    (BatchRenorm1d, nn.BatchNorm1d),
    (BatchRenorm2d, nn.BatchNorm2d),
    (BatchRenorm3d, nn.BatchNorm3d),
):
    show_options(_kind, _theirs, r_max=3.0, d_max=5.0, warmup=PAPERS_WARMUP)
