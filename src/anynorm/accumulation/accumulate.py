"""`accumulate`: forward and backward of a batch that comes in micro-batches, as if it came at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..modules.counting import count_whole_batch
from ..randomness import restore_randomness, save_randomness
from ..torch_private import not_compiled
from .checks import check_model
from .lockstep import lockstep
from .passes import MicroBatches, estimate, sweep
from .replay import SavedBuffers, SavedGradients

MODES: dict[str, Callable[[MicroBatches], None]] = {"sweep": sweep, "lockstep": lockstep, "estimate": estimate}


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


@not_compiled  # torch.compiler.disable would import the compiler, which takes seconds, with anynorm.
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
        model: in training, with every batch norm that `loss` calls; they are this library's (`accelerate` makes
            them so). Compiled code runs without its compiler meanwhile.
        batches: the micro-batches, of any sizes, at least one; whatever `loss` takes.
        loss: called as `loss(model, batch)`; returns a scalar tensor, the mean over the micro-batch's samples, or a
            pair of it and outputs to keep. It is called several times for each micro-batch and must do the same
            each time but for random numbers, which are drawn again as they were. It must not differentiate.
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
        RuntimeError: micro-batches that call norms in different order; a loss that is no scalar or differentiates;
            gradients turned off.

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
    if mode not in MODES:
        raise ValueError(f"accumulate: mode must be one of {', '.join(MODES)}; got {mode!r}; the default is sweep")
    names = check_model(model, batches)
    weights = check_weights(batches, weights)
    randomness, buffers = save_randomness(), SavedBuffers(model)
    gradients = SavedGradients(model.parameters())
    micro_batches = MicroBatches(model, batches, loss, weights, names, buffers)
    try:
        with torch.compiler.set_stance("force_eager"):  # A graph that holds norms knows nothing of other micro-batches.
            MODES[mode](micro_batches)
        if mode != "lockstep":
            buffers.write_mean()
        for call in micro_batches.calls:
            assert call.moments is not None
            count_whole_batch(call.layer, call.moments)
    except BaseException:  # An interrupt, too, leaves a model that can go on.
        gradients.restore()
        buffers.restore()
        restore_randomness(randomness)
        raise
    gradients.add()
    return Accumulated(
        micro_batches.total, micro_batches.outputs, None if mode == "lockstep" else len(micro_batches.calls)
    )


def check_weights(batches: list[Any], weights: Sequence[float] | None) -> list[float]:
    """The weight of each micro-batch's loss; refuses given ones that do not fit."""
    if weights is not None:
        weights = [float(weight) for weight in weights]
        if len(weights) != len(batches):
            raise ValueError(
                f"accumulate: weights must have one entry for each micro-batch; got {len(weights)}, micro-batches "
                f"{len(batches)}; leave them out for shares of samples"
            )
        return weights
    sizes = [find_sample_count(batch) for batch in batches]
    if None in sizes or not sum(size or 0 for size in sizes):
        raise ValueError(
            "accumulate: a micro-batch's number of samples is the first axis of its first tensor; got "
            f"{type(batches[sizes.index(None) if None in sizes else 0]).__name__} without one; pass weights="
        )
    total = sum(size or 0 for size in sizes)
    return [(size or 0) / total for size in sizes]


def find_sample_count(batch: Any) -> int | None:
    """The number of samples of a micro-batch; None where no tensor is found."""
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return next((size for size in map(find_sample_count, batch) if size is not None), None)
    return None
