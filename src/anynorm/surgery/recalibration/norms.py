"""Which norms are recalibrated, what is recorded of their inputs, and how is all they were put back?

A pre-hook takes the moments of what reaches a norm. The norms are the only modules whose mode is touched: they
normalize by their batch (training mode), or by averages that are put in (evaluation mode).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ...engine import paths
from ...family import FAMILY
from ...modules import batch, fused
from ...modules.adapted import Adapted
from ...modules.frozen import Frozen
from ...modules.norm import Norm
from ...modules.sync import _Synchronized
from ...padding.context import may_be_masked
from ...padding.masks import find_mask
from ...padding.ragged import is_ragged, open_rows
from ...sources import BATCH, Batch, Override, overriding
from ...statistics import Moments
from ..adapters import find_adapters
from ..report import UNFREEZE_FIRST, Entry, describe, is_ours
from .statistics import Tally

BASES = (nn.modules.batchnorm._BatchNorm, batch._BatchNorm)
FORWARDS = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward, Norm.forward, fused.Fused.forward)
SYNCHRONIZED = (_Synchronized, nn.SyncBatchNorm)
NOT_CALLED = "the model did not call it"


def find_norms(
    model: nn.Module, trust: tuple[type, ...], function: str = "recalibrate"
) -> tuple[dict[str, Any], list[Entry]]:
    """The norms to recalibrate, by name, and what else keeps running averages, with the reason why it is left.

    Raises:
        ValueError: a lazy norm that has not seen an input.
    """
    norms, left = {}, []
    for name, module in model.named_modules():
        if is_lazy(module):
            raise ValueError(
                f"{function}: lazy modules must have seen an input; got {name or 'the model'} "
                f"({describe(type(module))}), which has not; run one batch first"
            )
        reason = find_reason(module, trust)
        if reason:
            left.append(Entry(name, describe(type(module)), reason=reason))
        elif reason is not None:
            norms[name] = module
    return norms, left


def is_lazy(module: nn.Module) -> bool:
    """Whether any parameter or buffer of its own has no size yet."""
    own = (*module._parameters.values(), *module._buffers.values())
    return any(t is not None and nn.parameter.is_lazy(t) for t in own)


def find_reason(module: nn.Module, trust: tuple[type, ...]) -> str | None:
    """Why a module is left; "" for a norm to recalibrate, None for what is no such norm."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by torch.jit.script" if hasattr(module, "running_mean") else None
    if isinstance(module, Norm) and module.frozen is not None and module.frozen.updates:
        return UNFREEZE_FIRST
    is_batch_norm = isinstance(module, (*BASES, *trust))
    if is_batch_norm and (module.running_mean is None or module.running_var is None):
        return "it keeps no running averages"
    if not is_batch_norm:
        has_averages = isinstance(module._buffers.get("running_mean"), Tensor)
        return "its running averages are not those of a batch norm over (N, C, *)" if has_averages else None
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    if isinstance(module, (*trust, Adapted)) or is_ours(kind) or kind.forward in FORWARDS or find_adapters(module):
        return ""
    return "a subclass with a forward of its own may not normalize its input as it comes; name it in trust="


class MomentRecorder:
    """Takes the moments of everything that reaches the norms.

    Args:
        norms: by name.
        by_batch: the norms normalize by their batch; else by their running averages.

    Attributes:
        averages: the running means, by name.
        tallies: what was recorded, by name; `begin` clears them.
        follows: put what was recorded so far into the running averages at every call.
    """

    norms: dict[str, Any]
    by_batch: bool
    follows: bool

    def __init__(self, norms: dict[str, Any], by_batch: bool) -> None:
        self.norms, self.by_batch = norms, by_batch
        self.averages: dict[str, Any] = {name: norm.running_mean for name, norm in norms.items()}
        self.follows = False
        self.tallies: dict[str, Tally] = {}
        self._in_batch: dict[str, Moments] = {}  # in the present batch
        self._handles: list[Any] = []

    def begin(self, follows: bool) -> None:
        """A new pass."""
        self.tallies = {name: Tally() for name in self.norms}
        self._in_batch, self.follows = {}, follows

    def attach(self) -> None:
        """Put the norms into their mode and record what comes."""
        for name, norm in self.norms.items():
            norm.training = self.by_batch
            self._handles.append(norm.register_forward_pre_hook(partial(self.record, name), with_kwargs=True))

    def detach(self) -> None:
        """Record no more."""
        while self._handles:
            self._handles.pop().remove()

    def record(self, name: str, norm: Any, args: Any, kwargs: Any) -> None:
        """One call of a norm; several in a batch are pooled."""
        moments = find_input_moments(self.averages[name].numel(), *find_input(norm, args, kwargs))
        if moments is None:
            return
        assert moments.mean is not None
        if not (moments.mean.isfinite().all() and moments.m2.isfinite().all()):
            raise FloatingPointError(
                f"recalibrate: statistics must be finite; got NaN or Inf in the input of {name or 'the model'} "
                f"({type(norm).__name__}); look for the first layer that overflows, or for NaN in the data; "
                "nothing was changed"
            )
        if self.by_batch and moments.count == 1 and getattr(norm, "on_single", "error") == "error":
            raise ValueError(
                f"recalibrate: a batch must have more than 1 value per channel, or every output is beta; got 1 in "
                f"{name or 'the model'} ({type(norm).__name__}); use a larger batch, drop a last batch of one with "
                "DataLoader(drop_last=True), or earlier='population'; nothing was changed"
            )
        known = self._in_batch.get(name)
        self._in_batch[name] = moments if known is None else known.merge(moments)
        if self.follows:
            before, total = self.tallies[name].total, self._in_batch[name]
            total = total if before is None else before.merge(total)
            assert total.mean is not None
            put(norm, total.mean, total.m2 / max(int(total.count) - 1, 1))

    def end_batch(self) -> None:
        """All calls of a batch are one entry: they are about the same samples."""
        for name, moments in self._in_batch.items():
            self.tallies[name].add(moments)
        self._in_batch = {}


