"""On which axis are a norm's channels, where a layer takes or gives them?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor, fx

from .channels import Shape, Unclear, agree, follow, guess_shapes, label, map_backward, map_forward
from .graphs import Recording
from .layers import count_channels, count_dims
from .norms import FixedNorm, NotFoldable
from .passing import describe_node, is_concatenation, is_moving
from .ranks import find_rank

LAST = "it changes the last axis, and the norm another one"
UNKNOWN_RANK = "whether its features are the norm's channels is not known without sizes; pass example=inputs of a call"
Attempt = Callable[[Shape, dict[fx.Node, Any], bool], Tensor | None]


class Axes:
    """Maps the channels of layers to those of norms, in one graph."""

    recording: Recording
    modules: dict[str, nn.Module]

    def __init__(self, recording: Recording) -> None:
        self.recording, self.modules = recording, recording.modules

    def map_back(self, norm: FixedNorm, node: fx.Node, layer: nn.Module, path: Sequence[fx.Node]) -> Tensor:
        """For each output channel of a layer, the norm's."""
        many, channels = len(norm.scale), count_channels(layer, "output")
        in_part = any(is_concatenation(each) for each in path)
        if not any(is_moving(each, self.modules) for each in path):
            self.check_axes(norm, node, layer)
            if channels != many and not in_part:
                raise NotFoldable(f"{describe_node(node, self.modules)} has {channels} channels, not {many}")
            return torch.arange(channels, device="cpu")
        if in_part:
            raise NotFoldable("it takes a concatenation of what is reshaped")
        dims = count_dims(layer)

        def attempt(shape: Shape, values: dict[fx.Node, Any], is_guess: bool) -> Tensor | None:
            start, labels = label(shape, len(shape) - 1 if not dims else len(shape) - 1 - dims)
            found = follow(path, self.modules, start, is_guess, node, values)
            axis = find_norm_axis(norm, found.dim())
            if axis is None or found.shape[axis] != many:
                return None
            return map_backward(found, labels, axis)

        rank = self.find_rank(node)
        ratio = max(1, many // channels)
        if dims:
            guesses = guess_shapes(channels, [dims + 2], ratio)
        else:
            guesses = [(2, *(3, 4, 5)[: each - 2], channels) for each in ([rank] if rank else [2, 3, 4])]
        return self.settle(node, guesses, attempt)

    def map_on(
        self, norm: FixedNorm, call: fx.Node, node: fx.Node, layer: nn.Module, path: Sequence[fx.Node]
    ) -> Tensor:
        """For each input channel of a layer, the norm's."""
        many, channels = len(norm.scale), count_channels(layer, "input")
        if not any(is_moving(each, self.modules) for each in path):
            self.check_axes(norm, call, layer)
            if channels != many:
                raise NotFoldable(f"{describe_node(node, self.modules)} takes {channels} channels, not {many}")
            return torch.arange(channels, device="cpu")
        dims = count_dims(layer)

        def attempt(shape: Shape, values: dict[fx.Node, Any], is_guess: bool) -> Tensor | None:
            start_axis = find_norm_axis(norm, len(shape))
            if start_axis is None or shape[start_axis] != many:
                return None
            start, labels = label(shape, start_axis)
            found = follow(path, self.modules, start, is_guess, call, values)
            if dims and found.dim() != dims + 2:
                return None
            axis = 1 if dims else found.dim() - 1
            return map_forward(found, labels, axis) if found.shape[axis] == channels else None

        rank = self.find_rank(call)
        ranks = [rank] if rank else [norm.dims + 2] if norm.dims in (2, 3) else [2, 3] if norm.dims else [2, 3, 4, 5]
        return self.settle(call, guess_shapes(many, ranks, max(1, channels // many)), attempt)

    def settle(self, node: fx.Node, guesses: list[Shape], attempt: Attempt) -> Tensor:
        """The channels for the shapes of the example, or for any shape there may be."""
        situations: list[tuple[Any, ...]] = [(shape, {}, True) for shape in guesses]
        if self.recording.calls:
            situations = [(shapes[node], make_values(shapes), False) for shapes in self.recording.calls]
        try:
            return agree(situations, attempt)
        except Unclear as unclear:
            raise NotFoldable(str(unclear)) from None

    def find_rank(self, node: fx.Node) -> int | None:
        """How many axes a node's output has, where that is known."""
        ranks = {len(shapes[node]) for shapes in self.recording.calls if node in shapes}
        return ranks.pop() if len(ranks) == 1 else find_rank(node, self.modules) if not ranks else None

    def check_axes(self, norm: FixedNorm, node: fx.Node, layer: nn.Module) -> None:
        """Raise where the axis of the norm's channels is not that of the layer's at a node between them."""
        dims = count_dims(layer)
        if dims:
            is_single = self.find_rank(node) == dims + 1 and not norm.takes_single
            if norm.dims not in (None, dims) or is_single:
                raise NotFoldable(f"{type(layer).__name__} has other axes than the norm")
            return
        if norm.dims in (2, 3) or norm.takes_single:
            raise NotFoldable(f"{type(layer).__name__}: {LAST}")
        rank = self.find_rank(node)
        if rank != 2:
            raise NotFoldable(f"{type(layer).__name__}: {UNKNOWN_RANK if rank is None else LAST}")


def find_norm_axis(norm: FixedNorm, rank: int) -> int | None:
    """The axis of a norm's channels in a tensor of this rank; None where it takes no such tensor."""
    if norm.dims is None:
        return 1 if rank >= 2 else None
    if norm.takes_single:
        return rank - 1 - norm.dims if rank - norm.dims in (1, 2) else None
    return 1 if rank == norm.dims + 2 or (norm.dims == 1 and rank == 2) else None


def make_values(shapes: dict[fx.Node, Shape]) -> dict[fx.Node, Any]:
    """Tensors without memory, for what asks for sizes."""
    return {node: torch.empty(shape, dtype=torch.float32, device="meta") for node, shape in shapes.items()}
