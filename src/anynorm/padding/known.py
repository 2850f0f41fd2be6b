"""Which mask holds for a tensor: its own, where it is known, else one that fits its positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..engine.watch import has_memory

Sizes = tuple[int, ...]
WHOLE = ""  # the name of the model itself among its parts
REPAIR = (
    "pass each part of the model its own: masked({'encoder': mask, 'decoder': other}, model=model), or write functions "
    "between layers as modules (nn.ReLU), behind which a mask is followed"
)


class Known:
    """A mask, and the positions that it is for.

    Args:
        mask: (N, positions...), bool; size 1 where samples or positions share it.
        sizes: of samples and positions; None for a mask that was given, which broadcasts.
    """

    def __init__(self, mask: Tensor, sizes: Sizes | None = None) -> None:
        self.mask, self.sizes = mask, sizes

    @cached_property
    def is_full(self) -> bool:
        """Whether there is no padding."""
        return bool(self.mask.all())

    def find_forms(self, axes: int) -> Iterator[tuple[Tensor, list[int | None]]]:
        """The mask with so many axes, in every way, and the sizes it is for; None is any size.

        (N, L) serves (N, F, L) and (N, L, F) too, and (N, 1, L) serves (N, L): maps of time and frequency, and what
        becomes of them where frequencies and channels are joined.
        """
        mask, sizes = self.mask, self.sizes or tuple(self.mask.shape)
        held = [None if size == 1 and self.sizes is None else size for size in sizes]
        if len(held) == axes:
            yield mask, held
        elif len(held) == 2 < axes:
            for axis in range(1, axes):
                first, last = held
                shape, spread = [1] * axes, [first, *[None] * (axes - 1)]
                shape[0], shape[axis], spread[axis] = mask.shape[0], mask.shape[1], last
                yield mask.reshape(shape), spread
        elif len(held) > axes:
            kept = [axis for axis, size in enumerate(mask.shape) if not axis or size != 1]
            if len(kept) == axes:
                yield mask.reshape([mask.shape[axis] for axis in kept]), [held[axis] for axis in kept]

    def find_views(self, wanted: Sizes) -> Iterator[Tensor]:
        """Those forms that fit."""
        for view, held in self.find_forms(len(wanted)):
            if all(size is None or size == other for size, other in zip(held, wanted, strict=True)):
                yield view


def find_views(masks: Iterable[Known], wanted: Sizes) -> list[Tensor]:
    """The masks that fit, those that say the same once."""
    found: list[Tensor] = []
    for known in masks:
        for view in known.find_views(wanted):
            if not any(is_same(view, other) for other in found):
                found.append(view)
    return found


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two masks that fit the same positions are the same there."""
    if one is other:
        return True
    if not has_memory(one, other):
        return False
    return torch.equal(*torch.broadcast_tensors(one, other.to(one.device)))


class Own(NamedTuple):
    """A mask that is a tensor's own: where it was found, or behind which layer."""

    known: Known
    parts: frozenset[str]
    is_output: bool


