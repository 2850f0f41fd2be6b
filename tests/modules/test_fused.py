"""Norm, residual and activation as one module: numbers, also in graphs, transforms and every layout."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn as nn
from torch.func import functional_call, grad, jvp, vmap

import anynorm
from anynorm import FAMILY
from anynorm.engine import paths
from anynorm.modules.fused import Fused
from fused_specimens import DTYPES, NAMES, TORCHS, fuse, ids
from specimens import SPECIMENS, TRACKING, Specimen, assert_close, wide


def find_true(specimen: Specimen, fused: Fused, activation: str | None, x, residual, g) -> list:
    """y and the gradients of x, the residual, gamma and beta by torch's own modules in float64."""
    options = {"track_running_stats": fused.track_running_stats} if hasattr(fused, "track_running_stats") else {}
    theirs = specimen.make(nn, dtype=torch.float64, **options)
    theirs.load_state_dict(fused.state_dict())
    theirs.train(fused.training).eps = specimen.options(fused, None)["eps"]
    leaves = [t.detach().double().requires_grad_() for t in (x, residual)]
    z = theirs(leaves[0]) + leaves[1]
    y = z if activation in (None, "identity") else TORCHS[activation](z)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *theirs.parameters()], g.double())]


def find_ours(fused: Fused, x, residual, g) -> list:
    leaves = [t.detach().requires_grad_() for t in (x, residual)]
    y = fused(*leaves)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *fused.parameters()], g)]


def check(specimen: Specimen, fused: Fused, activation: str, x: torch.Tensor) -> None:
    """To a few roundings of the largest value or summed term."""
    residual, g = (specimen.draw(dtype=x.dtype, seed=seed) - 3 for seed in (7, 8))
    true = find_true(specimen, fused, activation, x, residual, g)
    factor = 4 if x.dtype == torch.float32 else 200
    terms = [float(abs(residual).max()) + 5, *[float(abs(g).max()) * 8] * 4]
    names = ("y", "dx", "dresidual", "dgamma", "dbeta")
    for name, got, want, term in zip(names, find_ours(fused, x, residual, g), true, terms, strict=False):
        assert_close(got, wide(want), factor, name, term)


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_equals_float64_in_training(specimen, activation, dtype):
    check(specimen, fuse(specimen, activation, dtype), activation, specimen.draw(dtype=dtype))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded"])
@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_equals_float64_in_every_layout(specimen, layout):
    check(specimen, fuse(specimen, "silu"), "silu", specimen.draw(layout))


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("specimen", TRACKING, **ids)
def test_equals_float64_in_evaluation(specimen, dtype):
    fused = fuse(specimen, "gelu", dtype, track_running_stats=True).eval()
    check(specimen, fused, "gelu", specimen.draw(dtype=dtype))


@pytest.mark.parametrize("activation", [*NAMES, None])
@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_without_a_residual_it_is_norm_then_activation(specimen, activation):
    fused, plain, x = fuse(specimen, activation), specimen.make(), specimen.draw()
    y = plain(x)
    want = y if activation in (None, "identity") else TORCHS[activation](y)
    torch.testing.assert_close(fused(x), want, rtol=1e-6, atol=1e-6)
    for mine, its in zip(fused.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("specimen", TRACKING, **ids)
def test_buffers_move_as_the_plain_norms(specimen, momentum):
    fused = fuse(specimen, momentum=momentum, track_running_stats=True)
    plain = specimen.make(momentum=momentum, track_running_stats=True)
    for seed in range(3):
        x = specimen.draw(seed=seed)
        fused(x, residual=x), plain(x)
    for (name, mine), its in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-6, msg=name)


def test_half_types_round_once():
    """Rounding the norm, then the sum, then the activation is off by more than one unit in the last place."""
    x, residual = (torch.randn(64, 512, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    norm = anynorm.LayerNormAct(512, activation="silu", dtype=torch.bfloat16)
    wide_norm = nn.LayerNorm(512, dtype=torch.float64)
    true = nn.functional.silu(wide_norm(x.double()) + residual.double())
    thrice = nn.functional.silu(wide_norm(x.double()).bfloat16() + residual)
    once = true.bfloat16()
    assert (norm(x, residual) != once).float().mean() < 1e-3
    assert (thrice != once).float().mean() > 0.1


# Under compilers, transforms, derivatives, exporters


def step(norm, x, residual) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual)]
    y = norm(*leaves)
    return [y, *torch.autograd.grad(y.square().sum(), [*leaves, *norm.parameters()]), *norm.buffers()]


