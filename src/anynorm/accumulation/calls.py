"""The calls of batch norms in a forward, and what is known of each for the whole batch.

    moments[k]   count, mean and m2 of call k over all micro-batches (and ranks)
    sums[k]      sum(gamma * g) and sum(gamma * g * xhat) of call k over the same: (2, C)

Whoever knows both computes a micro-batch's outputs and gradients as the whole batch would have them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional.batch import BATCH_OF_ONE
from ..padding.masks import describe
from ..padding.ragged import is_ragged, open_rows
from ..sources import Exchange, Merged, Override
from ..statistics import Moments
from ..torch_private import find_backward
from .checks import check_layer, make_order_error
from .exchanges import GuardedExchange, WholeBatchExchange


class NormCall:
    """One call of a batch norm in a forward, over all micro-batches.

    Attributes:
        partial: moments merged so far, in the order of micro-batches.
        moments: of the whole batch, once `finish_moments` has been called; mean and m2 are (C,).
        sums: of the whole batch, once `finish_sums` has been called; (2, C).
        needs_gradient: whether any micro-batch's input asks for a gradient.
        ranks: what merges over ranks, where the layer is synchronized.
    """

    layer: Any
    name: str
    dtype: torch.dtype

    def __init__(self, layer: Any, name: str, dtype: torch.dtype) -> None:
        self.layer, self.name, self.dtype = layer, name, dtype
        self.partial: Moments | None = None
        self.moments: Moments | None = None
        self.sums: Tensor | None = None
        self.needs_gradient = False
        self.ranks: Exchange | None = None

    def add_moments(self, own: Moments) -> None:
        """Merge the moments of one micro-batch into `partial`."""
        assert own.mean is not None
        # The graph of a micro-batch must not outlive its pass: memory is that of one.
        part = Moments(int(own.count), own.mean.detach().flatten(), own.m2.detach().flatten())
        self.partial = part if self.partial is None else self.partial.merge(part)

    def finish_moments(self) -> None:
        """Take `partial`, which has every micro-batch now, as `moments`; merged over the ranks where there are any."""
        assert self.partial is not None
        layer, moments, self.partial = self.layer, self.partial, None
        if layer.training and self.ranks is None:
            # Once per call of the layer: an exchange counts the layer's calls, which must agree between ranks.
            like = torch.empty(0, dtype=self.dtype, device="cpu")
            self.ranks = layer.open_exchange(like, layer.track_running_stats)
        if self.ranks is not None:
            moments = self.ranks.merge(moments)
        if moments.count == 1:
            raise ValueError(
                f"{describe(layer)}: statistics need more than 1 value per channel in all micro-batches together, or "
                f"every output is beta; got 1; {BATCH_OF_ONE} and take mode='lockstep'"
            )
        self.moments = moments

    def finish_sums(self, total: Tensor | None) -> None:
        """Take the sums over all micro-batches, None where no loss depends on the call; merged over the ranks."""
        if total is None:
            # Zeros, not nothing: other ranks may depend on the call, and wait for this one in their exchange.
            assert self.moments is not None
            total = torch.zeros(2, self.moments.m2.numel(), dtype=torch.float64, device=self.moments.m2.device)
        self.sums = total if self.ranks is None else self.ranks.merge_sums(total)

    def view_moments_as(self, own: Moments) -> Moments:
        """The whole batch's moments in the shape of one micro-batch's."""
        assert self.moments is not None
        assert self.moments.mean is not None
        mean, m2 = (t.view_as(own.m2) for t in (self.moments.mean, self.moments.m2))
        return Moments(self.moments.count, mean, m2)


class ForwardPass(Override):
    """One forward of one micro-batch: says how each call of a batch norm takes part.

    Args:
        calls: of the forward, in order; the first forward of all appends them.
        names: of the layers.
        kind: the exchange of all calls but `special`.
        special: the place of a call with an exchange of its own.
        is_first: whether this is the forward that finds which calls there are.

    Attributes:
        is_in_loss: whether the loss is still being computed.
    """

    calls: list[NormCall]
    names: dict[Any, str]
    kind: type[WholeBatchExchange]
    special: tuple[int, WholeBatchExchange] | None
    is_first: bool
    place: int
    is_in_loss: bool

    def __init__(
        self,
        calls: list[NormCall],
        names: dict[Any, str],
        kind: type[WholeBatchExchange],
        special: tuple[int, WholeBatchExchange] | None = None,
        is_first: bool = False,
    ) -> None:
        self.calls, self.names, self.kind, self.special, self.is_first = calls, names, kind, special, is_first
        self.place = 0
        self.is_in_loss = True

    def find_source(self, layer: Any, input: Any, mask: Any, lengths: Any) -> Merged:
        # In backward activation checkpointing computes calls again, out of order: the place of a call says nothing.
        is_recomputed = find_backward() != -1
        exchange = WholeBatchExchange(self.get_only_call(layer)) if is_recomputed else self.open_next(layer, input)
        return Merged(exchange=GuardedExchange(exchange, self))

    def open_next(self, layer: Any, input: Any) -> WholeBatchExchange:
        """Advance to the next call, which must be of the layer that other micro-batches call here."""
        check_layer(layer, self.names)
        place, self.place = self.place, self.place + 1
        name = self.names[layer]
        data = open_rows("batch_norm", input) if is_ragged(input) else input
        if place == len(self.calls) and self.is_first:
            self.calls.append(NormCall(layer, name, data.dtype))
        if place >= len(self.calls) or self.calls[place].layer is not layer:
            expected = self.calls[place].name if place < len(self.calls) else "no further call"
            raise make_order_error(place, name, expected)
        call = self.calls[place]
        call.needs_gradient |= data.requires_grad and torch.is_grad_enabled()
        if self.special is not None and self.special[0] == place:
            return self.special[1]
        return self.kind(call)

    def end_loss(self) -> None:
        """Note that the loss has returned, and refuse it where calls of other micro-batches are missing."""
        self.is_in_loss = False
        if self.place < len(self.calls):
            raise make_order_error(self.place, "the end", self.calls[self.place].name)

    def get_only_call(self, layer: Any) -> NormCall:
        """The call of a layer that is called once in a forward.

        Raises:
            RuntimeError: it is called several times, or not at all.
        """
        found = [call for call in self.calls if call.layer is layer]
        if len(found) != 1:
            raise RuntimeError(
                f"accumulate: activation checkpointing computes {self.names.get(layer, 'a norm')} again, which is "
                f"called {len(found)} times in a forward, and nobody can say which call this is; leave that layer out "
                "of the checkpoint"
            )
        return found[0]
