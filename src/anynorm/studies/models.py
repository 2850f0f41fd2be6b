"""The networks that are compared: two built in, or one of the user's own; each is built from a norm factory."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import nn

from anynorm.errors import UserError

from .norms import NormFactory, check_dims

BUILT_IN = ("cnn", "mlp")


@dataclass(frozen=True)
class Model:
    """A network by name: what a worker needs to build it, and what identifies its definition."""

    name: str
    fingerprint: str
    about: str


class NotForThisData(Exception):
    """A built-in network that cannot take these samples; the message is the reason, shown beside n/a."""


def cnn(norm: NormFactory, sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two 3 x 3 convolutions of stride 2, 8 and 16 channels, each normalized before its ReLU, and a dense output."""
    if len(sample_shape) not in (2, 3):
        raise NotForThisData(f"the cnn takes images, (N, H, W) or (N, C, H, W), and a sample here is {sample_shape}")
    channels, height, width = sample_shape if len(sample_shape) == 3 else (1, *sample_shape)
    # Larger images are pooled down to 7 x 7, so that the output layer stays as small as it is on MNIST.
    size = (min(7, -(-height // 4)), min(7, -(-width // 4)))
    return nn.Sequential(
        nn.Unflatten(1, (1, height)) if len(sample_shape) == 2 else nn.Identity(),
        nn.Conv2d(channels, 8, 3, stride=2, padding=1),
        norm(8, 2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        norm(16, 2),
        nn.ReLU(),
        nn.Identity() if max(height, width) <= 28 else nn.AdaptiveAvgPool2d(size),
        nn.Flatten(),
        nn.Linear(16 * size[0] * size[1], classes),
    )


def mlp(norm: NormFactory, sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Three dense layers of 100 units, each normalized before its ReLU, and a dense output."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = prod(sample_shape)
    for _ in range(3):
        layers += [nn.Linear(width, 100), norm(100, 0), nn.ReLU()]
        width = 100
    return nn.Sequential(*layers, nn.Linear(width, classes))


def find_model(name: str) -> Model:
    """A built-in network, or the user's `module:factory` with a fingerprint of the module's source."""
    if name in BUILT_IN:
        builder = cnn if name == "cnn" else mlp
        digest = hashlib.sha256(inspect.getsource(builder).encode()).hexdigest()
        return Model(name, digest, (builder.__doc__ or "").strip())
    factory = find_factory(name)
    module = sys.modules[name.partition(":")[0]]
    path = getattr(module, "__file__", None)
    source = Path(path).read_bytes() if path and path.endswith(".py") else repr(factory).encode()
    digest = hashlib.sha256(name.encode() + b"\0" + source).hexdigest()
    return Model(name, digest, f"the network that {name} builds")


def find_factory(name: str) -> Callable[[NormFactory], nn.Module]:
    """The callable that `module:factory` names, with modules of the working directory importable."""
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise UserError(
            f"compare --model: takes {', '.join(BUILT_IN)} or module:factory, as in net:make; got {name!r}."
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    # A user's module may raise anything while it is imported, even SystemExit.
    except (Exception, SystemExit) as problem:
        raise UserError(
            f"compare --model: module {module_name!r} does not import ({describe(problem)}); "
            f"run from the directory that holds it, and give its name without .py."
        ) from problem
    factory = getattr(module, attribute, None)
    if not callable(factory):
        what = "has nothing of that name" if factory is None else f"holds a {type(factory).__name__}"
        raise UserError(
            f"compare --model: {name!r} must name a function that takes norm(num_features, dims) and returns a "
            f"network; {module_name} {what}; check the name after the colon."
        )
    return factory


def build(name: str, norm: NormFactory, sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network with this norm.

    Args:
        name: `cnn`, `mlp` or `module:factory`.
        norm: called with (num_features, dims) wherever the network normalizes.
        sample_shape: shape of one sample; classes: outputs wanted. The user's own factory knows both.
    """

    def checked(num_features: int, dims: int) -> nn.Module:
        check_dims(dims)
        return norm(num_features, dims)

    if name in BUILT_IN:
        return (cnn if name == "cnn" else mlp)(checked, sample_shape, classes)
    network = find_factory(name)(checked)
    if not isinstance(network, nn.Module):
        raise TypeError(f"it returned a {type(network).__name__}, not a torch.nn.Module")
    return network


def describe(problem: BaseException) -> str:
    """An exception on one line: its type and the first line of what it says."""
    lines = str(problem).strip().splitlines()
    text = lines[0].rstrip(".") if lines else ""
    return f"{type(problem).__name__}: {text}"[:200] if text else type(problem).__name__
