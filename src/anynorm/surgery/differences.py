"""How far apart are two runs of a model? Its outputs, and those of its layers, before and after it was changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..modules.frozen import Frozen
from ..randomness import keep_randomness

# Of the largest output: what rounding in other places may change.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
TOLERANCES |= {torch.complex128: 1e-12, torch.complex64: 1e-5, torch.complex32: 5e-3}


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a tensor is from what it was.

    Attributes:
        largest, mean: absolute, over its elements; inf where shapes differ or only one of both is NaN.
        scale: the largest absolute value that it had.
        name: of the output (``"output"``, ``"output['logits']"``) or of the layer.
        dtype: that it had.
    """

    largest: float
    scale: float
    mean: float = 0.0
    name: str = ""
    dtype: torch.dtype = torch.float32

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest value."""
        return self.largest / self.scale if self.scale else self.largest

    def is_within(self, tolerance: float | None) -> bool:
        """Whether `relative` is at most the tolerance; None for what rounding in the tensor's dtype explains."""
        return self.relative <= (TOLERANCES.get(self.dtype, 0.0) if tolerance is None else tolerance)

    def __str__(self) -> str:
        return (
            f"{self.name}: largest difference {self.largest:.2g}, mean {self.mean:.2g}, of values to {self.scale:.3g}"
        )


def measure(one: Tensor | None, other: Tensor | None, name: str = "") -> Difference:
    """Return how far `other` is from `one`; equal infinities and NaN on both sides are no difference."""
    if one is None or other is None or one.shape != other.shape:
        return Difference(math.inf, 1.0, math.inf, name)
    if one.numel() == 0:
        return Difference(0.0, 0.0, 0.0, name, one.dtype)
    wide = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
    a, b = one.detach().to(wide), other.detach().to(wide)
    gap = (a - b).abs()
    gap[(a == b) | (a.isnan() & b.isnan())] = 0.0
    gap = gap.nan_to_num(nan=math.inf)
    scale = a.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    return Difference(gap.max().item(), scale, gap.mean().item(), name, one.dtype)


def find_tensors(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors inside a tensor, tuple, list, dict or dataclass, in order, each with the way to it.

    The parts of a nested tensor stand in one row: their shapes are symbols, which are not the same in two calls.
    """
    if isinstance(value, Tensor) and value.is_nested:
        yield name, torch.cat([part.flatten() for part in value.unbind()])
    elif isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from find_tensors(part, f"{name}[{key!r}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from find_tensors(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            yield from find_tensors(part, f"{name}[{place}]")


def call(model: nn.Module, example: Any) -> Any:
    """Call a model with a tuple's elements, with a dict's entries by name, or with anything else as it is.

    Tensors are copied: the model may write in them, and the next call is to get the same.
    """
    example = copy_tensors(example)
    if isinstance(example, Mapping):
        return model(**example)
    # A PackedSequence is a tuple, and one argument.
    return model(*example) if type(example) in (tuple, list) else model(example)


def copy_tensors(value: Any) -> Any:
    """The same with other tensors, also inside of plain tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(copy_tensors(part) for part in value)
    return {key: copy_tensors(part) for key, part in value.items()} if type(value) is dict else value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation, without gradients, from a fixed seed; then as before.

    `train` is not called: it may do more than set a mode. What a frozen norm notes of its mode moves its averages.
    """
    places = [part for module in model.modules() for part in (module, vars(module).get("frozen"))]
    modes = [(part, part.training) for part in places if isinstance(part, (nn.Module, Frozen))]
    with keep_randomness(), torch.no_grad():
        try:
            for part, _ in modes:
                part.training = False
            yield
        finally:
            for part, training in modes:
                part.training = training


@dataclasses.dataclass(frozen=True)
class Run:
    """What a model returned for an example, and its layers by name, where they were asked for."""

    outputs: dict[str, Tensor]
    layers: dict[str, Tensor]

    def compare(self, later: Run) -> tuple[list[Difference], list[Difference]]:
        """Return how far a later run is from this one: its outputs, and the layers that both have."""
        names = dict.fromkeys((*self.outputs, *later.outputs))
        outputs = [measure(self.outputs.get(name), later.outputs.get(name), name) for name in names]
        both = [name for name in self.layers if name in later.layers]
        return outputs, [measure(self.layers[name], later.layers[name], name) for name in both]


def run(model: nn.Module, example: Any, per_layer: bool = False) -> Run:
    """Call a model in evaluation, from a fixed seed, without gradients; modes and random state are then as before.

    Args:
        model: see `evaluating`.
        example: the arguments of the call, see `call`.
        per_layer: keep what each layer without children returns, of several calls the last.
    """
    layers: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if per_layer:
            for name, module in model.named_modules():
                if not any(True for _ in module.children()):
                    stack.callback(module.register_forward_hook(make_recorder(name, layers)).remove)
        # Copies: a layer behind may write in the tensor that it was given.
        outputs = {name: tensor.clone() for name, tensor in find_tensors(call(model, example))}
    return Run(outputs, layers)


def make_recorder(name: str, layers: dict[str, Tensor]) -> Any:
    """The hook that keeps a layer's first output."""

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        for _, tensor in find_tensors(output):
            layers[name] = tensor.detach().clone()
            break

    return record