class Masks:
    """The masks of a context: those that were given for each part of a model, and those behind its layers.

    Args:
        given: by the name of the part, "" for the whole model; None for a part without padding.
        follow: whether masks are followed from tensor to tensor.
    """

    def __init__(self, given: dict[str, list[Known] | None], follow: bool) -> None:
        self.given = given
        self.derived: dict[str, list[Known]] = {name: [] for name in given}
        self.held: dict[Any, list[Known]] = {}
        self.own: WeakTensorKeyDictionary | None = WeakTensorKeyDictionary() if follow else None

    def find(self, layer: str, parts: frozenset[str], wanted: Sizes, x: Any, is_named: bool = False) -> Tensor | None:
        """The mask for a tensor: its own; else the one that fits in its part of the model; else in any part.

        Args:
            layer: who asks, for errors.
            parts: the names of the part that the layer belongs to; several where parts share the layer.
            wanted: samples and positions of the tensor.
            is_named: whether the layer is a part of its own, whose mask then counts, wherever the tensor comes from.

        Returns:
            None where the part has no padding, or where there are no positions and no mask is about samples alone.

        Raises:
            ValueError: no mask fits, or several that differ.
        """
        if self.is_free(parts):
            return None
        own = None if self.own is None else self.own.get(x)
        near = [one for part in parts for one in [*(self.given.get(part) or []), *self.derived.get(part, [])]]
        every = self.list_all()
        first: list[Known] = []
        if own is not None and own.parts == parts:
            first = [own.known]
        elif own is not None and own.is_output and not is_named:
            near.append(own.known)
        for masks in (first, near, every):
            found = find_views(masks, wanted)
            if len(found) > 1:
                told = " and ".join(show_real(view) for view in found)
                raise ValueError(
                    f"{layer}: several masks of anynorm.masked fit an input of positions {wanted} and differ; got "
                    f"{told}; {REPAIR}"
                )
            if found:
                self.hold(found[0], wanted, x, parts, own is not None and own.is_output)
                return found[0]
        if len(wanted) < 2:
            return None
        shapes = " and ".join(dict.fromkeys(str(one.sizes or tuple(one.mask.shape)) for one in every))
        repair = (
            "pass the shorter mask too: masked(mask, anynorm.shorten(mask, layer)), or model=model, which finds it"
            if self.own is None
            else "a function that changes positions (F.pad, slicing) is not seen: use a layer for it, or pass the mask "
            "of this part: masked({'': mask, 'its.name': other}, model=model), None where it has no padding"
        )
        raise ValueError(
            f"{layer}: no mask of anynorm.masked fits an input {show_shape(x)}, which needs one of {wanted}; got "
            f"{shapes}; {repair}"
        )

    def is_free(self, parts: Iterable[str]) -> bool:
        """Whether parts were said to have no padding."""
        known = [self.given[part] for part in parts if part in self.given]
        return bool(known) and all(masks is None for masks in known)

    def list_all(self) -> list[Known]:
        """The masks of all parts."""
        return [one for part in self.given for one in [*(self.given[part] or []), *self.derived[part]]]

    def fits(self, wanted: Sizes) -> bool:
        """Whether any mask fits these positions."""
        return any(True for known in self.list_all() for _ in known.find_views(wanted))

    def has_padding(self, wanted: Sizes) -> bool:
        """Whether a mask that is not full fits these positions."""
        return any(not known.is_full for known in self.list_all() if any(True for _ in known.find_views(wanted)))

    def hold(self, mask: Tensor, sizes: Sizes, x: Any, parts: frozenset[str], is_output: bool) -> None:
        """Remember that a mask is this tensor's own."""
        if self.own is not None and isinstance(x, Tensor):
            self.own[x] = Own(self.intern(mask, sizes), parts, is_output)

    def find_own(self, x: Any) -> Known | None:
        """The mask that is this tensor's own."""
        own = self.own.get(x) if self.own is not None and isinstance(x, Tensor) else None
        return None if own is None else own.known

    def intern(self, mask: Tensor, sizes: Sizes) -> Known:
        """One object for each mask, so that what follows from it is computed once."""
        alike = self.held.setdefault((sizes, mask.shape), [])
        for known in alike:
            if is_same(known.mask, mask):
                return known
        alike.append(Known(mask, sizes))
        return alike[-1]

    def add(self, parts: Iterable[str], known: Known) -> None:
        """A mask that holds behind a layer."""
        for part in parts:
            if part in self.derived and known not in self.derived[part]:
                self.derived[part].append(known)


def show_real(mask: Tensor) -> str:
    """A mask in few words."""
    counts = mask.flatten(1).sum(1).tolist()
    more = ", ..." if len(counts) > 6 else ""
    return f"{tuple(mask.shape)} with {', '.join(map(str, counts[:6]))}{more} real positions"


def show_shape(x: Any) -> str:
    """The shape of an input."""
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
