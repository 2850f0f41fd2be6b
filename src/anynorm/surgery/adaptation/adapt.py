"""`adapt`: a trained model on data from elsewhere, by the statistics of those data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf
from typing import Any, Literal, overload

import torch
import torch.nn as nn

from ...errors import UserError
from ..operation import check_model
from .adaptation import Adaptation, Recalibrated
from .tent import Tent

METHODS = ("batch", "adabn", "tent")


@overload
def adapt(
    model: nn.Module,
    method: Literal["batch"] = ...,
    *,
    prior: float = ...,
    trust: tuple[type[nn.Module], ...] = ...,
) -> Adaptation: ...
@overload
def adapt(
    model: nn.Module, method: Literal["adabn"], *, loader: Iterable[Any], trust: tuple[type[nn.Module], ...] = ...
) -> Adaptation: ...
@overload
def adapt(
    model: nn.Module,
    method: Literal["tent"],
    *,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = ...,
    trust: tuple[type[nn.Module], ...] = ...,
) -> Tent: ...
def adapt(
    model: nn.Module,
    method: str = "batch",
    *,
    prior: float = 0,
    loader: Iterable[Any] | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    trust: tuple[type[nn.Module], ...] = (),
) -> Any:
    """Adapt the batch norms of a trained model to test data that are unlike the training data, without labels.

    In the context the batch norms take other statistics than their running averages; when it is left, also by an
    exception, the model is exactly as before:

        with anynorm.adapt(model):                             each test batch's own
        with anynorm.adapt(model, prior=16):                   these, blended with the running averages
        with anynorm.adapt(model, "adabn", loader=target):     those of all data that the loader gives
        tent = anynorm.adapt(model, "tent"); y = tent(x)       each batch's own, and gamma and beta learn

    mean = N / (N + n) * running mean + n / (N + n) * batch mean, and var alike, for a batch of n samples and prior N

    Shifted data of all classes gain; data that come sorted by class, or a few at a time, lose, often badly: the
    statistics then say what the samples are of, and that is taken away. Such batches are warned of.

    Args:
        model: any module, usually in evaluation: modes are left alone. torch's batch norms are ours meanwhile. TENT
            calls what DistributedDataParallel or torch.compile wraps without them, and steps on each rank by itself.
        method: ``"batch"``: statistics of each test batch, of the positions that a mask says are real. ``"adabn"``:
            `anynorm.recalibrate` on the loader, undone in the end; call `recalibrate` itself to keep it. ``"tent"``:
            statistics of each batch, and a step on gamma and beta that lowers the entropy of the predictions.
        prior: N, the number of samples that the running averages count for; 0 for the batch alone.
        loader: for AdaBN, batches of target data, as `recalibrate` takes them.
        optimizer: for TENT, makes an optimizer of a list of parameters; None for Adam with a rate of 1e-3.
        trust: as for `recalibrate`.

    Returns:
        A context, with a `report` of the norms that are adapted, and of those that are left and why. It may be entered
        again. Statistics of batches are this thread's and asynchronous task's own: other threads that call the model
        meanwhile get its running averages. AdaBN changes those for all threads, TENT gamma and beta.

        For TENT it is an object to call in place of the model: a call returns the predictions, without gradient, and
        then takes the step. ``reset()`` gives gamma and beta back as they were, as the end of a ``with`` does; without
        either they stay as they have become.

    Raises:
        TypeError: `model` is not a module.
        UserError: no batch norm with running averages; arguments that belong to another method; a lazy norm; and, at a
            call of the model, a norm that gets one value per channel.

    Warns:
        UserWarning: of batch norms that are left. Once, when the model itself is called, of a batch whose statistics
            are noisier than the shift that they mend; and once of a batch nearly all of which is predicted to be of one
            class, with adaptation or without. The latter takes another forward, of the batches number 1, 2, 4, 8, ...

    Note:
        The batch's variance is the population's, as in training, while a running variance has n/(n-1). The blend is
        the paper's, of variances, and not the variance of both sets together. Without a prior gradient flows through
        the statistics of the batch, with one they are constants. Code from torch.compile runs eagerly inside.
        SyncBatchNorm takes the batch of its own rank.

    Source:
        Li et al. 2016, arXiv:1603.04779 (AdaBN); Nado et al. 2020, arXiv:2006.10963 (test batches); Schneider et al.
        2020, arXiv:2006.16971 (prior); Wang et al. 2021, arXiv:2006.10726 (TENT).

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1)).eval()
        >>> with anynorm.adapt(model, prior=2):
        ...     model(torch.tensor([[10.0], [14.0]])).detach().T  # mean 0 and 12, variance 1 and 4
        tensor([[2.5298, 5.0596]])
    """
    check_model("adapt", model)
    check_arguments(method, prior, loader, optimizer)
    if method == "tent":
        return Tent(model, optimizer, trust)
    if loader is not None:
        return Recalibrated(model, loader, trust)
    return Adaptation(model, prior, trust)


def check_arguments(method: str, prior: Any, loader: Any, optimizer: Any) -> None:
    """Refuse what does not fit the method."""
    if method not in METHODS:
        raise UserError(f"adapt: method must be one of {', '.join(METHODS)}; got {method!r}; the default is batch")
    if isinstance(prior, bool) or not 0 <= prior < inf:
        raise UserError(f"adapt: prior must be a number of 0 or more; got {prior!r}; 16 is usual")
    if method == "adabn" and loader is None:
        raise UserError("adapt: adabn takes its statistics from data; got no loader; pass loader=target_loader")
    for name, value, home in (("prior", prior, "batch"), ("loader", loader, "adabn"), ("optimizer", optimizer, "tent")):
        if value not in (None, 0) and method != home:
            raise UserError(f"adapt: {name} belongs to the method {home}; got method={method!r}; leave {name} out")
