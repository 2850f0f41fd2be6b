"""Who is timed: anynorm and its kernels alone, torch eager, torch.compile, JAX, and a copy of the same tensor."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import anynorm
from anynorm.apps.timing.cases import Case, make_call, needs_grad
from anynorm.apps.timing.interleaved import TimedCall
from anynorm.errors import UserError

from .kernel_calls import make_kernel_call

# Compile in this process: a pool of compilers would be other work, and its time would not be known as ours.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

PEERS = {
    "anynorm": "anynorm's layer",
    "kernel": "anynorm's kernels alone, into the same memory each time",
    "fresh": "the same kernels, into new memory each time",
    "torch": "torch.nn's layer, eager",
    "compile": "torch.nn's layer under torch.compile(dynamic=False)",
    "jax": "the formula under jax.jit",
    "tuned": "anynorm's layer and torch.nn's in a process of their own, after tune_allocator(keep_large=True)",
    "anynorm-compile": "anynorm's layer under torch.compile(dynamic=False)",
}
USUAL = ("anynorm", "kernel", "fresh", "torch", "compile", "jax", "tuned")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def choose_peers(names: str) -> tuple[list[str], str]:
    """The peers asked for that are there, and a sentence about one that is not.

    Args:
        names: with commas between.

    Raises:
        UserError: a name is not known, or anynorm is not among them.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in PEERS]
    if unknown or "anynorm" not in wanted:
        got = f"{unknown[0]!r}" if unknown else f"{names!r}, without anynorm"
        raise UserError(f"bench: --peers takes anynorm and any of {', '.join(PEERS)}; got {got}; repair the list.")
    if "jax" in wanted and importlib.util.find_spec("jax") is None:
        wanted.remove("jax")
        return wanted, "JAX is not measured: it is not installed; `make bench` installs it, or pip install '.[bench]'."
    return wanted, ""


@dataclass(frozen=True)
class Contest:
    """What is timed of one case in one mode: the calls by peer, `copy` among them, and the bytes each peer keeps."""

    calls: dict[str, TimedCall]
    kept: dict[str, int]


def make_contest(peers: list[str], case: Case, mode: str, drawn: tuple[Tensor, Tensor]) -> Contest:
    """The calls of a case in a mode, tried once and found to compute the same.

    Args:
        drawn: input and gradient, as `case.draw` returns them.

    Raises:
        Mismatch: a peer computes something else.
    """
    calls: dict[str, TimedCall] = {}
    kept: dict[str, int] = {}
    for peer in peers:
        if peer == "jax":
            from .jax_peer import make_jax_call

            calls[peer] = make_jax_call(case, mode, *drawn)
            continue
        module = case.make(nn if peer in ("torch", "compile") else anynorm).train(mode != "evaluation")
        if peer in ("kernel", "fresh"):
            alone = make_kernel_call(case, mode, module, drawn)
            if alone is not None:
                calls[peer] = alone.bind() if peer == "kernel" else alone
            continue
        called = torch.compile(module, dynamic=False) if peer.endswith("compile") else module
        calls[peer] = make_call(called, module.parameters(), mode, *drawn)
        if needs_grad(mode):
            kept[peer] = find_kept(calls[peer], module)
    check_same(calls, case)
    x, room = drawn[0], torch.empty_like(drawn[0])
    return Contest({**calls, "copy": lambda: room.copy_(x)}, kept)


class Mismatch(Exception):
    """Two peers do not compute the same, so that their times mean nothing."""


def check_same(calls: dict[str, TimedCall], case: Case) -> None:
    """All peers return the same y, or dx and the parameters' gradients, up to rounding.

    Of half types only y and dx are compared: torch adds up a bias gradient of ones in bfloat16 and stops at 256.
    """
    expected: list[Tensor] = []
    for peer, call in calls.items():
        found = [t.detach().float() for t in as_tensors(peer, case, call())]
        expected = expected or found
        compared = len(expected) if case.dtype == torch.float32 else 1
        for one, other in list(zip(found, expected, strict=True))[:compared]:
            scale = float(other.abs().max())
            difference = float((one.reshape(other.shape) - other).abs().max())
            if not difference <= TOLERANCE[case.dtype] * scale:
                raise Mismatch(f"{case.name} {case.layout}: {peer} is {difference:.2g} off, the largest is {scale:.2g}")


def as_tensors(peer: str, case: Case, result: Any) -> list[Tensor]:
    """The result of a call as a list of tensors."""
    if peer == "jax":
        from .jax_peer import read_result

        return read_result(case, result)
    return [result] if isinstance(result, Tensor) else list(result)


def find_kept(call: TimedCall, module: nn.Module) -> int:
    """Bytes that autograd keeps between forward and backward; the input is counted, parameters and buffers are not.

    JAX has no such number: both passes are one program, which keeps nothing between calls.
    """
    call()  # compiles and allocates before the hooks watch
    own = {tensor.data_ptr() for tensor in module.state_dict().values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            size = tensor.numel() * tensor.element_size()
            kept[tensor.data_ptr()] = max(kept.get(tensor.data_ptr(), 0), size)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())