class Apart(Override):
    """Every batch norm of ours in training takes its own batch, moves nothing and waits for no other rank, also those
    that are left: ranks may have unlike numbers of batches."""

    def find_source(self, layer: Any, input: Any, mask: Any, lengths: Any) -> Batch:
        """The batch."""
        return BATCH


def part_ranks(model: nn.Module) -> None:
    """The same for torch's synchronized norms, until `keeping` ends: without averages they normalize by their batch in
    evaluation, too, and know of no ranks there."""
    for norm in model.modules():
        is_kind = isinstance(norm, nn.SyncBatchNorm) and type(norm).forward is nn.SyncBatchNorm.forward
        if is_kind and norm.training and "forward" not in vars(norm):
            norm.training = False
            norm._buffers.update(running_mean=None, running_var=None)


def put(norm: Any, mean: Tensor, var: Tensor) -> None:
    """In place: buffers keep their identity."""
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)


@cache
def find_signature(kind: Any) -> inspect.Signature:
    """Of its forward."""
    return inspect.signature(kind.forward)


def find_input(norm: Any, args: Any, kwargs: Any) -> tuple[Any, Tensor | None]:
    """A norm's input and its mask, however the model passes them."""
    given = find_signature(norm.__class__).bind(norm, *args, **kwargs).arguments
    x = next(value for name, value in given.items() if name != "self")
    if isinstance(norm, Adapted):  # whose forward takes its input under any name
        x = next(iter((*given.get("given", ()), *given.get("named", {}).values())))
    if not isinstance(norm, batch._BatchNorm):
        return x, None
    mask, lengths = given.get("mask"), given.get("lengths")
    if mask is None and lengths is None and may_be_masked():
        mask = norm.find_mask(x)
    return x, find_mask("batch_norm", x, (1,), mask, lengths)


def find_input_moments(channels: int, x: Any, mask: Tensor | None) -> Moments | None:
    """(C,), float64, on the CPU; None where nothing counts, or where the norm will refuse the input."""
    if is_ragged(x):
        x = open_rows("batch_norm", x)
    if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[1] != channels or not x.is_floating_point():
        return None
    if not x.numel():
        return None
    found = paths.find_moments(x, FAMILY["batch"].pool(x), mask)
    assert found.mean is not None
    mean, m2 = (t.detach().flatten().cpu().double() for t in (found.mean, found.m2))
    return Moments(int(found.count), mean, m2) if found.count else None


@contextmanager
def keeping(model: nn.Module) -> Iterator[None]:
    """Modes and averages of norms, and what is written in the buffers of the whole model, are afterwards as before."""
    before = [
        (module, module.training, dict(module._buffers))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
        and (isinstance(module, (*SYNCHRONIZED, *BASES)) or isinstance(module._buffers.get("running_mean"), Tensor))
    ]
    buffers = [(t, t.detach().clone()) for t in model.buffers() if not (t.is_meta or t.is_inference())]
    frozen = [(f, f.training) for module in model.modules() if isinstance(f := vars(module).get("frozen"), Frozen)]
    try:
        for note, _ in frozen:
            note.training = False  # a frozen norm that follows its batches would move what was put there
        with overriding(Apart()):
            yield
    finally:
        for note, training in frozen:
            note.training = training
        for module, training, named in before:
            module.training = training
            module._buffers.clear()
            module._buffers.update(named)
        with torch.no_grad():
            for t, values in buffers:  # torch's batch norm moves averages without a new version.
                if not torch.equal(t, values):
                    t.copy_(values)
