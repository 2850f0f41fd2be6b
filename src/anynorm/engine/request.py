"""What is asked of a norm, as one value."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..sources import BATCH
from ..torch_private import with_replace


@with_replace
class Request(NamedTuple):
    """What is asked beside the tensors that autograd must see: x, gamma, beta and a residual.

    Attributes:
        source: where mean and variance come from, a `sources.Source`.
        eps: in units of x squared.
        activation: a name in `activations.ACTIVATIONS`, applied last.
        mask: which positions count. Behind the front (`functional.front`) float32, 1 at positions that count and 0 at
            padding, contiguous, in the axes of x with size 1 for channels.
        lengths: instead of a mask, how many positions of each sample count. Behind the front None.
        sizes: what the norm's pattern needs beside x: the number of groups, the normalized shape, a ghost's size.
    """

    source: Any = BATCH  # a Source; a cast to one of them would cost more than it tells
    eps: float = 1e-5
    activation: str | None = None
    mask: Tensor | None = None
    lengths: Any = None
    sizes: Any = None
