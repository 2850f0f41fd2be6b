"""Does ours compute what a norm of somebody else does? Shown on random input before the module gets another class."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..modules.adapted import Adapter
from ..randomness import restore_randomness, save_randomness
from .report import PAIRS
from .trace import HOOKS

RTOL = 1e-5  # of the largest output, or gradient; the two are sums of the same terms in another order
ROUNDED = 0.05  # share of bfloat16 outputs that differ; float32 sums in another order change one in a thousand
ON_CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # whatever the user's defaults are
NOT_COMPARED = "it could not be compared"


def find_difference(module: nn.Module, kind: type[Any], adapter: Adapter) -> str:
    """Where a module of another class would compute something else, in a sentence, or "".

    Both are tried with random parameters, in training and in evaluation: outputs, gradients of the input and of all
    parameters, and buffers, on inputs near 1, far from 0, large, and so small that eps counts. The module itself is not
    called.
    """
    with apart():
        return find_first_difference(module, kind, adapter)


def find_first_difference(module: nn.Module, kind: type[Any], adapter: Adapter) -> str:
    try:
        if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            return "its parameters are on the meta device, where nothing can be compared; load its weights first"
        theirs = make_twin(module, torch.float32)
        ours = copy.deepcopy(theirs)
        ours.__class__ = kind
        for x in make_inputs(theirs, adapter):
            for training in (True, False):
                found = compare(theirs.train(training), ours.train(training), x)
                if found:
                    return found
    except Exception as error:
        return f"{NOT_COMPARED}: {' '.join(str(error).split())[:160]}"
    return ""


@contextmanager
def apart() -> Iterator[None]:
    """Nothing that is in force around the caller counts, and what is drawn is given back."""
    states = save_randomness()
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        restore_randomness(states)


def find_half_note(module: nn.Module, kind: type[Any], adapter: Adapter) -> str:
    """Whether the two round at other places in bfloat16, in a sentence, or ""."""
    with apart():
        return find_rounding(module, kind, adapter)


def find_rounding(module: nn.Module, kind: type[Any], adapter: Adapter) -> str:
    try:
        theirs = make_twin(module, torch.bfloat16).eval()
        ours = copy.deepcopy(theirs)
        ours.__class__ = kind
        x = next(make_inputs(theirs, adapter)).bfloat16()
        with torch.no_grad():
            one, other = theirs.forward(x), kind.forward(ours, x)
        if one.dtype != other.dtype:
            return f"in bfloat16 it returns {other.dtype} and theirs {one.dtype}"
        others = float((one != other).float().mean())
        return "half types: rounded once, theirs more often" if others > ROUNDED else ""
    except Exception:  # a class that takes no half types has nothing to say of them
        return ""


def make_twin(module: Any, dtype: torch.dtype) -> Any:
    """A copy on the CPU with random parameters and statistics."""
    twin: Any = copy.deepcopy(module)
    for part in twin.modules():  # what hooks do is the user's, and none of this happens to the user's model
        for name in HOOKS:
            getattr(part, name).clear()
    twin = twin.to(device="cpu", dtype=dtype)
    generator = make_generator(0)
    with torch.no_grad():
        for t in (*twin.parameters(), *twin.buffers()):
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=generator, **ON_CPU))
        for name, t in twin.named_buffers():
            if name.endswith("running_var"):
                t.abs_().add_(0.1)
    for t in twin.parameters():
        t.requires_grad_(True)
    return twin


def make_inputs(module: Any, adapter: Adapter) -> Iterator[Tensor]:
    """Random inputs of every number of axes that the adapter serves."""
    generator = make_generator(1)
    for shape in find_shapes(module, adapter):
        for scale, mean in ((1.0, 0.0), (1.0, 3.0), (1e-3, 0.0), (1e3, 0.0)):
            yield torch.randn(shape, generator=generator, **ON_CPU) * scale + mean


def find_shapes(module: Any, adapter: Adapter) -> list[tuple[int, ...]]:
    """Shapes of inputs."""
    if adapter.norm in ("batch", "instance"):
        base = next(kind.__name__ for kind in type(module).__mro__ if kind in PAIRS)
        c, axes = module.num_features, int(base[-2])
        return [(3, c, *(4, 3, 2)[:axes])] + ([(5, c)] if axes == 1 and adapter.norm == "batch" else [])
    if adapter.norm == "group":
        return [(3, module.num_channels, 4, 3), (3, module.num_channels, 5)]
    if adapter.norm == "frozen":
        return [(3, module.running_mean.numel(), 4, 3)]
    weight = getattr(module, adapter.weight, None) if adapter.weight else None
    features = tuple(weight.shape) if weight is not None else tuple(getattr(module, "normalized_shape", (16,)))
    if adapter.channel_axis == 1:
        return [(3, *features, 4, 3)]
    return [(3, *features), (2, 3, *features), (2, 2, 3, *features)]


def compare(theirs: Any, ours: Any, x: Tensor) -> str:
    """One call of each, forward and backward."""
    results = []
    for module, forward in ((theirs, type(theirs).forward), (ours, type(ours).forward)):
        torch.default_generator.manual_seed(0)  # for dropout; torch.manual_seed would seed other devices too
        module.zero_grad()
        given = x.clone().requires_grad_()
        y = forward(module, given)
        if not isinstance(y, Tensor):
            return f"its forward returns {type(y).__name__}, no tensor"
        weights = torch.randn(y.shape, generator=make_generator(2), **ON_CPU)
        (y * weights).sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        results.append((y.detach(), given.grad, grads, dict(module.named_buffers())))
    (y, dx, grads, buffers), (own_y, own_dx, own_grads, own_buffers) = results
    if own_y.shape != y.shape or own_y.dtype != y.dtype:
        return f"its output is {tuple(y.shape)} {y.dtype}, and ours {tuple(own_y.shape)} {own_y.dtype}"
    mode = "training" if theirs.training else "evaluation"
    pairs = [("output", y, own_y), ("gradient of the input", dx, own_dx)]
    pairs += [(f"gradient of {name}", grads[name], own_grads[name]) for name in grads]
    pairs += [(name, buffers[name], own_buffers[name]) for name in buffers]
    for name, one, other in pairs:
        off = measure(one, other)
        if not off <= RTOL:
            return f"it computes something else: its {name} in {mode} differs by {off:.1e} of the largest value"
    return ""


def measure(one: Tensor | None, other: Tensor | None) -> float:
    """The largest difference, of the largest value; gradients that are not there are zeros."""
    if one is None or other is None:
        present = one if other is None else other
        return 0.0 if present is None or not bool(present.any()) else float("inf")
    one, other = one.double(), other.double()
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-30)) if one.numel() else 0.0


def make_generator(seed: int) -> torch.Generator:
    """Random numbers of its own."""
    return torch.Generator(device="cpu").manual_seed(seed)
