"""`recalibrate`: population statistics of every batch norm of a model, exactly."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil, inf, sqrt
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from ..report import Entry, describe
from .data import Feed, unwrap, wants_progress
from .norms import NOT_CALLED, MomentRecorder, find_norms, keeping, part_ranks, put
from .report import Recalibration, find_distance, find_error, make_moved_entry
from .statistics import Peers, Population, merge_groups

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

EARLIER = ("batch", "population")
SETTLED = 1e-6  # of std, and of the variance: no pass more where the last one moved nothing further
LEAST = 8  # batches before the spread between them is trusted to end a pass


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    earlier: str = "batch",
    batches: int | None = None,
    rtol: float | None = None,
    process_group: ProcessGroup | None = None,
    progress: bool | None = None,
    trust: tuple[type[nn.Module], ...] = (),
) -> Recalibration:
    """Replace the running averages of every batch norm by the statistics of all the data a loader gives.

    mean = sum of x / n,  var = sum of (x - mean)^2 / (n - 1),  over all n values of a channel in all batches

    Nothing is averaged over batches: moments are merged, so a short batch counts for what it holds, and masks, lengths
    and `anynorm.masked` are honoured. A norm that is called several times pools its calls.

    Args:
        model: any module; what DistributedDataParallel, DataParallel or torch.compile wraps is called without them.
        loader: its batches; a tuple's or list's first element, a dict as keyword arguments, and anything else as it
            is go to the model, moved to its device.
        forward_fn: called as ``forward_fn(model, batch)`` instead.
        earlier: what the norms before a norm do meanwhile. ``"batch"``: they normalize by their batch, as in training;
            one pass. ``"population"``: they normalize by their new statistics, as they will in evaluation; passes until
            one moves nothing by more than 1e-6, at most one more than norms follow one another.
        batches: the most to take from the loader, in each pass and on each rank.
        rtol: end a pass where the estimated standard error of every layer, of its mean in std and of its variance
            relative to it, is at most this; not before 8 batches. Of W ranks, each waits for rtol * sqrt(W) of its own.
        process_group: the ranks whose statistics are merged; None for all, where there are any.
        progress: a bar in the terminal; None shows it where there is a terminal.
        trust: further classes whose forward normalizes its first argument as it comes, for example a subclass of
            torch's batch norm that applies an activation.

    Returns:
        A report, with a line for each norm when printed: how far it moved, from how many values, and the estimated
        error; and what else keeps running averages and was left, with the reason.

    Raises:
        TypeError: `model` is not a module, or `loader` cannot be iterated.
        ValueError: no batch norm; an empty loader; one value per channel; an iterator with ``"population"``.
        FloatingPointError: NaN or Inf in the input of a norm, which is named.
        SyncError: another rank has failed, or does not come to the end of a pass within the timeout of the group.
        Whatever is raised, also by the loader or the keyboard: averages, modes, hooks and counters are as before.

    Note:
        running_var gets n/(n-1) of all values, as torch stores it, and num_batches_tracked the number of batches, over
        all ranks, that the statistics are of. Modes are the caller's: call ``model.eval()`` first to have no dropout.
        torch's random numbers are afterwards as before. SyncBatchNorm normalizes by the batch of its rank meanwhile,
        and BatchRenorm without r and d, which are of the averages that are replaced.

    Source:
        Wu and Johnson 2021, arXiv:2105.07576, section 3; Izmailov et al. 2018, arXiv:1803.05407, section 3.2; merged
        after Chan, Golub and LeVeque 1979.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> report = anynorm.recalibrate(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[8.0], [8.0], [0.0]])])
        >>> model[0].running_mean, model[0].running_var, report.moved[0].count
        (tensor([4.]), tensor([14.5000]), 5)
    """
    peers = Peers(process_group)
    with ExitStack() as stack:
        with peers.sharing_failure():
            check_arguments(model, loader, earlier, batches, rtol)
            inside = unwrap(model)
            norms, left = find_norms(inside, trust)
            check_usable(norms, left, loader, earlier)
            feed = Feed(inside, loader, forward_fn, wants_progress(progress, peers.rank))
            recorder = MomentRecorder(norms, by_batch=earlier == "batch")
            stack.enter_context(feed.progress)
            stack.enter_context(keeping(inside))
            stack.callback(recorder.detach)
            recorder.attach()
            part_ranks(inside)
        estimate = find_populations(feed, recorder, peers, batches, rtol)
    found = estimate.found
    left += [Entry(name, describe(type(norm)), reason=NOT_CALLED) for name, norm in norms.items() if name not in found]
    moved = [make_moved_entry(name, norms[name], population) for name, population in found.items()]
    write(norms, found)
    return Recalibration(
        left=left,
        model=model,
        moved=moved,
        earlier=earlier,
        batches=estimate.batches,
        passes=estimate.passes,
        unsettled=estimate.unsettled,
    )


@dataclass(frozen=True)
class Estimate:
    """What the passes found, by name, and what they took."""

    found: dict[str, Population]
    batches: int
    passes: int
    unsettled: float


def find_populations(
    feed: Feed, recorder: MomentRecorder, peers: Peers, limit: int | None, rtol: float | None
) -> Estimate:
    """One pass, or passes until nothing moves.

    Pass k gives norms with k - 1 others before them their final statistics, for those before them had theirs. The
    passes are all over the same number of batches.
    """
    norms, known, unsettled, taken = recorder.norms, dict[str, Population](), inf, 0
    most = 1 if recorder.by_batch else len(norms) + 1
    for number in range(1, most + 1):
        with peers.sharing_failure():
            recorder.begin(follows=not recorder.by_batch and number == 1)
            before, taken = taken, run_pass(feed, recorder, peers, f"pass {number}", limit, rtol)
            check_taken(number, before, taken)
        found = peers.merge(recorder.tallies)
        check_found(found, recorder, taken)
        if recorder.by_batch:
            return Estimate(found, taken, 1, 0.0)
        unsettled = max(find_distance(known.get(name), new, norms[name].eps) for name, new in found.items())
        known, limit, rtol = found, taken, None
        if unsettled <= SETTLED:
            return Estimate(found, taken, number, unsettled)
        for name, population in found.items():
            put(norms[name], population.mean, population.var)
    warnings.warn(
        f"recalibrate: the last of {most} passes still moved a statistic by {unsettled:.1e}; the loader gives other "
        "data in every pass, dropout is active, or a norm is called behind itself",
        stacklevel=3,
    )
    return Estimate(known, taken, most, unsettled)


def run_pass(
    feed: Feed, recorder: MomentRecorder, peers: Peers, title: str, limit: int | None, rtol: float | None
) -> int:
    """Feed batches up to the loader's end, the limit or the precision asked for; how many it were."""
    taken, look = 0, LEAST
    with feed.apart():
        for taken in feed.run(title, limit):
            recorder.end_batch()
            if rtol is not None and taken >= look:
                if max(find_errors(recorder), default=0.0) <= rtol * sqrt(peers.world):
                    break
                look = ceil(1.25 * taken)
    return taken


