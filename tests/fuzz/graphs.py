"""Whole networks: after surgery, in micro-batches and under a mask they compute what they did; one check for each."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn
from torch import Tensor

import anynorm
from fuzz.nets import LENGTH, Net, build, make_input


def check_surgery(net: Net) -> None:
    """accelerate, with and without fusing, changes nothing: two steps of training, evaluation, and the way back."""
    for fuse in (False, True):
        model = build(net)
        twin = copy.deepcopy(model)
        report = anynorm.accelerate(twin, fuse=fuse)
        for mode in (True, True, False):
            want, got = (observe(m.train(mode), make_input(net)) for m in (model, report.model))
            check_close(got, want, f"fuse={fuse}, training={mode}")
        anynorm.accelerate(twin, undo=True)
        check_close(observe(twin.eval(), make_input(net)), observe(model, make_input(net)), f"fuse={fuse}, undone")


def observe(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one step."""
    x.requires_grad_()
    model.zero_grad()
    y = model(x)
    cost(y).backward()
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in model.named_buffers()}


def cost(y: Tensor) -> Tensor:
    """The mean over samples of something whose gradient differs everywhere."""
    weights = torch.linspace(-1, 2, y[0].numel(), dtype=y.dtype).view(y[0].shape)
    return (y * weights + y.tanh()).flatten(1).sum(1).mean()


def check_close(got: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    """The same names, and 1e-9 of the largest value of each: float64 that went through some layers."""
    if set(got) != set(want):
        raise AssertionError(f"{what}: {sorted(set(got) ^ set(want))} are not in both")
    largest = max(float(v.abs().max()) for name, v in want.items() if name.startswith("d"))
    for name, value in want.items():
        scale = float(value.abs().max()) + (largest if name.startswith("d") else 0)
        error = float((got[name].double() - value.double()).abs().max())
        if not error <= 1e-9 * scale + 1e-12:
            raise AssertionError(f"{what}: {name} is off by {error:.3g}, where values are up to {scale:.3g}")


def check_accumulate(net: Net) -> None:
    """Micro-batches give the gradients, averages and loss of the one batch, exactly, in both exact modes."""
    model, x = build(net), make_input(net)
    anynorm.accelerate(model)
    whole = copy.deepcopy(model)
    value = cost(whole(x))
    value.backward()
    want = {f"d{name}": p.grad for name, p in whole.named_parameters() if p.grad is not None}
    want |= {"loss": value.detach(), **{name: b.clone() for name, b in whole.named_buffers()}}
    for mode in ("sweep", "lockstep"):
        part = copy.deepcopy(model)
        found = anynorm.accumulate(part, x.split(net.parts), lambda m, t: cost(m(t)), mode=mode)
        got = {f"d{name}": p.grad for name, p in part.named_parameters() if p.grad is not None}
        got |= {"loss": found.loss, **{name: b.clone() for name, b in part.named_buffers()}}
        check_close(got, want, f"mode={mode}")


def check_masked(net: Net) -> None:
    """Under a mask every sample comes out as it does alone, whatever lies in the padding."""
    model, x = build(net), make_input(net)
    anynorm.accelerate(model)
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) or net.seed % 2:
        model.eval()
    lengths = [2 + (net.seed + 3 * i) % (LENGTH - 1) for i in range(net.samples)]
    mask = anynorm.mask_of(lengths, LENGTH)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        with anynorm.masked(mask):
            batched = model(torch.where(mask[:, None], x, float("nan")))
        for i, length in enumerate(lengths):
            model.load_state_dict(state)
            alone = model(x[i : i + 1, :, :length])[0]
            error = float((batched[i, :, :length] - alone).abs().max())
            if not error <= 1e-9 * max(1.0, float(alone.abs().max())):
                raise AssertionError(f"sample {i} of {length} positions is off by {error:.3g}")
