"""The calls of batch norms in a forward: what is known of each for the whole batch, and what it does with a part.

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
from ..sources import Exchange, Merged
from ..statistics import Moments
from .refuse import check_layer, differ, find_inner_gradient


class Call:
    """One call of a batch norm, over all parts.

    Attributes:
        found: merged so far, in the order of micro-batches.
        moments: of the whole batch, once `finish` has been called; mean and m2 are (C,).
        sums: of the whole batch, once they are known; (2, C).
        needs_gradient: whether any part's input asks for a gradient.
    """

    def __init__(self, layer: Any, name: str, dtype: torch.dtype) -> None:
        self.layer, self.name, self.dtype = layer, name, dtype
        self.found: Moments | None = None
        self.moments: Moments | None = None
        self.sums: Tensor | None = None
        self.needs_gradient = False
        self.ranks: Exchange | None = None

    def add(self, own: Moments) -> None:
        """Count a part in."""
        assert own.mean is not None
        part = Moments(int(own.count), own.mean.detach().flatten(), own.m2.detach().flatten())
        self.found = part if self.found is None else self.found.merge(part)

    def finish(self) -> None:
        """Now every part was counted: the whole batch's moments, over the ranks too where the layer is synchronized."""
        assert self.found is not None
        layer, moments, self.found = self.layer, self.found, None
        if layer.training:
            like = torch.empty(0, dtype=self.dtype, device="cpu")
            self.ranks = layer.open_exchange(like, layer.track_running_stats) if self.ranks is None else self.ranks
        if self.ranks is not None:
            moments = self.ranks.merge(moments)
        if moments.count == 1:
            raise ValueError(
                f"{describe(layer)}: statistics need more than 1 value per channel in all micro-batches together, or "
                f"every output is beta; got 1; {BATCH_OF_ONE} and take mode='lockstep'"
            )
        self.moments = moments

    def finish_sums(self, found: Tensor | None) -> None:
        """Now every part's backward was there; None where no loss depends on the call."""
        if found is None:
            assert self.moments is not None
            found = torch.zeros(2, self.moments.m2.numel(), dtype=torch.float64, device=self.moments.m2.device)
        self.sums = found if self.ranks is None else self.ranks.merge_sums(found)

    def show(self, own: Moments) -> Moments:
        """The whole batch's moments, shaped as a part's."""
        assert self.moments is not None
        assert self.moments.mean is not None
        mean, m2 = (t.view_as(own.m2) for t in (self.moments.mean, self.moments.m2))
        return Moments(self.moments.count, mean, m2)


class Stop(BaseException):
    """The forward has come as far as it was to go. Not an Exception, so that no model catches it."""


class Known(Exchange):
    """A call whose moments are known, in a pass that looks for nothing."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def merge(self, moments: Moments) -> Moments:
        """The whole batch's."""
        return self.call.show(moments)

    def merge_sums(self, sums: Tensor) -> Tensor:
        """The whole batch's."""
        if self.call.sums is None:
            raise RuntimeError(
                f"accumulate: {self.call.name} wants a gradient for its input that it did not want when its sums were "
                "found; mode 'sweep' needs forwards that repeat themselves; use checkpoint(use_reentrant=False)"
            )
        return self.call.sums.to(sums).view_as(sums)


class Survey(Known):
    """The first pass: a part's own moments normalize it, and are counted in.

    Moments merged so far instead were measured, too, and led to larger errors: the first parts then differ more.
    """

    def merge(self, moments: Moments) -> Moments:
        """This part's."""
        self.call.add(moments)
        return moments


class Last(Known):
    """The call that a forward was to come to: its moments are counted in, and nothing else is run."""

    def merge(self, moments: Moments) -> Moments:
        """Never returns."""
        self.call.add(moments)
        raise Stop


class Sought(Known):
    """The call that a backward was to come to: its sums are counted in.

    Its input is a view of its own, so that a backward down to it meets only calls behind it: what else reads the same
    tensor may be a call whose sums are not known yet.
    """

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.found: Tensor | None = None
        self.input: Tensor | None = None

    def take_input(self, x: Tensor) -> Tensor:
        """The view."""
        self.input = x.view_as(x)
        return self.input

    def merge_sums(self, sums: Tensor) -> Tensor:
        """This part's; the gradient that is computed from them is dropped."""
        self.found = sums.detach().clone()
        return sums


