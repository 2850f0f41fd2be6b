"""Which mask holds for a tensor: the one that is recorded for it, else one that fits its positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..engine.watch import has_memory

Sizes = tuple[int, ...]
ROOT = ""  # the name of the model itself among its parts, as in model.named_modules()
REPAIR = (
    "pass each part of the model its own: masked({'encoder': mask, 'decoder': other}, model=model), or write functions "
    "between layers as modules (nn.ReLU), behind which a mask is followed"
)


class SizedMask:
    """A mask, and the positions that it is for.

    Args:
        mask: (N, positions...), bool; size 1 where samples or positions share it.
        sizes: of samples and positions; None for a mask that was given, which broadcasts.
    """

    mask: Tensor
    sizes: Sizes | None

    def __init__(self, mask: Tensor, sizes: Sizes | None = None) -> None:
        self.mask, self.sizes = mask, sizes

    @cached_property
    def is_full(self) -> bool:
        """Whether there is no padding."""
        return bool(self.mask.all())

    def list_reshapes(self, axes: int) -> Iterator[tuple[Tensor, list[int | None]]]:
        """The mask with so many axes, in every way, and the sizes it is for; None is any size.

        (N, L) serves (N, F, L) and (N, L, F) too, and (N, 1, L) serves (N, L): maps of time and frequency, and what
        becomes of them where frequencies and channels are joined.
        """
        mask = self.mask
        # A mask that was given is shared along axes of size 1; in a derived one size 1 is one position.
        sizes = [None if size == 1 and self.sizes is None else size for size in self.sizes or mask.shape]
        if len(sizes) == axes:
            yield mask, sizes
        elif len(sizes) == 2 < axes:
            for axis in range(1, axes):
                shape, reshaped_sizes = [1] * axes, [sizes[0], *[None] * (axes - 1)]
                shape[0], shape[axis], reshaped_sizes[axis] = mask.shape[0], mask.shape[1], sizes[1]
                yield mask.reshape(shape), reshaped_sizes
        elif len(sizes) > axes:
            kept = [axis for axis, size in enumerate(mask.shape) if not axis or size != 1]
            if len(kept) == axes:
                yield mask.reshape([mask.shape[axis] for axis in kept]), [sizes[axis] for axis in kept]

    def find_fitting(self, wanted: Sizes) -> Iterator[Tensor]:
        """Those reshapes of the mask that fit samples and positions."""
        for mask, sizes in self.list_reshapes(len(wanted)):
            if all(size is None or size == other for size, other in zip(sizes, wanted, strict=True)):
                yield mask


def find_fitting(masks: Iterable[SizedMask], wanted: Sizes) -> list[Tensor]:
    """The masks that fit, each once where several are the same."""
    found: list[Tensor] = []
    for sized in masks:
        for mask in sized.find_fitting(wanted):
            if not any(is_same(mask, other) for other in found):
                found.append(mask)
    return found


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two masks that fit the same positions are the same there."""
    if one is other:
        return True
    if not has_memory(one, other):
        return False
    return torch.equal(*torch.broadcast_tensors(one, other.to(one.device)))


class Record(NamedTuple):
    """The mask of one tensor.

    Attributes:
        parts: of the model, where the mask was found.
        is_output: whether the tensor came out of a layer there.
    """

    mask: SizedMask
    parts: frozenset[str]
    is_output: bool


