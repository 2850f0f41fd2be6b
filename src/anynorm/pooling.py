"""Question (a): which elements share a mean and a variance?

A pattern such as ``"n (g k) s -> n g"`` names the axes of x on the left and, on the right, those that keep statistics
of their own; the rest is pooled. A pattern is parsed once and becomes a `Pooling`, plain integers that the rest of
the library works with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .errors import PatternError

Answer = TypeVar("Answer")
Sizes = tuple[tuple[str, int | tuple[int, ...]], ...]


@dataclass(frozen=True)
class Pooling:
    """What a pattern means for a tensor with a given number of axes.

    Attributes:
        splits: (axis of x, sizes) for every axis that is viewed as several, the last one first.
        pooled: axes of the view that share a mean and a variance.
        affine: axes of the view that gamma and beta vary over.
        samples: axes of the view that are samples and keep statistics of their own; running averages are over them.
        centred: whether the mean is subtracted.
        ghosts: axes of the view that are ghost batches, which move running averages one after the other.
        plans: how tensors of each shape and layout are walked, remembered by `kernels`.
    """

    splits: tuple[tuple[int, tuple[int, ...]], ...]
    pooled: tuple[int, ...]
    affine: tuple[int, ...]
    samples: tuple[int, ...]
    centred: bool
    ghosts: tuple[int, ...] = ()
    plans: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def open(self, x: Tensor) -> Tensor:
        """View x with its composed axes split; never a copy."""
        for axis, sizes in self.splits:
            if torch.jit.is_tracing():  # type: ignore[attr-defined] # public, but not said so
                # Behind an unflatten torch's exporter to ONNX by tracing takes the example's sizes for constants.
                x = x.reshape([*x.shape[:axis], *sizes, *x.shape[axis + 1 :]])
            else:
                x = x.unflatten(axis, sizes)
        return x

    def open_mask(self, mask: Tensor) -> Tensor:
        """View a mask in the axes of x, of size 1 where x has channels, as the opened x is viewed."""
        for axis, sizes in self.splits:
            mask = mask.unflatten(axis, (1,) * len(sizes) if mask.shape[axis] == 1 else sizes)
        return mask

    def count(self, view: Tensor) -> int:
        """How many elements share one mean."""
        count = 1
        for axis in self.pooled:  # No generator: torch.compile cannot follow one into math.prod.
            count *= view.shape[axis]
        return count

    @property
    def gamma_is_pooled(self) -> bool:
        """Whether gamma varies among elements that share a mean (layer, group), or not (batch, instance)."""
        return bool(set(self.affine) & set(self.pooled))


def remember(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """lru_cache, but torch.compile, which would warn of it at every user's first call, sees the function itself."""
    cached = lru_cache(maxsize=4096)(function)

    @wraps(function)
    def call(*arguments: Any) -> Answer:
        return function(*arguments) if is_compiling() else cached(*arguments)

    return call


def split_words(side: str, pattern: str) -> list[tuple[str, ...]]:
    """``"n (g k) s"`` to ``[("n",), ("g", "k"), ("s",)]``."""
    words = re.findall(r"\([^()]*\)|[^\s()]+|[()]", side)
    axes = [tuple(word.strip("()").split()) for word in words]
    for word, axis in zip(words, axes, strict=True):
        if word in "()" or not axis or not all(re.fullmatch(r"[a-zA-Z]\w*", name) for name in axis):
            raise PatternError(
                f"pattern {pattern!r}: an axis is a name or several in parentheses; got {word!r}; "
                'write for example "n (g k) h w -> n g"'
            )
    return axes


@remember
def parse(pattern: str) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """The axes on the left, and the names on the right, checked."""
    sides = pattern.split("->")
    if len(sides) != 2 or not sides[0].strip():
        raise PatternError(
            f'pattern {pattern!r}: axes of x, "->", axes that keep statistics of their own; '
            'write for example "n c s -> c"'
        )
    left = split_words(sides[0], pattern)
    names = [name for axis in left for name in axis]
    right = tuple(name for axis in split_words(sides[1], pattern) for name in axis)
    for place, name in enumerate(names):  # not `count`: torch.compile of 2.8 cannot follow it
        if name in names[:place]:
            raise PatternError(
                f"pattern {pattern!r}: every axis needs a name of its own; got {name!r} twice; rename one"
            )
    for place, name in enumerate(right):
        if name not in names or name in right[:place]:
            raise PatternError(
                f"pattern {pattern!r}: the right side keeps axes of the left, once each; got {name!r}; "
                f"choose among {', '.join(names)}"
            )
    if len(right) == len(names):
        raise PatternError(
            f"pattern {pattern!r}: at least one axis must be pooled, or each value is its own mean; "
            "leave an axis out on the right"
        )
    return left, right