class Estimated(Known):
    """A call whose moments are estimates: gradients flow as if they followed the part's own moments alone.

    y = (x - own mean) / own std * r + d,  r = own std / std and d = (own mean - mean) / std as constants

    That is batch renormalization (Ioffe 2017, arXiv:1702.03275) towards the estimates. It takes from a part's gradient
    just what lies along 1 and xhat; sums scaled up from a part to the whole would take more or less, and grow from norm
    to norm.
    """

    def merge(self, moments: Moments) -> Moments:
        """The estimate of the whole batch's; they are counted once more, for the running averages."""
        self.call.add(moments)
        self.own = moments
        return self.call.show(moments)

    def merge_sums(self, sums: Tensor) -> Tensor:
        """Those of a whole batch that has this part's share along 1 and xhat."""
        whole, own = self.call.moments, self.own
        assert whole is not None
        assert whole.mean is not None
        assert own.mean is not None
        eps, count = self.call.layer.eps, max(int(own.count), 1)
        rstd = whole.rstd(eps)
        offset = (own.mean.flatten() - whole.mean) * rstd  # xhat of this part's own mean
        ratio = (own.m2.flatten() / count + eps) * rstd.square()  # own variance to the estimate
        slope = (sums[1] - offset * sums[0]) / ratio
        return torch.stack([sums[0] - offset * slope, slope]) * (int(whole.count) / count)


class Outside(Exchange):
    """A call's exchange, for a backward that is not part of the loss."""

    def __init__(self, exchange: Known, running: Pass) -> None:
        self.exchange, self.running = exchange, running

    def take_input(self, x: Tensor) -> Tensor:
        """The call's."""
        return self.exchange.take_input(x)

    def merge(self, moments: Moments) -> Moments:
        """The call's."""
        return self.exchange.merge(moments)

    def merge_sums(self, sums: Tensor) -> Tensor:
        """The call's; never returns where the loss differentiates."""
        if self.running.is_in_loss:
            raise find_inner_gradient()
        return self.exchange.merge_sums(sums)


class Pass:
    """One forward of one micro-batch: tells each call how it takes part. A `sources.Override`.

    Args:
        calls: of the forward, in order; a survey adds them.
        names: of the layers.
        kind: the exchange of all calls but `special`.
        special: the place of a call with an exchange of its own.
        is_first: whether this is the forward that finds which calls there are.
    """

    def __init__(
        self,
        calls: list[Call],
        names: dict[Any, str],
        kind: type[Known],
        special: tuple[int, Known] | None = None,
        is_first: bool = False,
    ) -> None:
        self.calls, self.names, self.kind, self.special, self.is_first = calls, names, kind, special, is_first
        self.place = 0
        self.is_in_loss = True

    def find_source(self, layer: Any, input: Any) -> Merged:
        """The moments that the pass has for this call."""
        if torch._C._current_graph_task_id() != -1:  # Activation checkpointing computes it again, out of order.
            return Merged(exchange=Outside(Known(self.find_only(layer)), self))
        return Merged(exchange=Outside(self.enter(layer, input), self))

    def enter(self, layer: Any, input: Any) -> Known:
        """The next call, which must be the one that other micro-batches have here."""
        check_layer(layer, self.names)
        place, self.place = self.place, self.place + 1
        name = self.names[layer]
        data = open_rows("batch_norm", input) if is_ragged(input) else input
        if place == len(self.calls) and self.is_first:
            self.calls.append(Call(layer, name, data.dtype))
        if place >= len(self.calls) or self.calls[place].layer is not layer:
            expected = self.calls[place].name if place < len(self.calls) else "no further call"
            raise differ(place, name, expected)
        call = self.calls[place]
        call.needs_gradient |= data.requires_grad and torch.is_grad_enabled()
        if self.special is not None and self.special[0] == place:
            return self.special[1]
        return self.kind(call)

    def leave_loss(self) -> None:
        """The loss has returned; whether no call is missing."""
        self.is_in_loss = False
        if self.place < len(self.calls):
            raise differ(self.place, "the end", self.calls[self.place].name)

    def find_only(self, layer: Any) -> Call:
        """The call of a layer that has one."""
        found = [call for call in self.calls if call.layer is layer]
        if len(found) != 1:
            raise RuntimeError(
                f"accumulate: activation checkpointing computes {self.names.get(layer, 'a norm')} again, which is "
                f"called {len(found)} times in a forward, and nobody can say which call this is; leave that layer out "
                "of the checkpoint"
            )
        return found[0]
