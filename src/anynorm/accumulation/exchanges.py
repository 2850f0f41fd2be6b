"""What a call of a batch norm does with a micro-batch, in each kind of pass.

Every class is an exchange as `sources.Exchange` describes it: the engine asks it for the moments in forward and for the
sums in backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..sources import Exchange
from ..statistics import Moments
from .checks import make_inner_gradient_error

if TYPE_CHECKING:
    from .calls import ForwardPass, NormCall


class StopForward(BaseException):
    """The forward has come as far as it was to go. Not an Exception, so that no model catches it."""


class WholeBatchExchange(Exchange):
    """A call whose moments and sums are known: a micro-batch gets those of the whole batch."""

    def __init__(self, call: NormCall) -> None:
        self.call = call

    def merge(self, moments: Moments) -> Moments:
        return self.call.view_moments_as(moments)

    def merge_sums(self, sums: Tensor) -> Tensor:
        if self.call.sums is None:
            raise RuntimeError(
                f"accumulate: {self.call.name} wants a gradient for its input that it did not want when its sums were "
                "found; mode 'sweep' needs forwards that repeat themselves; use checkpoint(use_reentrant=False)"
            )
        return self.call.sums.to(sums).view_as(sums)


class OwnMomentsExchange(WholeBatchExchange):
    """A call in the first pass: a micro-batch is normalized by its own moments, which are added to the call's.

    Moments merged so far instead were measured, too, and led to larger errors: the first micro-batches then differ
    more.
    """

    def merge(self, moments: Moments) -> Moments:
        self.call.add_moments(moments)
        return moments


class MomentsCollector(WholeBatchExchange):
    """The call whose moments a pass is run for: they are added to the call's, and nothing behind it is run."""

    def merge(self, moments: Moments) -> Moments:
        self.call.add_moments(moments)
        raise StopForward


class SumsCollector(WholeBatchExchange):
    """The call whose sums a pass is run for: backward goes down to its input and leaves them here.

    Its input is a view of its own, so that a backward down to it meets only calls behind it: what else reads the same
    tensor may be a call whose sums are not known yet.

    Attributes:
        own_sums: this micro-batch's, once backward has come here; None before, and where no loss depends on the call.
        input: what to differentiate for.
    """

    def __init__(self, call: NormCall) -> None:
        super().__init__(call)
        self.own_sums: Tensor | None = None
        self.input: Tensor | None = None

    def take_input(self, x: Tensor) -> Tensor:
        self.input = x.view_as(x)
        return self.input

    def merge_sums(self, sums: Tensor) -> Tensor:
        self.own_sums = sums.detach().clone()
        return sums  # Any would do: the gradient that is computed from them is dropped.


class EstimateExchange(WholeBatchExchange):
    """A call whose moments are estimates: gradients flow as if they followed the micro-batch's own moments alone.

    y = (x - own mean) / own std * r + d,  r = own std / std and d = (own mean - mean) / std as constants

    That is batch renormalization (Ioffe 2017, arXiv:1702.03275) towards the estimates. It takes from a micro-batch's
    gradient just what lies along 1 and xhat; sums scaled up to the whole batch would take more or less, and grow from
    norm to norm.
    """

    def merge(self, moments: Moments) -> Moments:
        self.call.add_moments(moments)  # Once more, for the running averages.
        self.own = moments
        return self.call.view_moments_as(moments)

    def merge_sums(self, sums: Tensor) -> Tensor:
        """The sums of a whole batch whose gradient has this micro-batch's share along 1 and xhat."""
        whole, own = self.call.moments, self.own
        assert whole is not None
        assert whole.mean is not None
        assert own.mean is not None
        eps, count = self.call.layer.eps, max(int(own.count), 1)
        rstd = whole.rstd(eps)
        offset = (own.mean.flatten() - whole.mean) * rstd  # xhat of the micro-batch's own mean
        ratio = (own.m2.flatten() / count + eps) * rstd.square()  # own variance to the estimate
        slope = (sums[1] - offset * sums[0]) / ratio
        return torch.stack([sums[0] - offset * slope, slope]) * (int(whole.count) / count)


class GuardedExchange(Exchange):
    """An exchange that refuses backward while the loss is being computed.

    A loss that differentiates would get a gradient without the other micro-batches' part, and nothing would say so.
    """

    exchange: WholeBatchExchange
    forward_pass: ForwardPass

    def __init__(self, exchange: WholeBatchExchange, forward_pass: ForwardPass) -> None:
        self.exchange, self.forward_pass = exchange, forward_pass

    def take_input(self, x: Tensor) -> Tensor:
        return self.exchange.take_input(x)

    def merge(self, moments: Moments) -> Moments:
        return self.exchange.merge(moments)

    def merge_sums(self, sums: Tensor) -> Tensor:
        if self.forward_pass.is_in_loss:
            raise make_inner_gradient_error()
        return self.exchange.merge_sums(sums)
