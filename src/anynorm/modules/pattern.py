"""Any member of the family, and ones nobody named, from a pattern: `AnyNorm`."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import Parameter

from ..engine import paths
from ..engine.request import Request
from ..errors import PatternError, check_floating, check_more_than_one, check_parameter_dtypes
from ..functional.batch import check_averages, name_averages
from ..pooling import Sizes, find_axes, find_pooling, parse
from ..sources import BATCH, Batch, Given, Source, find_momentum
from .counting import is_counted, mark_counted
from .norm import Norm


def check_sizes(input: Tensor, pattern: str, sizes: Sizes) -> None:
    """Hold the input against the pattern and the given sizes."""
    shape = tuple(input.shape)
    try:
        where, splits = find_axes(pattern, input.dim(), sizes)
    except PatternError as error:
        raise PatternError(f"AnyNorm: {error}; got shape {shape}") from None
    for axis, parts in splits:
        known = prod([size for size in parts if size > 0])
        if shape[axis] % known or (-1 not in parts and shape[axis] != known):
            raise PatternError(
                f"AnyNorm: pattern {pattern!r} splits axis {axis} by {parts}; got shape {shape}; "
                f"choose sizes whose product is {shape[axis]}"
            )
    inside = {name for names in parse(pattern)[0] if len(names) > 1 for name in names}
    view_to_axis = find_plain_axes(pattern, where)
    for name, size in sizes:
        if name in inside:
            continue
        got = tuple(shape[axis] for axis in view_to_axis[name])
        if got != (size if isinstance(size, tuple) else (size,)):
            raise PatternError(
                f"AnyNorm: pattern {pattern!r} was built for {name}={size}; got shape {shape}, where {name} is "
                f"{got[0] if len(got) == 1 else got}; build it with {name}={got[0] if len(got) == 1 else got}"
            )


def find_plain_axes(pattern: str, where: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Axes of x, not of the view, for every name outside parentheses."""
    axes, position = {}, 0
    for names in parse(pattern)[0]:
        width = 1 if len(names) > 1 else len(where[names[0]])
        if len(names) == 1:
            axes[names[0]] = tuple(range(position, position + width))
        position += width
    return axes


