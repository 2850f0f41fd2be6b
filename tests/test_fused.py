"""Norm, residual and activation as one module: `BatchNormAct2d` and its like, and the functions' keywords."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.fx.experimental.optimization as optimization
import torch.nn as nn
from torch.func import functional_call, grad, jvp, vmap

import anynorm
from anynorm import FAMILY, activations
from anynorm.activations import ACTIVATIONS
from anynorm.engine import paths
from anynorm.modules.fused import Fused
from specimens import ARGUMENTS, SIZES, SPECIMENS, TRACKING, Specimen, assert_close, wide

NAMES = [*ACTIVATIONS, "identity"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ids = {"ids": str}


def fuse(specimen: Specimen, activation: str | None = "relu", dtype=torch.float32, **options) -> Fused:
    """The specimen's fused twin, with the state of `specimen.make`, negative gammas included."""
    plain = specimen.make(dtype=dtype, **options)
    assert specimen.kind.startswith(("Batch", "Instance", "Layer", "Group", "RMS"))
    kind = getattr(anynorm, specimen.kind.replace("Norm", "NormAct"))
    if specimen.scheme == "instance":
        options.setdefault("affine", True)
    arguments = ARGUMENTS.get(specimen.kind, (SIZES["c"][0],))
    fused = kind(*arguments, dtype=dtype, activation=activation, **options)
    fused.load_state_dict(plain.state_dict(), strict=True)
    assert (plain.weight < 0).any()
    return fused


def find_true(specimen: Specimen, fused: Fused, activation: str | None, x, residual, g) -> list:
    """y and the gradients of x, the residual, gamma and beta by torch's own modules in float64."""
    options = {"track_running_stats": fused.track_running_stats} if hasattr(fused, "track_running_stats") else {}
    theirs = specimen.make(nn, dtype=torch.float64, **options)
    theirs.load_state_dict(fused.state_dict())
    theirs.train(fused.training).eps = specimen.options(fused, None)["eps"]
    leaves = [t.detach().double().requires_grad_() for t in (x, residual)]
    z = theirs(leaves[0]) + leaves[1]
    y = z if activation in (None, "identity") else ACTIVATIONS[activation].function(z)
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
    want = y if activation in (None, "identity") else ACTIVATIONS[activation].function(y)
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


# Classes, constructors and state


@pytest.mark.parametrize("scheme", FAMILY.values(), ids=FAMILY)
def test_every_class_has_a_fused_twin_that_is_no_norm_of_torchs(scheme):
    theirs = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    for plain, name in zip(scheme.classes, scheme.fused, strict=True):
        kind = getattr(anynorm, name)
        assert name in anynorm.__all__
        assert name.replace("Act", "") == plain
        assert kind.plain is getattr(anynorm, plain)
        assert issubclass(kind, Fused)
        assert not issubclass(kind, theirs)
    rows = (Path(__file__).parents[1] / "docs/fused.md").read_text().splitlines()
    assert f"| {scheme.name} | {', '.join(scheme.fused)} |" in rows


@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_constructor_is_torchs_and_activation(specimen):
    theirs, kind = getattr(nn, specimen.kind), type(fuse(specimen))
    *first, last = inspect.signature(kind).parameters.values()
    assert [p for p in first if p.name not in ("on_single", "on_nonfinite")] == list(
        inspect.signature(theirs).parameters.values()
    )
    assert (last.name, last.default, last.kind) == ("activation", "relu", last.KEYWORD_ONLY)
    assert kind._version == theirs._version
    assert list(inspect.signature(kind.forward).parameters) == ["self", "input", "residual", "mask", "lengths"]


