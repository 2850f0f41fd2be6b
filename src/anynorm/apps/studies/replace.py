"""A finished network with each of its norms replaced by another, at the same place and over as many channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anynorm.doctor.norms import find_kind

from .norms import NormFactory, find_arm


class NoNorm(Exception):
    """A network in which there is nothing to replace; the message is the reason."""


def replace_norms(network: nn.Module, make_norm: NormFactory, example: tuple[Tensor, ...]) -> nn.Module:
    """Replace the norms of torch.nn in a network, in place.

    A norm stays as it is where the new one is of its kind, so that eps, momentum and groups are those that its author
    chose. Gamma and beta go over where they have one value for each channel.

    Args:
        network: of the user's; it is called once, in evaluation mode, to see over what its norms go.
        make_norm: called with (num_features, dims) for each norm that a forward pass runs.
        example: arguments of that call.
    """
    shapes = find_input_shapes(network, example)
    if not shapes:
        raise NoNorm(
            "its network runs no norm of torch.nn (batch, layer, instance, group or RMS), so every norm would train "
            "the same one; let the factory take norm(num_features, dims)"
        )
    # By object and not by name: a norm may stand at several places.
    swaps = {id(old): make_replacement(old, shape, make_norm) for old, shape in shapes.items()}
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):  # where named_children leaves out repetitions
            if id(child) in swaps:
                setattr(parent, name, swaps[id(child)])
    return network


def find_input_shapes(network: nn.Module, example: tuple[Tensor, ...]) -> dict[nn.Module, tuple[int, ...]]:
    """Shapes that the norms of a network receive; those that a forward pass does not run are left out."""
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def note(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        shapes[norm] = tuple(inputs[0].shape)

    norms = [module for module in network.modules() if module is not network and find_kind(type(module)) is not None]
    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    modes = [(module, module.training) for module in network.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            network.eval()(*example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return shapes


def make_replacement(old: nn.Module, shape: tuple[int, ...], make_norm: NormFactory) -> nn.Module:
    """The norm that takes the place of an old one which receives inputs of this shape; the old one where it stays."""
    last = has_channels_last(old, len(shape))
    new = make_norm(shape[-1] if last else shape[1], len(shape) - 2)
    if find_arm(new) == find_kind(type(old)):
        return old
    copy_affine(old, new)
    if last and len(shape) > 2:
        # Hooks and not a module around it, which would change the names in the state_dict.
        new.register_forward_pre_hook(move_channels_forward)
        new.register_forward_hook(move_channels_back)
    return new


def has_channels_last(norm: nn.Module, axes: int) -> bool:
    """Whether a norm's channels are the last axis of its input, as those of layer norm over features are."""
    shape = getattr(norm, "normalized_shape", None)
    return shape is not None and len(shape) < axes - 1


def copy_affine(old: nn.Module, new: nn.Module) -> None:
    """Give the new norm gamma and beta of the old one, where their shapes agree."""
    for name in ("weight", "bias"):
        mine, theirs = getattr(new, name, None), getattr(old, name, None)
        if isinstance(mine, Tensor) and isinstance(theirs, Tensor) and mine.shape == theirs.shape:
            with torch.no_grad():
                mine.copy_(theirs)


def move_channels_forward(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """From (N, ..., C) to (N, C, ...)."""
    return (inputs[0].movedim(-1, 1), *inputs[1:])


def move_channels_back(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """From (N, C, ...) to (N, ..., C)."""
    return output.movedim(1, -1)
