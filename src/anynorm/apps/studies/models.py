"""The networks that are compared: two built in, or one of the user's own; each is built from a norm factory."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from anynorm.errors import UserError
from anynorm.randomness import keep_randomness

from .norms import NORMS, CannotNormalize, NormFactory, check_dims
from .replace import NoNorm, replace_norms
from .user_code import describe, drop_addresses, find_function, find_sources

BUILT_IN = ("cnn", "mlp")
TAKES = (
    "cnn, mlp, or module:factory or file.py:factory, as in net:make, a function that takes norm(num_features, dims), "
    "or nothing, and returns a network"
)


Example = tuple[Tensor, ...] | None  # arguments of one call of a network


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


def find_model(name: str, sample_shape: tuple[int, ...], classes: int, example: Example = None) -> Model:
    """A built-in network, or the user's `module:factory` with a fingerprint of its sources and of what it builds."""
    if name in BUILT_IN:
        builder = cnn if name == "cnn" else mlp
        digest = hashlib.sha256(inspect.getsource(builder).encode()).hexdigest()
        return Model(name, digest, (builder.__doc__ or "").strip())
    factory, module = find_factory(name)
    # Built before the sources are listed, because a factory may import as well.
    network = describe_network(name, sample_shape, classes, example)
    whole = json.dumps([name, drop_addresses(repr(factory)), network, find_sources(module)])
    return Model(name, hashlib.sha256(whole.encode()).hexdigest(), say_model(name, factory))


def say_model(name: str, factory: Callable[..., Any]) -> str:
    """What the user's network is, in words."""
    if takes_norm(factory):
        return f"the network that {name} builds"
    return (
        f"the network that {name} builds, each of its norms replaced by the one compared, at the same place and with "
        f"as many channels; where they are of a kind, its own stays, with its eps, momentum or groups"
    )


def describe_network(name: str, sample_shape: tuple[int, ...], classes: int, example: Example = None) -> str:
    """Layers and shapes of parameters without a norm; what goes wrong where it cannot be built."""
    torch.manual_seed(0)
    try:
        network = build(name, NORMS["none"], sample_shape, classes, example)
        shapes = [(key, tuple(parameter.shape)) for key, parameter in network.named_parameters()]
        return drop_addresses(f"{network!r} {shapes}")
    # The check of every network with every norm reports it.
    except Exception as problem:
        return describe(problem)


def find_factory(name: str) -> tuple[Callable[..., Any], Any]:
    """The function that makes the user's network, and the module that holds it."""
    with keep_randomness():  # A module may draw when it is imported, once in a process; a seed's start must not.
        factory, module = find_function("--model", name, TAKES)
    if isinstance(factory, nn.Module):
        raise UserError(
            f"compare --model: takes a function that makes a network, because every seed starts afresh; {name!r} is a "
            f"network; write def make(): return ... around what makes it."
        )
    return factory, module


def takes_norm(factory: Callable[..., Any]) -> bool:
    """Whether a factory is called with norm: where its first argument is so called, or cannot be left out."""
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):  # Some callables of C have no signature.
        return True
    if any(parameter.name == "norm" for parameter in parameters):
        return True
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(parameter.kind in by_place and parameter.default is parameter.empty for parameter in parameters)


def build(
    name: str,
    make_norm: NormFactory,
    sample_shape: tuple[int, ...],
    classes: int,
    example: Example = None,
) -> nn.Module:
    """The network with this norm.

    Args:
        name: `cnn`, `mlp`, `module:factory` or `file.py:factory`.
        make_norm: called with (num_features, dims) wherever the network normalizes.
        sample_shape: shape of one sample; classes: outputs wanted. The user's own factory knows both.
        example: arguments of a call, by which the norms of a finished network are replaced; two samples of zeros of
            the sample's shape where None.

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
        if takes_norm(factory):
            return keep_norms_called(check_network(factory(norm)))
        made = factory()
        # As anynorm try takes it: the network, or (network, example input).
        network = check_network(made[0] if isinstance(made, tuple) and len(made) == 2 else made)
        return replace_norms(
            keep_norms_called(network), norm, (torch.zeros(2, *sample_shape),) if example is None else example
        )
    except (CannotNormalize, NotBuilt):
        raise
    except NoNorm as problem:
        raise NotBuilt(str(problem)) from problem
    except Exception as problem:  # the user's code may raise anything
        raise NotBuilt(describe(problem)) from problem


def keep_norms_called(network: nn.Module) -> nn.Module:
    """The same network, whose encoders call their norms in evaluation too.

    torch's fast path takes the weights of whatever stands at norm1 and norm2 and computes layer norm with them. A layer
    whose activation is neither ReLU nor GELU does not take it, and it computes with `activation` all the same; the
    switch of the whole process would reach networks that are not ours.
    """
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return network


def check_network(made: object) -> nn.Module:
    """What a factory returned, where it can be trained."""
    if not isinstance(made, nn.Module):
        raise NotBuilt(f"it returned a {type(made).__name__}, not a torch.nn.Module")
    if any(is_lazy(parameter) for parameter in made.parameters()):
        raise NotBuilt("it holds lazy layers without sizes; let the factory call it once before it returns it")
    return made


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