@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_state_attributes_and_repr_are_the_plain_norms(specimen):
    options = {"track_running_stats": True} if specimen in TRACKING else {}
    fused, theirs = fuse(specimen, "gelu", **options), specimen.make(nn, **options)
    assert list(fused.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(fused.state_dict(), strict=True)
    assert vars(fused).keys() - vars(theirs).keys() == {"activation"}
    assert repr(fused) == repr(theirs).replace("Norm", "NormAct")[:-1] + ", activation='gelu')"
    fused.reset_parameters()
    theirs.reset_parameters()
    for mine, its in zip(fused.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(mine, its)


def test_old_checkpoints_load_and_bad_ones_do_not():
    state = nn.BatchNorm1d(3).state_dict()
    state._metadata[""]["version"] = 1
    del state["num_batches_tracked"]
    assert anynorm.BatchNormAct1d(3).load_state_dict(state).missing_keys == []
    assert type(anynorm.BatchNormAct1d(3)).__name__ == "BatchNormAct1d"
    old = nn.InstanceNorm1d(3, track_running_stats=True).state_dict()
    old._metadata[""]["version"] = None
    with pytest.raises(RuntimeError, match="Unexpected running stats buffer"):
        anynorm.InstanceNormAct1d(3).load_state_dict(old)
    bad = {**nn.BatchNorm1d(3).state_dict(), "running_var": torch.tensor([1.0, -8.0, 1.0])}
    with pytest.raises(RuntimeError, match="running_var must not be negative; got -8"):
        anynorm.BatchNormAct1d(3).load_state_dict(bad)


@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_pickle_deepcopy_half_and_to_empty(specimen):
    fused, x = fuse(specimen, "leaky_relu").eval(), specimen.draw()
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    twins = (pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused), torch.load(file, weights_only=False))
    for twin in twins:
        assert (type(twin), twin.activation) == (type(fused), "leaky_relu")
        assert torch.equal(twin(x, x), fused(x, x))
    half = copy.deepcopy(fused).half()
    assert half(x.half(), x.half()).dtype == torch.float16
    empty = fuse(specimen).to("meta").to_empty(device="cpu")
    empty.load_state_dict(fused.state_dict())
    empty.activation = "leaky_relu"
    assert torch.equal(empty.eval()(x, x), fused(x, x))


def test_a_subclass_may_have_a_constructor_of_its_own():
    class Own(anynorm.BatchNormAct1d):
        def __init__(self):
            super().__init__(3, activation="silu")

    assert Own()(torch.randn(4, 3)).shape == (4, 3)


# What torch's tools do to it


class Subclass(nn.BatchNorm2d):
    """What the fused classes must not be."""

    def forward(self, input):
        return super().forward(input).relu()


def make_pair(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm)


def test_convert_sync_batchnorm_leaves_it_alone():
    x = torch.randn(2, 3, 5, 5)
    model = make_pair(anynorm.BatchNormAct2d(4)).eval()
    before = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[1]) is anynorm.BatchNormAct2d
    assert torch.equal(converted(x), before)
    lost = nn.SyncBatchNorm.convert_sync_batchnorm(make_pair(Subclass(4)))
    assert type(lost[1]) is nn.SyncBatchNorm  # and with it the ReLU is gone


def fold(model: nn.Sequential) -> nn.Module:
    """As tools do it that look for torch's norms."""
    conv, norm = model
    if not isinstance(norm, nn.modules.batchnorm._NormBase):
        return model
    return nn.utils.fusion.fuse_conv_bn_eval(conv, norm)


def test_folding_leaves_it_alone():
    x = torch.randn(2, 3, 5, 5)
    model = make_pair(anynorm.BatchNormAct2d(4)).eval()
    before = model(x)
    assert (before >= 0).all()
    assert torch.equal(fold(model)(x), before)
    assert torch.equal(optimization.fuse(model)(x), before)
    assert (fold(make_pair(Subclass(4)).eval())(x) < 0).any()  # what the test would notice


# Errors, one sentence each


X = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
TEXTS = {
    "batch_norm: residual must have the shape and dtype of the input; got residual (4, 3, 1) torch.float32, "
    "input (4, 3, 5) torch.float32; convert it, or add it to the output":
        (RuntimeError, lambda norm: norm(X, X[..., :1])),
    "batch_norm: residual must have the shape and dtype of the input; got residual (4, 3, 5) torch.float64, "
    "input (4, 3, 5) torch.float32; convert it, or add it to the output":
        (RuntimeError, lambda norm: norm(X, X.double())),
    "BatchNormAct1d: activation must be one of relu, leaky_relu, silu, gelu, identity or None; got 'tanh'; "
    "leave it out and apply yours to the output":
        (ValueError, lambda norm: anynorm.BatchNormAct1d(3, activation="tanh")),
    "group_norm: activation must be one of relu, leaky_relu, silu, gelu, identity or None; got 'ReLU'; "
    "leave it out and apply yours to the output":
        (ValueError, lambda norm: anynorm.functional.group_norm(X, 1, activation="ReLU")),
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_error_text_and_nothing_moves(text):
    kind, call = TEXTS[text]
    norm = anynorm.BatchNormAct1d(3)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(kind) as caught:
        call(norm)
    assert str(caught.value) == text
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("name", anynorm.functional.__all__)
def test_every_function_checks_what_follows(name):
    arguments = {"layer_norm": ((5,),), "rms_norm": ((5,),), "group_norm": (3,)}.get(name, ())
    batch = {"running_mean": None, "running_var": None, "training": True}
    options = {
        "batch_norm": batch,
        "ghost_batch_norm": {**batch, "ghost_size": 2},
        "batch_renorm": {**batch, "running_mean": torch.zeros(X.shape[1]), "running_var": torch.ones(X.shape[1])},
    }.get(name, {})
    options |= {"momentum": 0.0} if name == "batch_renorm" else {}  # r and d are the same at each call
    function = getattr(anynorm.functional, name)
    y = function(X, *arguments, **options, activation="relu", residual=X)
    torch.testing.assert_close(y, (function(X, *arguments, **options) + X).relu(), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=f"{name}: residual must have"):
        function(X, *arguments, **options, residual=X[:1])
    with pytest.raises(ValueError, match=f"{name}: activation must be one of"):
        function(X, *arguments, **options, activation="elu")


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


def test_there_is_one_list_of_names():
    """Whoever needs the names reads the table: no other file of the library spells two of them."""
    for path in Path(anynorm.__file__).parent.rglob("*.py"):
        text = re.sub(r'activation="\w+"', "", path.read_text())
        spelled = [name for name in ACTIVATIONS if f'"{name}"' in text]
        assert len(spelled) <= (len(ACTIVATIONS) if path == Path(activations.__file__) else 1), (path, spelled)
