"""What layers remember beside torch's state_dict, saved and loaded for a whole model.

A state_dict is torch's own, key by key, so that checkpoints load both ways. What a layer needs beyond that has two
methods there, `extra_state` and `load_extra_state`, and is found here by them.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn


def find_layers(model: nn.Module) -> dict[str, Any]:
    """Layers that remember more, by their names in the model."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "load_extra_state")}


def extra_state(model: nn.Module) -> dict[str, dict[str, float]]:
    """What a model's layers remember beside its state_dict: how far `BatchRenorm2d` and its like are in their schedule.

    Args:
        model: any module; a norm itself is allowed.

    Returns:
        For each such layer, by its name, a dict of numbers; empty where there is none. torch.save and json take it.

    Example:
        >>> model = torch.nn.Sequential(anynorm.BatchRenorm1d(2))
        >>> _ = model(torch.randn(4, 2))
        >>> anynorm.extra_state(model)
        {'0': {'batches': 1, 'start_share': 0.9}}
    """
    return {name: layer.extra_state() for name, layer in find_layers(model).items()}


def load_extra_state(model: nn.Module, state: dict[str, dict[str, float]]) -> None:
    """Give a model's layers what `extra_state` found. Call it after `load_state_dict`, which sets them anew.

    Args:
        model: any module.
        state: from `extra_state`, of a model with the same layers.

    Raises:
        RuntimeError: names that the model has not, or layers that `state` has not; nothing is changed then.

    Example:
        >>> model = torch.nn.Sequential(anynorm.BatchRenorm1d(2))
        >>> anynorm.load_extra_state(model, {"0": {"batches": 7, "start_share": 0.5}})
        >>> model[0].batches
        tensor(7)
    """
    layers = find_layers(model)
    if layers.keys() != state.keys():
        unknown, missing = sorted(state.keys() - layers.keys()), sorted(layers.keys() - state.keys())
        raise RuntimeError(
            f"load_extra_state: state must name the layers of the model; got unknown {unknown}, missing {missing}; "
            "load it into a model that is built as the saved one was"
        )
    for name, layer in layers.items():
        layer.load_extra_state(state[name])
