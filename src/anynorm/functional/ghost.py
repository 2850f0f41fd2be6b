"""`ghost_batch_norm`: batch norm of a few samples at a time."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ..activations import check_finish
from ..engine import paths, protocol, watch
from ..engine.plain import find_memory_format
from ..engine.request import Request
from ..errors import check_batch_norm, check_channels, check_floating, check_more_than_one
from ..family import FAMILY
from ..padding import ragged
from ..padding.masks import Lengths, find_mask
from ..padding.ragged import Rows
from ..pooling import Pooling, find_pooling
from ..sources import Batch
from .batch import BATCH_NORM, BatchFront, name_averages
from .front import find_source

ONE_IN_A_GHOST = "use a larger ghost_size, or call eval()"


class GhostFront(BatchFront):
    """With the source `Batch`, in ghosts of `sizes` samples; with any other it is batch norm."""

    def normalize(self, x: Any, weight: Any, bias: Any, residual: Any, request: Request) -> Any:
        size = request.sizes
        check_ghost_size(self.function, size)
        if ragged.is_ragged(x):
            check_not_ragged(request)
            return BATCH_NORM.normalize(x, weight, bias, residual, request._replace(sizes=None))
        found = self.hand_over(x, weight, bias, residual, request)
        if found is not None:
            return found
        activation = check_finish(self.function, x, request.activation, residual)
        request = request._replace(activation=activation)
        if type(request.source) is not Batch or x.dim() < 2 or len(x) <= size:
            return BATCH_NORM.normalize(x, weight, bias, residual, request._replace(sizes=None))
        mask = find_mask(self.function, x, (1,), request.mask, request.lengths)
        request = request._replace(mask=mask, lengths=None)
        full, rest = cut(x.shape, size, mask)
        if (full, rest) == (1, 0):
            whole = request._replace(mask=None if mask is None else mask.squeeze(1), sizes=None)
            return BATCH_NORM.normalize(x, weight, bias, residual, whole)
        self.check(x, weight, bias, request)
        if rest and x.dtype in (torch.bfloat16, torch.float16):  # Two gradients are added, and rounded once.
            weight, bias = (None if t is None else t.to(torch.float32) for t in (weight, bias))
        return self.normalize_ghosts(x, weight, bias, residual, request, (full, rest))

    def hand_over(self, x: Any, weight: Any, bias: Any, residual: Any, request: Request) -> Any:
        _, _, activation, mask, lengths, ghost_size = request
        options = {"activation": activation, "residual": residual, "mask": mask, "lengths": lengths}
        _, arguments = self.write_call(x, weight, bias, request)
        return protocol.hand_over(ghost_batch_norm, arguments, options | {"ghost_size": ghost_size})

    def check(self, x: Any, weight: Any, bias: Any, request: Request) -> None:
        averages, mask, size = name_averages(request), request.mask, request.sizes
        check_floating(self.function, x)
        check_batch_norm(x, True, request.eps, **averages)
        check_channels(self.function, x.shape[1], weight=weight, bias=bias, **averages)
        if mask is None:
            check_more_than_one(self.function, size * prod(x.shape[2:]), "channel of a ghost", x, ONE_IN_A_GHOST)
        elif watch.has_memory(real := count_real(mask, size)):
            check_real(real, x)

    def normalize_ghosts(
        self, x: Any, weight: Any, bias: Any, residual: Any, request: Request, ghosts: tuple[int, int]
    ) -> Tensor:
        """All full ghosts in one call, and a last one of another size in another."""
        full, rest = ghosts
        source, mask, end = request.source, request.mask, len(x) - rest
        first: list[Any]
        last: list[Any]
        first, last = (
            ([None if t is None else t[part] for t in (x, residual, mask)])
            for part in (slice(None, end), slice(end, None))
        )
        how = request._replace(mask=first[2])
        y = self.normalize_alike(first[0], weight, bias, first[1], how, full)
        if not rest:
            return y
        momentum = source.momentum
        if isinstance(momentum, Tensor):
            counted = full if mask is None else (count_real(mask, request.sizes)[:full] > 0).sum()
            momentum = momentum / (1 + counted * momentum)
        how = request._replace(mask=last[2], source=source._replace(momentum=momentum))
        return torch.cat([y, self.normalize_alike(last[0], weight, bias, last[1], how, 1)])

    def normalize_alike(self, x: Any, weight: Any, bias: Any, residual: Any, request: Request, ghosts: int) -> Tensor:
        """Ghosts of equal sizes."""
        mask, positions = request.mask, x.shape[2:]
        if ghosts == 1:
            return self.normalize_pooled(x, weight, bias, residual, request, FAMILY["batch"].pool(x))
        is_last = x.dim() > 3 and x.stride(1) < min(x.stride()[2:]) if mask is not None else False
        # One position that may be padded is gathered.
        has_none = prod(positions) == 1 and (mask is None or x.dim() == 2 or is_last)
        if has_none or find_memory_format(x) != torch.contiguous_format:
            pooling = self.scheme.pool(x, (("m", len(x) // ghosts),))
            return self.normalize_pooled(x, weight, bias, residual, request, pooling)

        def gather(t: Tensor) -> Tensor:  # The kernels walk no axis of channels between two that are pooled.
            y: Tensor = t.unflatten(0, (ghosts, -1)).transpose(1, 2).flatten(2)
            return y

        pooling = find_pooling("b c s -> b c", "c", True, 3, (), "b")
        x, residual, mask = (None if t is None else gather(t) for t in (x, residual, mask))
        y = self.normalize_pooled(x, weight, bias, residual, request._replace(mask=mask), pooling)
        result: Tensor = y.unflatten(2, (-1, *positions)).transpose(1, 2).flatten(0, 1)
        return result

    def normalize_pooled(
        self, x: Any, weight: Any, bias: Any, residual: Any, request: Request, pooling: Pooling
    ) -> Tensor:
        """By the engine, with the last checks."""
        self.check_memory(x, weight, bias, request)
        return paths.normalize(x, weight, bias, residual, request, pooling)


GHOST: BatchFront = GhostFront("ghost_batch_norm", "ghost")


def ghost_batch_norm(
    input: Rows,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    ghost_size: int,
    activation: str | None = None,
    residual: Rows | None = None,
    mask: Tensor | None = None,
    lengths: Lengths | None = None,
) -> Rows:
    """Batch norm of each `ghost_size` samples by themselves, in one call; in evaluation `batch_norm`.

    y[b,m,c,s] = (x[b,m,c,s] - mean[b,c]) / sqrt(var[b,c] + eps) * weight[c] + bias[c]

    Samples 0 .. ghost_size - 1 are the first ghost batch, and so on; the last one holds what is left. Where that is one
    value per channel, it joins the ghost before.

    Args:
        input: (N, C) or (N, C, *), floating point.
        running_mean, running_var, weight, bias, training, eps: as for `batch_norm`.
        momentum: weight of the new value; each ghost moves the averages in its turn, as calls of `batch_norm` on one
            ghost after the other would. A tensor is the weight in a cumulative average, for the first ghost.
        ghost_size: samples in a ghost.
        activation, residual, mask, lengths: as for `batch_norm`. A ghost of which nothing is real moves nothing.

    Returns:
        Shape and dtype of input; channels_last where input is.

    Raises:
        ValueError: one value per channel in a ghost, in training; a ghost_size of less than 1; ragged input.
        RuntimeError: sizes or dtypes that do not fit.

    Note:
        All full ghosts are one call of the kernels and a shorter last one is another. An input of positions that is not
        channels_last is copied for it, forward and backward.

    Source:
        Hoffer, Hubara and Soudry 2017, arXiv:1705.08741, algorithm 1.

    Example:
        >>> x = torch.tensor([[1.0], [3.0], [10.0], [30.0]])
        >>> ghost_batch_norm(x, None, None, training=True, eps=1e-12, ghost_size=2).T
        tensor([[-1.,  1., -1.,  1.]])
    """
    source = find_source(running_mean, running_var, training, momentum)
    y: Rows = GHOST.normalize(
        input, weight, bias, residual, Request(source, eps, activation, mask, lengths, ghost_size)
    )
    return y


def check_not_ragged(request: Request) -> None:
    """Refuse ghosts of what has no axis of samples."""
    if type(request.source) is Batch:
        raise ValueError(
            "ghost_batch_norm: ghosts are cut from an axis of samples; got a jagged or packed input; pad it and pass "
            "lengths"
        )


def check_ghost_size(function: str, ghost_size: Any) -> None:
    if isinstance(ghost_size, bool) or not isinstance(ghost_size, int) or ghost_size < 1:
        raise ValueError(
            f"{function}: ghost_size must be a whole number of 1 or more; got {ghost_size!r}; pass how many samples "
            "share statistics, for example 32"
        )


def check_real(real: Tensor, input: Tensor) -> None:
    """The same for real positions; a ghost without any is fine."""
    if bool((real == 1).any()):
        raise ValueError(
            "ghost_batch_norm: statistics need more than 1 real position in a ghost, or every output is beta; got 1 "
            f"in ghost {int((real == 1).int().argmax())} of an input {tuple(input.shape)}; use a larger ghost_size, or "
            "build the norm with on_single='running'"
        )


def cut(shape: Any, ghost_size: int, mask: Tensor | None = None) -> tuple[int, int]:
    """How many full ghosts there are, and the samples of a last one of another size; `mask` as `find_mask` makes it."""
    full, rest = shape[0] // ghost_size, shape[0] % ghost_size  # no divmod: torch.export's sizes have none
    is_known = mask is not None and watch.has_memory(mask)
    values = int(mask[full * ghost_size :].sum()) if is_known else rest * prod(shape[2:])  # type: ignore[index] # a known mask is there
    if full and rest and values == 1:  # It joins the ghost before.
        full, rest = full - 1, ghost_size + 1
    return (1, 0) if full == 0 else (full, rest)


def count_real(mask: Tensor, ghost_size: int) -> Tensor:
    """Real positions of each ghost, (ghosts,); `mask` as `find_mask` makes it."""
    full, rest = cut(mask.shape, ghost_size, mask)
    end = len(mask) - rest
    counts = mask[:end].reshape(full, -1).sum(1)
    return torch.cat([counts, mask[end:].sum().view(1)]) if rest else counts