# torch.compile calls it and keeps the answer; followed by it, a pattern costs seconds, and torch 2.8 fails.
parse._dynamo_marked_constant = True  # type: ignore[attr-defined] # as torch.compiler.assume_constant_result marks


@remember
def find_axes(
    pattern: str, ndim: int, sizes: Sizes = ()
) -> tuple[dict[str, tuple[int, ...]], tuple[tuple[int, tuple[int, ...]], ...]]:
    """Which axes of the view each name stands for, and which axes of x are split.

    ``d`` takes as many axes as its size has, ``s`` takes zero or more, ``n`` beside ``d`` takes what is left; every
    other name is one axis. `sizes` must give all sizes but one of every axis in parentheses.
    """
    left, _ = parse(pattern)
    known = dict(sizes)
    widths = find_widths(left, known, ndim, pattern)
    splits: list[tuple[int, tuple[int, ...]]] = []
    where: dict[str, tuple[int, ...]] = {}
    view_axis = 0
    for axis, names in enumerate(left):
        if len(names) > 1:
            splits.insert(0, (sum(widths[:axis]), find_split(names, known, pattern)))
        for name in names:
            where[name] = tuple(range(view_axis, view_axis + widths[axis]))
            view_axis += widths[axis]
    return where, tuple(splits)


@remember
def find_pooling(pattern: str, affine: str, centred: bool, ndim: int, sizes: Sizes = (), ghosts: str = "") -> Pooling:
    """Work out what `pattern` and `affine` mean for a tensor with `ndim` axes; see `find_axes`.

    Args:
        ghosts: the axis of ghost batches, "" for none. No letter says it: in a user's pattern b may be anything.
    """
    where, splits = find_axes(pattern, ndim, sizes)
    for name in affine.split():
        if name not in where:
            raise PatternError(
                f"pattern {pattern!r}: affine names axes of the pattern; got {name!r}; choose among {', '.join(where)}"
            )
    _, right = parse(pattern)
    pooled = tuple(a for name in where if name not in right for a in where[name])
    varied = tuple(sorted(a for name in affine.split() for a in where[name]))
    samples = where["n"] if "n" in right else ()
    return Pooling(splits, pooled, varied, samples, centred, where[ghosts] if ghosts else ())


def find_widths(left: list[tuple[str, ...]], known: dict[str, Any], ndim: int, pattern: str) -> list[int]:
    """How many axes of x each axis of the pattern stands for."""
    flat = [names[0] if len(names) == 1 else "" for names in left]
    elastic = "s" if "s" in flat else "n" if "d" in flat and "n" in flat else None
    widths = [len(known[n]) if n in known and isinstance(known[n], tuple) else 1 for n in flat]
    if elastic is not None:
        place = flat.index(elastic)
        widths[place] = 0
        widths[place] = ndim - sum(widths)
    if sum(widths) != ndim or min(widths) < 0:
        least = f"at least {sum(w for w in widths if w > 0)}" if elastic else f"{sum(widths)}"
        raise PatternError(f"pattern {pattern!r} names {least} axes; got a tensor with {ndim}; name one axis for each")
    return widths


def find_split(names: tuple[str, ...], known: dict[str, Any], pattern: str) -> tuple[int, ...]:
    """The sizes of an axis in parentheses, -1 for the one that is not given."""
    missing = [name for name in names if name not in known]
    if len(missing) > 1:
        raise PatternError(
            f"pattern {pattern!r}: all sizes in ({' '.join(names)}) but one must be given; missing "
            f"{', '.join(missing)}; pass {missing[0]}=..."
        )
    return tuple(known.get(name, -1) for name in names)
