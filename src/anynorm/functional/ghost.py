"""What is asked of `ghost_batch_norm`: batch norm of a few samples at a time."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ..activations import check_finish
from ..engine import protocol, watch
from ..engine.plain import find_memory_format
from ..errors import check_batch_norm, check_channels, check_floating, check_more_than_one
from ..family import FAMILY
from ..padding import ragged
from ..padding.masks import find_mask
from ..pooling import find_pooling
from .batch import batch_norm, normalize_with_running

ONE_IN_A_GHOST = "use a larger ghost_size, or call eval()"


def ghost_batch_norm(
    input: Tensor,
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
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Any = None,
) -> Tensor:
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
    check_ghost_size("ghost_batch_norm", ghost_size)
    options: Any = {"activation": activation, "residual": residual, "mask": mask, "lengths": lengths}
    if not ragged.is_ragged(input):
        given = (input, running_mean, running_var, weight, bias, training, momentum, eps)
        handed = protocol.hand_over(ghost_batch_norm, given, options | {"ghost_size": ghost_size})
        if handed is not None:
            return handed
        activation = check_finish("ghost_batch_norm", input, activation, residual)
    options["activation"] = activation
    if training and ragged.is_ragged(input):
        raise ValueError(
            "ghost_batch_norm: ghosts are cut from an axis of samples; got a jagged or packed input; pad it and pass "
            "lengths"
        )
    whole = not training or input.dim() < 2 or len(input) <= ghost_size
    if not whole:
        mask = options["mask"] = find_mask("ghost_batch_norm", input, (1,), mask, lengths)
        options["lengths"] = None
    if whole or (ghosts := cut(input.shape, ghost_size, mask)) == (1, 0):
        if not whole and mask is not None:
            options["mask"] = mask.squeeze(1)
        return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, **options)
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_ghosts(input, ghost_size, eps, mask is None, named)
    real = None if mask is None else count_real(mask, ghost_size)
    if real is not None and watch.has_memory(real):
        check_real(real, input)
    full, rest = ghosts
    if rest and input.dtype in (torch.bfloat16, torch.float16):  # Two gradients are added, and rounded once.
        weight, bias = (None if t is None else t.to(torch.float32) for t in (weight, bias))
    how = (running_mean, running_var), weight, bias, eps, activation
    end = len(input) - rest
    parts = [None if t is None else t[:end] for t in (input, residual, mask)]
    y = normalize_ghosts(parts, full, momentum, *how)
    if not rest:
        return y
    if isinstance(momentum, Tensor):
        counted = full if real is None else (real[:full] > 0).sum()
        momentum = momentum / (1 + counted * momentum)
    parts = [None if t is None else t[end:] for t in (input, residual, mask)]
    return torch.cat([y, normalize_ghosts(parts, 1, momentum, *how)])


def check_ghost_size(function: str, ghost_size: Any) -> None:
    if isinstance(ghost_size, bool) or not isinstance(ghost_size, int) or ghost_size < 1:
        raise ValueError(
            f"{function}: ghost_size must be a whole number of 1 or more; got {ghost_size!r}; pass how many samples "
            "share statistics, for example 32"
        )


def check_ghosts(input: Tensor, ghost_size: int, eps: float, all_real: bool, named: dict[str, Tensor | None]) -> None:
    """What batch norm checks, and where all is real that a ghost has more than one value per channel."""
    check_floating("ghost_batch_norm", input)
    check_batch_norm(input, True, eps, running_mean=named["running_mean"], running_var=named["running_var"])
    check_channels("ghost_batch_norm", input.shape[1], **named)
    values = ghost_size * prod(input.shape[2:])
    if all_real:
        check_more_than_one("ghost_batch_norm", values, "channel of a ghost", input, ONE_IN_A_GHOST)


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
    values = int(mask[full * ghost_size :].sum()) if is_known else rest * prod(shape[2:])  # type: ignore[index]
    if full and rest and values == 1:  # It joins the ghost before.
        full, rest = full - 1, ghost_size + 1
    return (1, 0) if full == 0 else (full, rest)


def count_real(mask: Tensor, ghost_size: int) -> Tensor:
    """Real positions of each ghost, (ghosts,); `mask` as `find_mask` makes it."""
    full, rest = cut(mask.shape, ghost_size, mask)
    end = len(mask) - rest
    counts = mask[:end].reshape(full, -1).sum(1)
    return torch.cat([counts, mask[end:].sum().view(1)]) if rest else counts


def normalize_ghosts(
    parts: list[Any],
    ghosts: int,
    momentum: float | Tensor,
    running: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    """Ghosts of equal sizes: input, residual and mask are `parts`."""
    x, residual, mask = parts
    how = running, weight, bias, True, momentum, eps, activation
    if ghosts == 1:
        return normalize_with_running("ghost_batch_norm", x, FAMILY["batch"].pool(x), *how, residual, mask)
    positions = x.shape[2:]
    is_last = x.dim() > 3 and x.stride(1) < min(x.stride()[2:]) if mask is not None else False
    has_none = prod(positions) == 1 and (mask is None or x.dim() == 2 or is_last)  # One that may be padded is gathered.
    if has_none or find_memory_format(x) != torch.contiguous_format:
        pooling = FAMILY["ghost"].pool(x, (("m", len(x) // ghosts),))
        return normalize_with_running("ghost_batch_norm", x, pooling, *how, residual, mask)

    def gather(t: Tensor) -> Tensor:  # The kernels walk no axis of channels between two that are pooled.
        return t.unflatten(0, (ghosts, -1)).transpose(1, 2).flatten(2)

    pooling = find_pooling("b c s -> b c", "c", True, 3, (), "b")
    x, residual, mask = gather(x), *(None if t is None else gather(t) for t in (residual, mask))
    y = normalize_with_running("ghost_batch_norm", x, pooling, *how, residual, mask)
    return y.unflatten(2, (-1, *positions)).transpose(1, 2).flatten(0, 1)