class MaskRegistry:
    """The masks of a context: those that were given for each part of a model, and those derived behind its layers.

    Args:
        given: by the name of the part, "" for the whole model; None for a part without padding.
        follow: whether masks are followed from tensor to tensor.
    """

    def __init__(self, given: dict[str, list[SizedMask] | None], follow: bool) -> None:
        self.given = given
        self.derived: dict[str, list[SizedMask]] = {name: [] for name in given}
        self.interned: dict[Any, list[SizedMask]] = {}
        # By the object, not by its values, and weak: a tensor that is gone may leave its address to another.
        self.records: WeakTensorKeyDictionary | None = WeakTensorKeyDictionary() if follow else None

    def find(self, layer: str, parts: frozenset[str], wanted: Sizes, x: Any, is_named: bool = False) -> Tensor | None:
        """The mask for a tensor: its own; else the one that fits in its part of the model; else in any part.

        What is found is recorded as the tensor's own.

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
        if self.is_unpadded(parts):
            return None
        record = None if self.records is None else self.records.get(x)
        for masks in self.list_candidates(record, parts, is_named):
            found = find_fitting(masks, wanted)
            if len(found) > 1:
                got = " and ".join(format_counts(mask) for mask in found)
                raise ValueError(
                    f"{layer}: several masks of anynorm.masked fit an input of positions {wanted} and differ; got "
                    f"{got}; {REPAIR}"
                )
            if found:
                self.record(found[0], wanted, x, parts, record is not None and record.is_output)
                return found[0]
        if len(wanted) < 2:
            return None
        raise ValueError(self.explain_misfit(layer, wanted, x))

    def list_candidates(
        self, record: Record | None, parts: frozenset[str], is_named: bool
    ) -> tuple[list[SizedMask], list[SizedMask], list[SizedMask]]:
        """The masks that are asked one list after the other: the tensor's own, those of its part, those of all."""
        of_tensor: list[SizedMask] = []
        of_parts = [mask for part in parts for mask in [*(self.given.get(part) or []), *self.derived.get(part, [])]]
        if record is not None and record.parts == parts:
            of_tensor = [record.mask]
        elif record is not None and record.is_output and not is_named:
            # From a layer of another part: this part's masks may say otherwise, so it is one among them.
            of_parts.append(record.mask)
        return of_tensor, of_parts, self.list_all()

    def explain_misfit(self, layer: str, wanted: Sizes, x: Any) -> str:
        """The message where no mask fits."""
        shapes = " and ".join(dict.fromkeys(str(mask.sizes or tuple(mask.mask.shape)) for mask in self.list_all()))
        repair = (
            "pass the shorter mask too: masked(mask, anynorm.shorten(mask, layer)), or model=model, which finds it"
            if self.records is None
            else "a function that changes positions (F.pad, slicing) is not seen: use a layer for it, or pass the mask "
            "of this part: masked({'': mask, 'its.name': other}, model=model), None where it has no padding"
        )
        shape = str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
        return (
            f"{layer}: no mask of anynorm.masked fits an input {shape}, which needs one of {wanted}; got "
            f"{shapes}; {repair}"
        )

    def is_unpadded(self, parts: Iterable[str]) -> bool:
        """Whether parts were said to have no padding."""
        given = [self.given[part] for part in parts if part in self.given]
        return bool(given) and all(masks is None for masks in given)

    def list_all(self) -> list[SizedMask]:
        """The masks of all parts."""
        return [mask for part in self.given for mask in [*(self.given[part] or []), *self.derived[part]]]

    def fits(self, wanted: Sizes) -> bool:
        """Whether any mask fits these positions."""
        return any(True for mask in self.list_all() for _ in mask.find_fitting(wanted))

    def has_padding(self, wanted: Sizes) -> bool:
        """Whether a mask that is not full fits these positions."""
        return any(not mask.is_full for mask in self.list_all() if any(True for _ in mask.find_fitting(wanted)))

    def record(self, mask: Tensor, sizes: Sizes, x: Any, parts: frozenset[str], is_output: bool) -> None:
        """Remember that a mask is this tensor's own."""
        if self.records is not None and isinstance(x, Tensor):
            self.records[x] = Record(self.intern(mask, sizes), parts, is_output)

    def find_recorded(self, x: Any) -> SizedMask | None:
        """The mask that is this tensor's own."""
        record = self.records.get(x) if self.records is not None and isinstance(x, Tensor) else None
        return None if record is None else record.mask

    def intern(self, mask: Tensor, sizes: Sizes) -> SizedMask:
        """One object for each mask, so that what follows from it is computed once."""
        same_shape = self.interned.setdefault((sizes, mask.shape), [])
        for sized in same_shape:
            if is_same(sized.mask, mask):
                return sized
        same_shape.append(SizedMask(mask, sizes))
        return same_shape[-1]

    def add_derived(self, parts: Iterable[str], mask: SizedMask) -> None:
        """Register a mask that holds behind a layer, for each part that the layer belongs to."""
        for part in parts:
            if part in self.derived and mask not in self.derived[part]:
                self.derived[part].append(mask)


def format_counts(mask: Tensor) -> str:
    """A mask in few words: its shape, and how many positions of each sample are real."""
    counts = mask.flatten(1).sum(1).tolist()
    more = ", ..." if len(counts) > 6 else ""
    return f"{tuple(mask.shape)} with {', '.join(map(str, counts[:6]))}{more} real positions"
