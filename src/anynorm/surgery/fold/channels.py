"""Where a channel goes when its tensor is reshaped: labels take the way of the tensor and are read at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor, fx

from .passing import find_module, is_moving

UNKNOWN = "which axis its channels are on there is not known without sizes; pass example=inputs of a call"
APART = "its channels are not the features there"
Shape = tuple[int, ...]


class Unclear(Exception):
    """The channels do not arrive one by one."""


def follow(
    path: Sequence[fx.Node],
    modules: dict[str, nn.Module],
    start: Tensor,
    only_moving: bool,
    source: fx.Node,
    values: dict[fx.Node, Any],
) -> Tensor:
    """What comes out of a path of nodes.

    Args:
        start: what goes in, which is the output of `source`.
        only_moving: leave pools and borders out, whose sizes do not fit a start that is made up.
        values: sizes that are known.
    """
    known = {source: start, **values}
    current = start
    for node in path:
        if not only_moving or is_moving(node, modules):
            current = call(node, modules, current, known)
        known[node] = current
    return current


def call(node: fx.Node, modules: dict[str, nn.Module], x: Tensor, known: dict[fx.Node, Any]) -> Tensor:
    """Call what a node calls, on another tensor."""
    module = find_module(node, modules)
    with torch.no_grad():
        if module is not None:
            forward: Any = type(module).forward  # past hooks
            moved: Tensor = forward(module, x)
            return moved
        args, kwargs = fx.map_arg((node.args[1:], node.kwargs), lambda each: compute_size(each, known))
        function: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
        result: Tensor = function(x, *args, **kwargs)
    return result


def compute_size(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The value of a node that is computed of sizes of tensors that are known.

    Raises:
        Unclear: it is computed of something else.
    """
    if node in known:
        return known[node]
    if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
        raise Unclear(UNKNOWN)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: compute_size(each, known))
    function: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
    return function(*args, **kwargs)


def label(shape: Shape, axis: int) -> tuple[Tensor, Tensor]:
    """A tensor in which each place has its channel's label, and the labels: no mean of some is another one."""
    cpu = torch.device("cpu")
    labels = torch.rand(shape[axis], generator=torch.Generator(cpu).manual_seed(0), dtype=torch.float64, device=cpu)
    return labels.view(-1, *(1,) * (len(shape) - 1 - axis)).expand(shape).contiguous(), labels


def read_labels(found: Tensor, labels: Tensor, axis: int) -> Tensor:
    """The label's number at each place, with the axis of channels first."""
    order = labels.argsort()
    flat = found.movedim(axis, 0).flatten(1)
    place = torch.searchsorted(labels[order], flat.contiguous() - 1e-12).clamp(max=len(labels) - 1)
    numbers = order[place]
    if not bool(((labels[numbers] - flat).abs() < 1e-9).all()):
        raise Unclear(APART)
    return numbers


def map_forward(found: Tensor, labels: Tensor, axis: int) -> Tensor:
    """For each channel at the end of the path, which one at its start it holds."""
    numbers = read_labels(found, labels, axis)
    if bool((numbers != numbers[:, :1]).any()):
        raise Unclear(APART)
    return numbers[:, 0]


def map_backward(found: Tensor, labels: Tensor, axis: int) -> Tensor:
    """For each channel at the start of the path, in which one at its end it arrives."""
    numbers = read_labels(found, labels, axis)
    channels = torch.full((len(labels),), -1, dtype=torch.long, device="cpu")
    ends = torch.arange(len(numbers), device="cpu").view(-1, 1).expand_as(numbers)
    channels[numbers.flatten()] = ends.flatten()
    if bool((channels[numbers] != ends).any()) or bool((channels < 0).any()):
        raise Unclear(APART)
    return channels


def guess_shapes(channels: int, ranks: Iterable[int], many: int) -> list[Shape]:
    """Shapes that a tensor might have whose channels stand at axis 1, or last in two and three axes.

    Args:
        many: of the positions, how many a channel may have where they become features.
    """
    found = []
    for rank in ranks:
        rest = rank - 2
        sizes = [(many, 1), (2 * many, 1), (3, 2)] if rest else [(1, 1)]
        found += [(2, channels, *(first, *(other,) * (rest - 1))[:rest]) for first, other in sizes]
    return found


def agree(situations: Iterable[tuple[Any, ...]], attempt: Callable[..., Tensor | None]) -> Tensor:
    """The one answer in all situations.

    Args:
        situations: arguments of `attempt`.
        attempt: the channels in a situation; None where it cannot be.

    Raises:
        Unclear: there are several answers, or none.
    """
    answers: list[Tensor] = []
    reasons: list[str] = []
    for situation in situations:
        try:
            answer = attempt(*situation)
        except Unclear as unclear:
            reasons.append(str(unclear))
            continue
        except (RuntimeError, IndexError, ValueError, TypeError):
            continue  # no call with such a shape
        if answer is not None:
            answers.append(answer)
    if not answers:
        raise Unclear(reasons[0] if reasons else UNKNOWN)
    if reasons or any(not torch.equal(answer, answers[0]) for answer in answers):
        raise Unclear(UNKNOWN)
    return answers[0]
