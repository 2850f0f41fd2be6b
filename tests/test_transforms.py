"""Per-sample gradients, and other transforms of torch.func: as exact as the kernels, to any order."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import anynorm
from anynorm.engine import kernels, plain, transforms

MAKE = {
    "group": (lambda: anynorm.GroupNorm(4, 16), (5, 16, 6, 4)),
    "channels_last": (lambda: anynorm.GroupNorm(4, 16), (5, 6, 4, 16)),
    "instance": (lambda: anynorm.InstanceNorm1d(16, affine=True), (5, 16, 30)),
    "layer": (lambda: anynorm.LayerNorm(48), (5, 7, 48)),
    "rms": (lambda: anynorm.RMSNorm(48), (5, 7, 48)),
    "batch": (lambda: anynorm.BatchNorm1d(16, track_running_stats=False), (5, 9, 16)),
    "evaluation": (lambda: anynorm.BatchNorm2d(16).eval(), (5, 16, 6, 4)),
    "fused": (lambda: anynorm.GroupNormAct(4, 16, activation="silu"), (5, 16, 6, 4)),
}


def make(name, ratio=1.0, dtype=torch.float32, seed=1):
    """A norm with a gamma and beta of its own, and a batch of samples for it."""
    build, shape = MAKE[name]
    generator = torch.Generator().manual_seed(seed)
    norm = build().to(dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) + ratio).to(dtype)
    if name == "channels_last":
        x = x.permute(0, 3, 1, 2)
    return norm, {k: v.detach() for k, v in norm.named_parameters()}, dict(norm.named_buffers()), x


def find_loss(norm, buffers, g):
    """Of one sample; batch norm takes it for a batch."""
    is_batch = isinstance(norm, anynorm.BatchNorm1d)

    def loss(parameters, x):
        y = functional_call(norm, (parameters, buffers), (x if is_batch else x[None],))
        return (y.squeeze(0) * g).sum() if not is_batch else (y * g).sum()

    return loss


def per_sample(name, ratio=1.0, dtype=torch.float32):
    norm, parameters, buffers, x = make(name, ratio, dtype)
    g = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    found = vmap(grad(find_loss(norm, buffers, g), argnums=(0, 1)), in_dims=(None, 0))(parameters, x)
    wide = find_loss(norm.double(), {k: t.double() if t.is_floating_point() else t for k, t in buffers.items()}, g)
    exact = []
    for one in x.double():
        leaves = {k: v.double().requires_grad_() for k, v in parameters.items()}, one.clone().requires_grad_()
        exact.append(torch.autograd.grad(wide(*leaves), [*leaves[0].values(), leaves[1]]))
    return [*found[0].values(), found[1]], [torch.stack(t) for t in zip(*exact, strict=True)], x, g


@pytest.fixture(autouse=True)
def _every_size(monkeypatch):
    """Small inputs take the formula in float64 for speed; here they take the kernels."""
    monkeypatch.setattr(transforms, "LEAST", 1)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("name", MAKE)
def test_per_sample_gradients_equal_the_formula_in_float64(name, ratio):
    """1e-6 of the largest gradient or term that is summed, as docs/accuracy.md has it."""
    if name == "evaluation" and ratio > 1:
        ratio = 1.0  # averages of a standard normal
    found, exact, *_ = per_sample(name, ratio)
    for mine, true in zip(found, exact, strict=True):
        scale = max(1.0, float(true.abs().max()))
        assert float((mine.double() - true).abs().max()) <= 1e-6 * scale * (4 if name == "fused" else 1)


@pytest.mark.parametrize("name", ["group", "instance", "layer", "rms", "channels_last"])
def test_the_kernels_serve(name, monkeypatch):
    """As in DP-SGD (functorch#867); compose took 2 to 10 times torch's time."""
    norm, parameters, buffers, x = make(name)
    monkeypatch.setattr(plain, "compose", None)
    vmap(grad(find_loss(norm, buffers, torch.ones(x.shape[1:]))), in_dims=(None, 0))(parameters, x)
    assert vmap(lambda one: norm(one[None])[0])(x).shape == x.shape


@pytest.mark.parametrize("name", ["group", "layer", "rms", "instance"])
def test_half_types_are_rounded_once(name):
    found, exact, *_ = per_sample(name, dtype=torch.bfloat16)
    for mine, true in zip(found, exact, strict=True):
        unit = true.abs() * 2.0**-8 + 1e-5 * true.abs().max()
        assert bool(((mine.double() - true).abs() <= unit).all())


@pytest.mark.parametrize("name", ["group", "layer", "rms", "instance", "batch"])
def test_higher_derivatives_and_other_transforms(name):
    norm, parameters, buffers, x = make(name, dtype=torch.float64)
    x = x[:, :4, :8] if name in ("layer", "rms") else x
    if name in ("layer", "rms"):
        norm = type(norm)(8).double()
        parameters = {k: v.detach() for k, v in norm.named_parameters()}
    one = x[0]
    g = torch.randn(one.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    loss = find_loss(norm, buffers, g)

    def along(t, direction):
        step = 1e-4
        return (t(one + step * direction) - t(one - step * direction)) / (2 * step)

    direction = torch.randn(one.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    first = grad(loss, argnums=1)
    slope = along(lambda z: first(parameters, z), direction)
    # Forward over reverse, reverse over reverse, and a vmap around either.
    together = [
        jvp(lambda z: first(parameters, z), (one,), (direction,))[1],
        grad(lambda z: (first(parameters, z) * direction).sum())(one),
        vmap(grad(lambda z: (first(parameters, z) * direction).sum()))(one[None])[0],
    ]
    for found in together:
        torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-5)
    small = one.flatten(1)[:, :2] if name == "instance" else None
    if small is not None:
        f = lambda z: (anynorm.functional.instance_norm(z[None]) ** 3).sum()  # noqa: E731
        torch.testing.assert_close(hessian(f)(small), jacrev(jacrev(f))(small))
        torch.testing.assert_close(jacfwd(f)(small), jacrev(f)(small))


@pytest.mark.skipif(bool(kernels.OFF), reason="without kernels the formula serves")
@pytest.mark.parametrize("name", ["group", "layer", "rms", "instance", "batch", "fused"])
def test_two_derivatives_are_the_kernels(name, monkeypatch):
    """*Equals the formula* in float64, and does without it: forward, double backward, forward over reverse."""
    norm, parameters, buffers, x = make(name, ratio=100.0)
    g, t = (torch.randn(x[0].shape, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
    loss = find_loss(norm, buffers, g)
    wide = find_loss(copy.deepcopy(norm).double(), buffers, g.double())

    def measure(loss, parameters, one, t):
        leaf, weight = one.clone().requires_grad_(), parameters["weight"].clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(parameters | {"weight": weight}, leaf).square(), leaf, create_graph=True)
        second = torch.autograd.grad((first * t).sum(), [leaf, weight])
        along = jvp(lambda z: loss(parameters, z), (one,), (t,))[1]
        over = jvp(lambda z: grad(lambda z: loss(parameters, z).square())(z), (one,), (t,))[1]
        return [first.detach(), *second, along, over]

    true = measure(wide, {k: v.double() for k, v in parameters.items()}, x[0].double(), t.double())
    monkeypatch.setattr(plain, "compose", None)
    for mine, its in zip(measure(loss, parameters, x[0], t), true, strict=True):
        assert float((mine - its).abs().max()) <= 1e-5 * float(its.abs().max())


@pytest.mark.parametrize("name", ["instance", "layer", "rms"])
def test_a_third_derivative(name):
    """*Equals the formula*: from there on `plain.compose` is differentiated."""
    norm, _, _, x = make(name, dtype=torch.float64)
    t = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = []
    positions = x.shape[:1] + x.shape[2:] if name == "instance" else x.shape[:-1]
    for mask in (None, torch.ones(positions)):  # with a mask no kernel serves the second
        leaf = x.clone().requires_grad_()
        y = norm(leaf, mask=mask).pow(3).sum()
        for _ in range(3):
            (y,) = torch.autograd.grad((y * t).sum() if y.dim() else y, leaf, create_graph=True)
        found.append(y.detach())
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_backward_through_per_sample_gradients():
    """Parameters that were not detached: torch's autograd outside, one grad inside."""
    norm = anynorm.GroupNorm(2, 4).double()
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)

    def squared(norms_weight, x):
        def loss(weight, one):
            return anynorm.functional.group_norm(one[None], 2, weight, norm.bias).pow(3).sum()

        return vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(norms_weight, x)

    assert torch.autograd.gradcheck(lambda w, x: torch.cat([t.flatten() for t in squared(w, x)]), (norm.weight, x))


@pytest.mark.parametrize("name", ["group", "layer", "rms"])
def test_extremes(name):
    norm, parameters, _, x = make(name)
    large = vmap(lambda one: norm(one[None])[0])(x * 1e37)
    assert torch.isfinite(large).all()
    if name != "rms":
        flat = vmap(lambda one: norm(one[None])[0])(torch.full_like(x, 0.1))
        shape = (-1, 1, 1) if name == "group" else (-1,)
        assert torch.equal(flat, parameters["bias"].view(shape).expand(flat.shape))


def test_without_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "find_plan", lambda *_, **__: None)
    for name in ("group", "layer", "rms", "batch"):
        for mine, true in zip(*per_sample(name)[:2], strict=True):
            np.testing.assert_allclose(mine.numpy(), true.numpy(), rtol=1e-5, atol=1e-5)