def find_errors(recorder: MomentRecorder) -> Iterator[float]:
    """Each layer's, of what this rank has recorded."""
    for tally in recorder.tallies.values():
        found = merge_groups(tally.groups, tally.batches)
        if found is not None:
            yield find_error(found)


def write(norms: dict[str, Any], found: dict[str, Population]) -> None:
    """Change the averages and counters of all norms, or of none."""
    values: list[tuple[Tensor, Any]] = []
    for name, population in found.items():
        norm = norms[name]
        values += [(norm.running_mean, population.mean), (norm.running_var, population.var)]
        if norm.num_batches_tracked is not None:
            values.append((norm.num_batches_tracked, torch.tensor(population.batches, dtype=torch.long, device="cpu")))
        if hasattr(norm, "start_share"):  # of batch renormalization: nothing is left of mean 0 and variance 1
            values.append((norm.start_share, torch.zeros((), dtype=torch.float64, device="cpu")))
    before = [(t, t.detach().clone()) for t, _ in values]
    with torch.no_grad():
        try:
            for t, value in values:
                t.copy_(value)
        except BaseException:
            for t, value in before:
                t.copy_(value)
            raise


def check_arguments(model: Any, loader: Any, earlier: Any, batches: Any, rtol: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"recalibrate: model must be a torch.nn.Module; got {type(model).__name__}; pass the model itself"
        )
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(
            f"recalibrate: loader must give batches one by one; got {type(loader).__name__}; pass a DataLoader, or a "
            "list of batches"
        )
    if earlier not in EARLIER:
        raise ValueError(
            f"recalibrate: earlier must be one of {', '.join(EARLIER)}; got {earlier!r}; the default is batch"
        )
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise ValueError(f"recalibrate: batches must be a whole number of 1 or more; got {batches!r}; None takes all")
    if rtol is not None and not 0 < rtol < inf:
        raise ValueError(f"recalibrate: rtol must be positive; got {rtol!r}; None takes all batches")


def check_usable(norms: dict[str, Any], left: list[Entry], loader: Any, earlier: str) -> None:
    if not norms:
        reasons = "; ".join(f"{entry.name or 'the model'} was left: {entry.reason}" for entry in left[:1])
        raise ValueError(
            f"recalibrate: the model must have a batch norm with running averages; got none"
            f"{f' ({reasons})' if reasons else ''}; other norms need no recalibration"
        )
    if earlier == "population" and isinstance(loader, Iterator):
        raise ValueError(
            f"recalibrate: earlier='population' goes over the data more than once; got {type(loader).__name__}, an "
            "iterator that gives it once; pass a DataLoader or a list, or earlier='batch'"
        )


def check_taken(number: int, before: int, taken: int) -> None:
    if number > 1 and taken < before:
        raise ValueError(
            f"recalibrate: every pass must find as much data as the first; got {taken} batches in pass {number}, "
            f"{before} in the one before; pass a loader that begins anew each time; nothing was changed"
        )


def check_found(found: dict[str, Population], recorder: MomentRecorder, taken: int) -> None:
    """Whether this can be stored; all ranks find the same."""
    if not found:
        raise ValueError(
            f"recalibrate: the loader must give at least 1 batch that reaches a batch norm; got {taken} batches; is "
            "the loader empty, or an iterator that is exhausted? nothing was changed"
        )
    for name, population in found.items():
        named = f"{name or 'the model'} ({type(recorder.norms[name]).__name__})"
        if population.count == 1:
            raise ValueError(
                f"recalibrate: statistics need more than 1 value per channel; got 1 in {named}; give more data; "
                "nothing was changed"
            )
        dtype = recorder.averages[name].dtype
        if not all(t.to(dtype).isfinite().all() for t in (population.mean, population.var)):
            raise FloatingPointError(
                f"recalibrate: statistics must be finite in the buffers' dtype; got values beyond {dtype} in {named}; "
                "keep the norm in float32; nothing was changed"
            )
