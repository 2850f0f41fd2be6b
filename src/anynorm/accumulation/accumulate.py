"""`accumulate`: forward and backward of a batch that comes in micro-batches, as if it came at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence

from ..modules import batch
from ..modules.counting import count_parts
from ..modules.pattern import AnyNorm
from ..modules.recurrent_norms import _BatchRows
from ..pooling import parse
from .lockstep import lockstep
from .passes import Parts, estimate, sweep
from .replay import Buffers, Gradients, restore_randomness, save_randomness

MODES: dict[str, Callable[[Parts], None]] = {"sweep": sweep, "lockstep": lockstep, "estimate": estimate}


@dataclass(frozen=True)
class Accumulated:
    """What `accumulate` found.

    Attributes:
        loss: scalar, without a graph: the weighted sum of the micro-batches' losses.
        outputs: what came with the losses, one for each micro-batch; None where nothing came.
        calls: how many calls of batch norms a forward has; None in mode "lockstep", which does not count them.
    """

    loss: Tensor
    outputs: list[Any] = field(repr=False)
    calls: int | None


def accumulate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Any],
    *,
    mode: str = "sweep",
    weights: Sequence[float] | None = None,
) -> Accumulated:
    """Accumulate gradients over micro-batches, with batch norms that see all of them as one batch.

    loss = sum over i of weights[i] * loss(model, batches[i]),  every batch norm's mean and var over all micro-batches

    Outputs, gradients and running averages are those of the one large batch (lightning#17446): gradients are added to
    `.grad`, running averages move once. The place of the loop over `loss.backward()` in a training step.

    Args:
        model: in training; batch norms are this library's (`accelerate` makes them so).
        batches: the micro-batches, of any sizes, at least one; whatever `loss` takes.
        loss: called as `loss(model, batch)`; returns a scalar tensor, the mean over the micro-batch's samples, or a
            pair of it and outputs to keep. It is called several times for each micro-batch and must do the same
            each time but for random numbers, which are drawn again as they were.
        mode: "sweep", exact, with the memory of one micro-batch; its time grows with the number of norms.
            "lockstep", exact, one forward and one backward, with the memory of the large batch.
            "estimate", not exact, the memory of one micro-batch and one forward more than plain accumulation.
        weights: of each micro-batch's loss. As default its share of the samples, so that means over micro-batches make
            the mean over all; the number of samples is the first axis of the first tensor in it.

    Returns:
        The loss, and outputs where `loss` gives them.

    Raises:
        ValueError: an unknown mode, no micro-batch, weights that do not fit, norms that cannot take part (they are
            named), one value per channel in all micro-batches together.
        RuntimeError: micro-batches that call norms in different order; a loss that is no scalar; gradients turned off.

    Note:
        If anything raises, gradients of the model's parameters, buffers and random numbers are as before. Over ranks
        with SyncBatchNorm moments and sums are merged over micro-batches, then over ranks; every rank may have another
        number of micro-batches. Gradients are then this rank's share, to be summed over ranks. What is differentiated
        is the sum over ranks of their losses.

    Source:
        Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1; merged after Chan, Golub and LeVeque 1979.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), anynorm.BatchNorm1d(4), torch.nn.Linear(4, 1))
        >>> batches = torch.randn(8, 3).split(2)
        >>> result = anynorm.accumulate(model, batches, lambda model, x: model(x).square().mean())
        >>> model[1].num_batches_tracked, model[0].weight.grad.shape
        (tensor(1), torch.Size([4, 3]))
    """
    batches = list(batches)
    names = check(model, batches, mode)
    weights = find_weights(batches, weights)
    randomness, buffers = save_randomness(), Buffers(model)
    gradients = Gradients(model.parameters())
    parts = Parts(model, batches, loss, weights, names, buffers)
    try:
        MODES[mode](parts)
        if mode != "lockstep":
            buffers.finish()
        for call in parts.calls:
            assert call.moments is not None
            count_parts(call.layer, call.moments)
    except BaseException:
        gradients.restore()
        buffers.rewind()
        restore_randomness(randomness)
        raise
    gradients.add()
    return Accumulated(parts.total, parts.outputs, None if mode == "lockstep" else len(parts.calls))


def check(model: nn.Module, batches: list[Any], mode: str) -> dict[Any, str]:
    """Refuse what cannot be done; the names of the batch norms."""
    if mode not in MODES:
        raise ValueError(f"accumulate: mode must be one of {', '.join(MODES)}; got {mode!r}; the default is sweep")
    if not batches:
        raise ValueError("accumulate: one or more micro-batches are needed; got none; skip the step")
    if not torch.is_grad_enabled():
        raise RuntimeError("accumulate: it computes gradients; got torch.no_grad(); call it outside")
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "accumulate: it runs forward several times and sums no gradients over ranks; got DistributedDataParallel; "
            "pass model.module, then all_reduce the gradients"
        )
    names: dict[Any, str] = {}
    for name, module in model.named_modules():
        reason = find_reason(module)
        if reason:
            raise ValueError(
                f"accumulate: {name or 'the model'} cannot take part; got {type(module).__name__}; {reason}"
            )
        if isinstance(module, batch._BatchNorm):
            names[module] = name or "the model"
    return names


def find_reason(module: Any) -> str:
    """Why a module would be wrong in silence, and what helps."""
    if isinstance(module, torch._dynamo.OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None:
        return "a compiled graph holds its norms; pass the model before torch.compile"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc] # torch annotates self
        return "it has not seen an input; run one batch first"
    from_batch = module.training or getattr(module, "running_mean", None) is None
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, batch._BatchNorm) and from_batch:
        return "its statistics are out of reach; call anynorm.accelerate(model) first"
    if isinstance(module, batch._BatchNorm) and module.training and not is_plain(module):
        return "it pools or corrects in its own way; accumulate anynorm.BatchNorm1d/2d/3d, or call it batch by batch"
    if isinstance(module, _BatchRows) and module.training:
        return "batch norm inside a recurrence takes its statistics step by step; choose norm='layer'"
    if isinstance(module, AnyNorm) and from_batch and pools_samples(module):
        return "its statistics are its own; use anynorm.BatchNorm1d/2d/3d where the pattern is theirs"
    return ""


def is_plain(norm: batch._BatchNorm) -> bool:
    """Whether it is batch norm in training, too; ghost batch norm and batch renormalization are not."""
    return type(norm)._compute is batch._BatchNorm._compute


def pools_samples(norm: AnyNorm) -> bool:
    """Whether the first axis is among those that share statistics."""
    left, right = parse(norm.pattern)
    return any(name not in right for name in left[0])


def find_weights(batches: list[Any], weights: Sequence[float] | None) -> list[float]:
    """The weight of each micro-batch's loss."""
    if weights is not None:
        weights = [float(weight) for weight in weights]
        if len(weights) != len(batches):
            raise ValueError(
                f"accumulate: weights must have one entry for each micro-batch; got {len(weights)}, micro-batches "
                f"{len(batches)}; leave them out for shares of samples"
            )
        return weights
    sizes = [find_size(given) for given in batches]
    if None in sizes or not sum(size or 0 for size in sizes):
        raise ValueError(
            "accumulate: a micro-batch's number of samples is the first axis of its first tensor; got "
            f"{type(batches[sizes.index(None) if None in sizes else 0]).__name__} without one; pass weights="
        )
    total = sum(size or 0 for size in sizes)
    return [(size or 0) / total for size in sizes]


def find_size(given: Any) -> int | None:
    """The number of samples of a micro-batch; None where no tensor is found."""
    if isinstance(given, PackedSequence):
        return int(given.batch_sizes[0])
    if isinstance(given, Tensor):
        return given.shape[0] if given.dim() else None
    if isinstance(given, Mapping):
        given = list(given.values())
    if isinstance(given, list | tuple):
        return next((size for size in map(find_size, given) if size is not None), None)
    return None