class AnyNorm(Norm):
    """The norm that a pattern describes.

    y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var over the axes that the right side leaves out.

    Args:
        pattern: axes of the input ``->`` axes that keep statistics of their own. Every name is one axis,
            but ``s`` (zero or more), ``d`` (as many as its size has) and ``n`` beside ``d`` (the rest). Several names
            in parentheses split one axis. No other letter has a meaning.
        affine: the axes weight and bias vary over, "" for none; their sizes must be given.
        centred: subtract the mean; False gives root-mean-square norms.
        eps: in units of x squared.
        bias: learn a beta too.
        track_running_stats: keep running averages of the statistics over samples (axis ``n``), used in evaluation.
        momentum: weight of the new value in the running averages; None for a cumulative average.
        sizes: the size of each named axis that affine, a split or the running averages need.

    Raises:
        PatternError: a pattern that does not parse, or an input that does not fit it.

    Example:
        >>> norm = anynorm.AnyNorm("n (g k) h w -> n g", affine="g k", g=8, k=4)  # group norm
        >>> norm(torch.randn(2, 32, 5, 5)).shape, norm.weight.shape
        (torch.Size([2, 32, 5, 5]), torch.Size([32]))
        >>> anynorm.AnyNorm("n c h w -> n h w", affine="c", centred=False, c=3)  # per position, over channels
        AnyNorm('n c h w -> n h w', affine='c', centred=False, eps=1e-05, c=3)
    """

    weight: Parameter | None
    bias: Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    pattern: str
    affine: str
    centred: bool
    eps: float
    track_running_stats: bool
    momentum: float | None

    def __init__(
        self,
        pattern: str,
        affine: str = "",
        *,
        centred: bool = True,
        eps: float = 1e-5,
        bias: bool = True,
        track_running_stats: bool = False,
        momentum: float | None = 0.1,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **sizes: int | tuple[int, ...],
    ) -> None:
        super().__init__()
        self.pattern, self.affine, self.centred, self.eps = pattern, affine, centred, eps
        self.track_running_stats, self.momentum = track_running_stats, momentum
        self.sizes: Sizes = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(sizes.items()))
        self._check_options(list(sizes))
        # The axes that affine names, and those that the right side keeps but the samples, have sizes in the state.
        shape = self._shape(set(affine.split()), "affine")
        right = {name for name in parse(pattern)[1] if name != "n"}
        kept = self._shape(right, "running averages") if track_running_stats else None
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, wanted in (("weight", bool(affine)), ("bias", bool(affine) and bias)):
            self.register_parameter(name, Parameter(torch.empty(shape, **options)) if wanted else None)
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, None if kept is None else torch.empty(kept, **options))
        counter = None if kept is None else torch.tensor(0, dtype=torch.long, device=device)
        self.register_buffer("num_batches_tracked", counter)
        self.reset_parameters()

    def _check_options(self, named: list[str]) -> None:
        """Hold the constructor's arguments against each other; `named` are the axes that have a size."""
        pattern, known = self.pattern, {name for names in parse(self.pattern)[0] for name in names}
        if self.track_running_stats and not self.centred:
            raise PatternError(
                f"AnyNorm: pattern {pattern!r}: running averages need centred=True; leave one of them out"
            )
        for name, size in self.sizes:
            parts = size if isinstance(size, tuple) else (size,)
            if not parts or any(not isinstance(part, int) or part < 1 for part in parts):
                raise PatternError(
                    f"AnyNorm: pattern {pattern!r}: sizes are whole numbers of 1 or more; got {name}={size}; correct it"
                )
        if self.eps < 0:
            raise PatternError(f"AnyNorm: eps must be non-negative; got {self.eps}; the default is 1e-5")
        for name in [*self.affine.split(), *named]:
            if name not in known:
                raise PatternError(
                    f"AnyNorm: pattern {pattern!r} has no axis {name!r}; choose among {', '.join(sorted(known))}"
                )

    def _shape(self, names: set[str], what: str) -> tuple[int, ...]:
        """One size for every axis of the input that `names` touch."""
        sizes = dict(self.sizes)
        shape: list[int] = []
        for axis in parse(self.pattern)[0]:
            chosen = [name for name in axis if name in names]
            for name in chosen:
                if name not in sizes:
                    raise PatternError(
                        f"AnyNorm: pattern {self.pattern!r}: {what} needs the size of {name!r}; pass {name}=..."
                    )
            if chosen and isinstance(size := sizes[chosen[0]], tuple):
                shape.extend(size)
            elif chosen:
                shape.append(prod(sizes[name] for name in chosen))  # type: ignore[misc] # none of these is a tuple
        return tuple(shape)

    def reset_parameters(self) -> None:
        """Gamma 1, beta 0, running averages of a standard normal."""
        for tensor, value in (
            (self.weight, 1.0),
            (self.bias, 0.0),
            (self.running_mean, 0.0),
            (self.running_var, 1.0),
        ):
            if tensor is not None:
                nn.init.constant_(tensor, value)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()

    def normalize(
        self, input: Any, residual: Any = None, activation: Any = None, mask: Any = None, lengths: Any = None
    ) -> Any:
        """Hold the input against the pattern, choose the source, normalize, count the batch."""
        if any(value is not None for value in (residual, activation, mask, lengths)):
            raise NotImplementedError(
                f"AnyNorm: pattern {self.pattern!r} does not say what a mask covers; got one; use a norm of the family"
            )
        check_floating("AnyNorm", input)
        check_sizes(input, self.pattern, self.sizes)
        pooling = find_pooling(self.pattern, self.affine, self.centred, input.dim(), self.sizes)
        if not pooling.pooled:
            raise PatternError(
                f"AnyNorm: pattern {self.pattern!r} pools nothing of an input without axes s; "
                f"got shape {tuple(input.shape)}; leave another axis out on the right"
            )
        source = self.find_source()
        if type(source) is Batch:
            count = pooling.count(pooling.open(input))
            check_more_than_one("AnyNorm", count, "mean", input, "pool more axes or samples")
        request = Request(source, self.eps)
        check_parameter_dtypes("AnyNorm", input, weight=self.weight, bias=self.bias, **name_averages(request))
        check_averages("AnyNorm", input, request)
        y = paths.normalize(input, self.weight, self.bias, None, request, pooling)
        moves = type(source) is Batch and source.running_mean is not None
        if moves and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            mark_counted(self)
        return y

    def find_source(self) -> Source:
        """Where the statistics of this call come from."""
        mean, var = self.running_mean, self.running_var
        if not self.training and mean is not None:
            return Given(mean, var)  # type: ignore[arg-type] # both are there
        if mean is None or not is_counted(self):
            return BATCH
        return Batch(mean, var, find_momentum(self.momentum, self.num_batches_tracked))

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        arguments = [repr(self.pattern), f"affine={self.affine!r}", f"centred={self.centred}", f"eps={self.eps}"]
        if self.track_running_stats:
            arguments += ["track_running_stats=True", f"momentum={self.momentum}"]
        return ", ".join(arguments + [f"{name}={size}" for name, size in self.sizes])