def assert_same(ours, theirs, tolerance=1e-5) -> None:
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance * max(1, float(its.detach().abs().max())))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_compile_without_a_graph_break_or_warning(specimen, training):
    torch.compiler.reset()
    norm = fuse(specimen, "gelu").train(training)
    twin, x, residual = copy.deepcopy(norm), specimen.draw(), specimen.draw(seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        y = compiled(*leaves)
        found = [y, *torch.autograd.grad(y.square().sum(), [*leaves, *norm.parameters()]), *norm.buffers()]
    assert_same(found, step(twin, x, residual))


@pytest.mark.parametrize("activation", NAMES)
def test_compile_with_the_default_backend(activation):
    torch.compiler.reset()
    specimen = next(s for s in SPECIMENS if s.kind == "BatchNorm2d")
    norm, x, residual = fuse(specimen, activation), specimen.draw(), specimen.draw(seed=2)
    assert_same([torch.compile(norm, fullgraph=True)(x, residual)], [copy.deepcopy(norm)(x, residual)])


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_derivatives_in_both_modes_and_twice(specimen, activation):
    """Against finite differences of the slope along a direction, in float64."""
    norm = fuse(specimen, activation, torch.float64).eval()
    x, residual, tangent, other = (specimen.draw(dtype=torch.float64, seed=seed) - 3 for seed in range(4))
    size = 1e-6

    def slope(x, residual):
        return jvp(norm, (x, residual), (tangent, other))[1]

    ahead, behind = (norm(x + h * tangent, residual + h * other) for h in (size, -size))
    assert_same([slope(x, residual)], [(ahead - behind) / (2 * size)], 1e-5)
    leaves = [t.clone().requires_grad_() for t in (x, residual)]
    first = torch.autograd.grad(norm(*leaves).pow(2).sum(), leaves, create_graph=True)
    total = sum((d * t).sum() for d, t in zip(first, (tangent, other), strict=True))
    second = torch.autograd.grad(total, leaves)
    moved = [
        torch.autograd.grad(norm(*at).pow(2).sum(), at)
        for h in (size, -size)
        for at in [[(x + h * tangent).requires_grad_(), (residual + h * other).requires_grad_()]]
    ]
    for found, ahead, behind in zip(second, *moved, strict=True):
        torch.testing.assert_close(
            found, (ahead - behind) / (2 * size), rtol=1e-4, atol=1e-4 * float(found.abs().max())
        )


@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_torch_func(specimen):
    norm, x, residual = fuse(specimen, "silu").eval(), specimen.draw(), specimen.draw(seed=2)
    parameters = dict(norm.named_parameters())

    def loss(parameters):
        return functional_call(norm, parameters, (x, residual)).square().sum()

    found = grad(loss)(parameters)
    assert_same(list(found.values()), step(norm, x, residual)[3 : 3 + len(found)])
    batch = torch.stack([x, 2 * x, x + 1])
    assert_same([vmap(norm)(batch, batch)], [torch.stack([norm(one, one) for one in batch])])
    assert_same([vmap(norm, in_dims=(None, 0))(x, batch)], [torch.stack([norm(x, one) for one in batch])])


@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_fx_records_the_module_with_its_residual(specimen):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = fuse(specimen)
            self.constant = nn.Parameter(specimen.draw(seed=4))

        def forward(self, x):
            return self.norm(self.norm(x), x) + self.norm(self.constant, residual=x)

    net, x = Net(), specimen.draw()
    state = copy.deepcopy(net.state_dict())
    traced = torch.fx.symbolic_trace(net)
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    assert [(node.target, len(node.args)) for node in calls] == [("norm", 1), ("norm", 2), ("norm", 2)]
    for training in (True, False):
        assert torch.equal(traced.train(training)(x), copy.deepcopy(net).train(training)(x))
    with pytest.raises(TypeError, match=r"trace torch\.nn\.Sequential"):
        torch.fx.symbolic_trace(fuse(specimen))


@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_exported_graphs_hold_torchs_operations(specimen):
    norm, x, residual = fuse(specimen).eval(), specimen.draw(), specimen.draw(seed=2)
    program = torch.export.export(norm, (x, residual))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert f"aten.{FAMILY[specimen.scheme].function}.default" in names
    assert "aten.relu.default" in names
    torch.testing.assert_close(program.module()(x, residual), norm(x, residual), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_other_devices_get_torchs_operation(specimen, monkeypatch):
    calls = []
    original = getattr(nn.functional, FAMILY[specimen.scheme].function)
    monkeypatch.setattr(nn.functional, original.__name__, lambda *a: calls.append(1) or original(*a))
    norm, x = fuse(specimen).to("meta"), specimen.draw().to("meta")
    y = norm(x, x)
    assert (y.shape, y.device.type, calls) == (x.shape, "meta", [1])
    with anynorm.exact(True):
        assert norm(x, x).shape == x.shape
    assert calls == [1]


def test_torchs_operation_is_followed_by_sum_and_activation(monkeypatch):
    """On the CPU with torch's operation preferred, so that there are numbers to compare."""
    for specimen in SPECIMENS:
        norm, x, residual = fuse(specimen, "gelu"), specimen.draw(), specimen.draw(seed=2)
        want = copy.deepcopy(norm)(x, residual)
        with monkeypatch.context() as patch:
            patch.setattr(paths, "prefers_torch", lambda x: True)
            torch.testing.assert_close(norm(x, residual), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_autocast_inference_mode_and_checkpoint(specimen):
    norm, x = fuse(specimen), specimen.draw()
    want = copy.deepcopy(norm)(x, x)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            assert copy.deepcopy(norm)(x.to(dtype), x.to(dtype)).dtype == dtype
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(norm)(x, x), want)
    leaf = x.clone().requires_grad_()
    again = torch.utils.checkpoint.checkpoint(norm, leaf, leaf, use_reentrant=False)
    assert torch.equal(again, want)


@pytest.mark.parametrize("specimen", TRACKING, **ids)
def test_two_forwards_before_a_backward(specimen):
    fused = fuse(specimen, "silu", track_running_stats=True)
    for training in (True, False):
        fused.train(training)
        x = specimen.draw().requires_grad_()
        first = fused(x, x).square().sum()
        (alone,) = torch.autograd.grad(first, x, retain_graph=True)
        fused(x, x)
        with torch.no_grad():
            fused.running_mean.add_(1)
            fused.running_var.mul_(2)
        assert torch.equal(torch.autograd.grad(first, x)[0], alone)


# Shapes and layouts


@pytest.mark.parametrize("kind", ["InstanceNormAct1d", "InstanceNormAct2d", "InstanceNormAct3d"])
def test_instance_norm_without_a_sample_axis(kind):
    x, residual = torch.randn(2, 4, *[5] * int(kind[-2]), generator=torch.Generator().manual_seed(0))
    norm = getattr(anynorm, kind)(4, affine=True)
    assert torch.equal(norm(x, residual), norm(x[None], residual[None])[0])


LAYERED = [("BatchNormAct2d", (4,)), ("GroupNormAct", (2, 4)), ("InstanceNormAct2d", (4,))]


@pytest.mark.parametrize(("kind", "arguments"), LAYERED)
def test_memory_format_is_that_of_the_input(kind, arguments):
    x = torch.randn(2, 4, 3, 3)
    last = x.to(memory_format=torch.channels_last)
    norm = getattr(anynorm, kind)(*arguments)
    assert norm(last, x).is_contiguous(memory_format=torch.channels_last)
    assert norm(x, last).is_contiguous()


def test_empty_batch():
    norm = anynorm.BatchNormAct1d(3)
    x = torch.zeros(0, 3, requires_grad=True)
    assert norm(x, x).shape == (0, 3)
    assert torch.equal(norm.running_mean, torch.zeros(3))


def test_nested_tensors_go_to_torch():
    norm = anynorm.LayerNormAct(4, activation="relu")
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    want = (nn.LayerNorm(4)(nested) + nested).relu()
    torch.testing.assert_close(norm(nested, nested).unbind()[1], want.unbind()[1])
