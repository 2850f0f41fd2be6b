"""A start from weights of the user's: read from a file, and loaded as far as names and shapes agree."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor, nn

from anynorm.apps.weights import read_weights


@dataclass(frozen=True)
class Loaded:
    """What happened to a checkpoint's tensors in one network, by name."""

    loaded: tuple[str, ...]
    not_taken: tuple[str, ...]  # in the file, and without a place of that name and shape
    not_given: tuple[str, ...]  # parameters and buffers of the network that the file does not have


def load_checkpoint(network: nn.Module, path: str) -> Loaded:
    """Copy the tensors of a file into a network where names and shapes agree."""
    weights, own = read_checkpoint(path), network.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    network.load_state_dict(fitting, strict=False)
    return Loaded(
        tuple(fitting),
        tuple(name for name in weights if name not in fitting),
        tuple(name for name in own if name not in fitting),
    )


@lru_cache(maxsize=1)
def read_checkpoint(path: str) -> dict[str, Tensor]:
    """Tensors by name out of a file; read once in a process."""
    return read_weights("compare --checkpoint", path)


def find_digest(path: str) -> str:
    """Digest of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def say_checkpoint(path: str, loaded: Mapping[str, Loaded]) -> str:
    """What was loaded in each arm, in one sentence, arms that are alike together."""
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for arm, found in loaded.items():
        alike.setdefault((found.not_taken, found.not_given), []).append(arm)
    parts = []
    for (not_taken, not_given), arms in alike.items():
        faults = [
            f"{len(names)} of {what} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for what, names in (("the file found no place", not_taken), ("the network were not in it", not_given))
            if names
        ]
        parts.append(f"{', '.join(arms)}: {'; '.join(faults) or 'everything was loaded'}")
    return f"Every network starts from {path}. {'. '.join(parts)}. What was not loaded starts from the seed."
