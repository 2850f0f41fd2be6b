"""The networks that are compared: two built in, or one of the user's own; each is built from a norm factory."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import site
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from anynorm.apps.factory import import_from, split_spec
from anynorm.errors import UserError

from .norms import NORMS, CannotNormalize, NormFactory, check_dims

BUILT_IN = ("cnn", "mlp")


@dataclass(frozen=True)
class Model:
    """A network by name: what a worker needs to build it, and what identifies its definition."""

    name: str
    fingerprint: str
    about: str


SIGNATURE = inspect.Signature(
    [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("num_features", "dims")]
)


class NotBuilt(Exception):
    """A user's factory that gives no network; the message is the reason."""


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


def dense(
    norm: NormFactory,
    sample_shape: tuple[int, ...],
    classes: int,
    *,
    depth: int = 3,
    activation: Callable[[], nn.Module] = nn.ReLU,
    start: Callable[[torch.Tensor], object] | None = None,
) -> nn.Module:
    """Dense layers of 100 units, each normalized before its activation, and a dense output.

    Args:
        norm, sample_shape, classes: as every network here takes them.
        depth: how many layers are normalized.
        activation: its class.
        start: fills each weight, and biases start at 0; torch's own start where None.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    width = prod(sample_shape)
    for _ in range(depth):
        layers += [nn.Linear(width, 100), norm(100, 0), activation()]
        width = 100
    network = nn.Sequential(*layers, nn.Linear(width, classes))
    if start is not None:
        for layer in network:
            if isinstance(layer, nn.Linear):
                start(layer.weight)
                nn.init.zeros_(layer.bias)
    return network


def mlp(norm: NormFactory, sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Three dense layers of 100 units, each normalized before its ReLU, and a dense output."""
    return dense(norm, sample_shape, classes)


def find_model(name: str, sample_shape: tuple[int, ...], classes: int) -> Model:
    """A built-in network, or the user's `module:factory` with a fingerprint of its sources and of what it builds."""
    if name in BUILT_IN:
        builder = cnn if name == "cnn" else mlp
        digest = hashlib.sha256(inspect.getsource(builder).encode()).hexdigest()
        return Model(name, digest, (builder.__doc__ or "").strip())
    factory, module = find_factory(name)
    # Built before the sources are listed, because a factory may import as well.
    network = describe_network(name, sample_shape, classes)
    whole = json.dumps([name, drop_addresses(repr(factory)), network, find_sources(module)])
    return Model(name, hashlib.sha256(whole.encode()).hexdigest(), f"the network that {name} builds")


def describe_network(name: str, sample_shape: tuple[int, ...], classes: int) -> str:
    """Layers and shapes of parameters without a norm; what goes wrong where it cannot be built."""
    torch.manual_seed(0)
    try:
        network = build(name, NORMS["none"], sample_shape, classes)
        shapes = [(key, tuple(parameter.shape)) for key, parameter in network.named_parameters()]
        return drop_addresses(f"{network!r} {shapes}")
    # The check of every network with every norm reports it.
    except Exception as problem:
        return describe(problem)


def find_sources(module: ModuleType) -> list[tuple[str, str]]:
    """Name and digest of a module's file and of the files of all imported modules in or below its directory.

    Python and installed packages do not count, though a virtual environment may lie there: which of their modules are
    imported differs between a terminal and a log.
    """
    own = find_file(module)
    if own is None:
        return []
    installed = [Path(path).resolve() for path in (sys.prefix, sys.base_prefix, site.getuserbase())]
    installed = [path for path in installed if path.is_relative_to(own.parent)]
    found = {module.__name__: own}
    for name, other in list(sys.modules.items()):
        path = find_file(other)
        if path is None or name == "__main__" or not path.is_relative_to(own.parent):
            continue
        if not any(path.is_relative_to(root) for root in installed):
            found[name] = path
    return [(name, hashlib.sha256(path.read_bytes()).hexdigest()) for name, path in sorted(found.items())]


def find_file(module: object) -> Path | None:
    """The file that a module came from; None where there is none."""
    # A lazy module's attributes may import others; its own dictionary does not.
    path = getattr(module, "__dict__", {}).get("__file__")
    return Path(path).resolve() if isinstance(path, str) and Path(path).is_file() else None


def drop_addresses(text: str) -> str:
    """Text without the addresses of objects, which differ between processes."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def find_factory(name: str) -> tuple[Callable[[NormFactory], nn.Module], ModuleType]:
    """The callable that `module:factory` or `file.py:factory` names, and the module that holds it."""
    parts = split_spec(name)
    if parts is None:
        raise UserError(
            f"compare --model: takes {', '.join(BUILT_IN)}, module:factory or file.py:factory, as in net:make; "
            f"got {name!r}."
        )
    module_name, attribute = parts
    if "" not in sys.path and str(Path.cwd()) not in sys.path:  # a factory may import from there when it is called
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_from(module_name)
    # A user's module may raise anything while it is imported, even SystemExit.
    except (Exception, SystemExit) as problem:
        raise UserError(
            f"compare --model: module {module_name!r} does not import ({describe(problem)}); "
            f"run from the directory that holds it, or give the path of its file."
        ) from problem
    factory = getattr(module, attribute, None)
    if not callable(factory):
        what = "has nothing of that name" if factory is None else f"holds a {type(factory).__name__}"
        raise UserError(
            f"compare --model: {name!r} must name a function that takes norm(num_features, dims) and returns a "
            f"network; {module_name} {what}; check the name after the colon."
        )
    return factory, module


def build(name: str, make_norm: NormFactory, sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network with this norm.

    Args:
        name: `cnn`, `mlp`, `module:factory` or `file.py:factory`.
        make_norm: called with (num_features, dims) wherever the network normalizes.
        sample_shape: shape of one sample; classes: outputs wanted. The user's own factory knows both.

    Raises:
        NotBuilt: the user's factory raised or returned something else.
    """

    def norm(*arguments: Any, **named: Any) -> nn.Module:
        num_features, dims = check_call(arguments, named)
        return make_norm(num_features, dims)

    if name in BUILT_IN:
        return (cnn if name == "cnn" else mlp)(norm, sample_shape, classes)
    factory, _ = find_factory(name)
    try:
        network = factory(norm)
    except CannotNormalize:
        raise
    except Exception as problem:  # the user's code may raise anything
        raise NotBuilt(describe(problem)) from problem
    if not isinstance(network, nn.Module):
        raise NotBuilt(f"it returned a {type(network).__name__}, not a torch.nn.Module")
    return network


def check_call(arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[int, int]:
    """What a factory passed to `norm`, where it passed both."""
    try:
        bound = SIGNATURE.bind(*arguments, **named)
    except TypeError:
        given = ", ".join([*map(repr, arguments), *(f"{name}={value!r}" for name, value in named.items())])
        raise TypeError(
            "norm takes (num_features, dims), and dims counts the spatial axes: 0 for (N, C), 1 for (N, C, L), 2 for "
            f"(N, C, H, W); it was called as norm({given})"
        ) from None
    num_features, dims = bound.args
    check_dims(dims)
    return num_features, dims


def describe(problem: BaseException) -> str:
    """An exception on one line: its type and the first line of what it says."""
    lines = str(problem).strip().splitlines()
    text = lines[0].rstrip(".") if lines else ""
    return f"{type(problem).__name__}: {text}"[:300] if text else type(problem).__name__
