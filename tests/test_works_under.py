"""Compilers, exporters, transforms, autocast, checkpointing, inference mode, the meta device, subclasses, modes."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn as nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import anynorm
from anynorm.engine.paths import EXACT
from specimens import SPECIMENS, TRACKING, assert_same

OTHERS = {
    "pattern": lambda: anynorm.AnyNorm("n (g k) s -> n g", affine="g k", g=3, k=2),
    "pattern, running": lambda: anynorm.AnyNorm("n c s -> c", affine="c", c=6, track_running_stats=True),
    "cumulative": lambda: anynorm.BatchNorm2d(6, momentum=None),
    "ghost": lambda: anynorm.GhostBatchNorm2d(6, ghost_size=2),
    "renorm": lambda: anynorm.BatchRenorm2d(6, warmup=(0, 2, 2)),
}
X = torch.randn(5, 6, 4, 3, generator=torch.Generator().manual_seed(0))
MODULES = [pytest.param(s.make, s.draw(), id=str(s)) for s in SPECIMENS]
MODULES += [pytest.param(make, X, id=name) for name, make in OTHERS.items()]


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x * self.scale).tanh()


def gradients(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    leaf = x.clone().requires_grad_()
    y = net(leaf)
    return [y, *torch.autograd.grad(y.square().sum(), [leaf, *net.parameters()])]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "x"), MODULES)
def test_compile_without_a_graph_break_or_warning(make, x, training):
    torch.compiler.reset()
    net = Net(make()).train(training)
    twin = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # The graph is traced and differentiated as for any backend; test_accuracy runs the default one.
        compiled = gradients(torch.compile(net, fullgraph=True, backend="aot_eager"), x)
    assert_same(compiled, gradients(twin, x))
    assert_same(list(net.buffers()), list(twin.buffers()))


@pytest.mark.parametrize("kind", ["LayerNorm", "BatchNorm1d"])
def test_compiled_output_can_be_viewed_as_torchs(kind):
    """Contiguous for any input that is not channels_last, so that a view behind the norm works compiled, too."""
    torch.compiler.reset()
    norm = anynorm.LayerNorm(4) if kind == "LayerNorm" else anynorm.BatchNorm1d(5)
    compiled = torch.compile(lambda x: norm(x).view(3, -1), fullgraph=True, backend="aot_eager")
    assert compiled(torch.randn(3, 4, 5).transpose(1, 2)).shape == (3, 20)


def test_compiled_vmap():
    torch.compiler.reset()
    norm = anynorm.GroupNorm(2, 6)
    x = torch.randn(3, *X.shape)
    compiled = torch.compile(vmap(lambda one: norm(one)), fullgraph=True, backend="aot_eager")
    assert_same([compiled(x)], [vmap(norm)(x)])


def test_compile_with_changing_batch_sizes():
    torch.compiler.reset()
    net = Net(anynorm.BatchNorm2d(6))
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5, 8):
        assert compiled(torch.randn(n, 6, 4, 3)).shape[0] == n


OPERATIONS = {
    "batch": "batch_norm",
    "instance": "instance_norm",
    "group": "group_norm",
    "layer": "layer_norm",
    "rms": "rms_norm",
}


@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
def test_export_in_evaluation_emits_torchs_operation(specimen):
    net = Net(specimen.make()).eval()
    x = specimen.draw()
    program = torch.export.export(net, (x,))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert f"aten.{OPERATIONS[specimen.scheme]}.default" in names
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("training", [True, False])
def test_export_of_the_others(name, training):
    net = Net(OTHERS[name]()).train(training)
    x = X if name == "ghost" and training else X[:3]  # how many ghosts there are is part of the graph
    shapes = None if len(x) == len(X) else {"x": {0: torch.export.Dim("n", min=2)}}
    expected = copy.deepcopy(net)(x)
    program = torch.export.export(net, (X,), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "x"), MODULES)
def test_fx_records_the_module_as_it_does_torchs(make, x, training):
    """Traced in one mode, run in either, and nothing moves while tracing."""
    net = Net(make()).train(training)
    twin, state = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    traced = torch.fx.symbolic_trace(net)
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["norm"]
    for mode in (True, False):
        assert_same([traced.train(mode)(x)], [twin.train(mode)(x)])
        assert_same(list(traced.buffers()), list(twin.buffers()))


def test_fx_records_functions_and_says_what_it_cannot():
    class Functions(nn.Module):
        def forward(self, x):
            return anynorm.functional.layer_norm(x, (4,)).relu()

    traced = torch.fx.symbolic_trace(Functions())
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [anynorm.functional.layer_norm]
    assert torch.equal(traced(torch.ones(2, 4)), torch.zeros(2, 4))
    with pytest.raises(TypeError, match=r"trace torch\.nn\.Sequential"):
        torch.fx.symbolic_trace(anynorm.GroupNorm(2, 4))


@pytest.mark.parametrize(("make", "x"), MODULES)
def test_torch_func(make, x):
    norm = make().eval()
    net = Net(norm)
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())

    def loss(parameters):
        return functional_call(net, (parameters, buffers), (x,)).square().sum()

    found = grad(loss)(parameters)
    assert_same(list(found.values()), gradients(net, x)[2:])
    batch = torch.stack([x, 2 * x, x + 1])
    assert_same([vmap(net)(batch)], [torch.stack([net(one) for one in batch])])
    tangent = torch.randn_like(x)
    step = 1e-3
    slope = (net.double()(x.double() + step * tangent) - net(x.double() - step * tangent)) / (2 * step)
    assert_same([jvp(net, (x.double(),), (tangent.double(),))[1]], [slope], 1e-4)


@pytest.mark.parametrize("specimen", TRACKING, ids=str)
def test_functional_call_returns_new_statistics_under_grad(specimen):
    """pytorch#85533: buffers that are passed in are moved, the module's own are not."""
    net = Net(specimen.make(track_running_stats=True))
    parameters = dict(net.named_parameters())
    before = {name: b.clone() for name, b in net.named_buffers()}

    def loss(parameters, buffers):
        buffers = {name: b.clone() for name, b in buffers.items()}
        return functional_call(net, (parameters, buffers), (specimen.draw(),)).square().sum(), buffers

    found, buffers = grad(loss, has_aux=True)(parameters, before)
    assert all(torch.equal(before[name], b) for name, b in net.named_buffers())
    assert_same(list(found.values()), gradients(net, specimen.draw())[2:])
    assert_same(list(buffers.values()), list(net.buffers()))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("make", "x"), MODULES)
def test_checkpoint(make, x, reentrant):
    net = Net(make())
    twin = copy.deepcopy(net)
    if reentrant:  # which calls the net twice, and then without a checkpoint
        twin(x), twin(x)
    assert_same(gradients(lambda_module(net, reentrant), x), gradients(twin, x))


def lambda_module(net: nn.Module, reentrant: bool) -> nn.Module:
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=reentrant)

    if not reentrant:
        return Checkpointed()

    class Reentrant(Checkpointed):
        """Reentrant checkpoints refuse autograd.grad: collect .grad instead, through a stand-in for the parameters."""

        def forward(self, x):
            y = super().forward(x)
            leaf = x.detach().requires_grad_()
            twin = copy.deepcopy(self.net)
            again = checkpoint(self.net, leaf, use_reentrant=True)
            again.square().sum().backward()
            assert torch.isfinite(leaf.grad).all()
            assert_same([leaf.grad], [gradients(twin, leaf.detach())[1]])
            self.net.zero_grad()
            return self.net(x) + 0 * y.detach()

    return Reentrant()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "x"), MODULES)
def test_inference_mode_and_meta_device(make, x, training):
    norm = make().train(training)
    expected = copy.deepcopy(norm)(x)
    with torch.inference_mode():
        assert_same([copy.deepcopy(norm)(x).clone()], [expected.detach()])
    y = norm.to("meta")(x.to("meta"))
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "meta")


@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
def test_autocast_gives_torchs_dtypes(specimen):
    for dtype in (torch.float32, torch.bfloat16):
        x = specimen.draw(dtype=dtype).requires_grad_()
        results = []
        for library in (anynorm, nn):
            module = specimen.make(library)
            with torch.autocast("cpu", torch.bfloat16):
                y = module(x)
            y.float().square().sum().backward()
            results.append((y.dtype, x.grad.dtype, module.weight.grad.dtype))
        assert results[0] == results[1]


@pytest.mark.parametrize("kind", ["BatchNorm2d", "LayerNorm"])
def test_autocast_network(kind):
    norm = anynorm.BatchNorm2d(8) if kind == "BatchNorm2d" else anynorm.LayerNorm((8, 6, 6))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(4, 3, 8, 8))
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert net[1].weight.grad.dtype == torch.float32


def test_other_devices_get_torchs_operation_unless_exact(monkeypatch):
    called = []
    monkeypatch.setattr(torch.nn.functional, "group_norm", lambda *a: called.append("torch") or a[0])
    x, norm = torch.empty(2, 6, 3, device="meta"), anynorm.GroupNorm(3, 6, device="meta")
    norm(x)
    assert called == ["torch"]
    with anynorm.exact(True):
        assert norm(x).shape == x.shape
        with anynorm.exact(False):
            norm(x)
    assert called == ["torch"] * 2
    assert not EXACT.get()
    switch = anynorm.exact(True)
    for _ in range(2):
        with switch:
            assert EXACT.get()
        assert not EXACT.get()


@pytest.mark.parametrize("on", [False, True])
def test_a_compiled_graph_off_the_cpu_knows_exact(on):
    """torch's compiler cannot trace a context variable; the graph keeps what held when it was traced."""
    graphs = []
    norm = anynorm.GroupNorm(3, 6, device="meta")
    torch._dynamo.reset()
    compiled = torch.compile(norm, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    with anynorm.exact(on):
        assert compiled(torch.empty(2, 6, 3, device="meta")).shape == (2, 6, 3)
    (graph,) = graphs
    assert any("group_norm" in str(node.target) for node in graph.graph.nodes) is not on


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "kind", ["BatchNorm2d", "GroupNorm", "InstanceNorm2d", "LayerNorm", "RMSNorm", "BatchNormAct2d"]
)
def test_compiled_calls_of_the_kernels_equal_eager(kind, layout):
    """Inputs large enough to be given to the kernels, in one graph; small ones are traced, see test_accuracy."""
    from anynorm.engine import kernels, library

    shape = (4, 32, 24, 24)
    assert kernels.OFF or torch.Size(shape).numel() >= library.LEAST
    arguments = {"GroupNorm": (4, 32), "LayerNorm": (24,), "RMSNorm": (24,)}.get(kind, (32,))
    torch.compiler.reset()
    eager = getattr(anynorm, kind)(*arguments)
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, fullgraph=True)
    for step in range(2):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step)) + 1e3
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        found = []
        for module, function in ((eager, eager), (compiled, call)):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = function(leaf)
            parameters = list(module.parameters())
            found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *parameters]), *module.buffers()])
        assert found[0][0].stride() == found[1][0].stride()
        for mine, its in zip(*found, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5 * float(mine.abs().max().detach()))


def test_import_leaves_the_compiler_alone():
    """torch._dynamo takes seconds to import; torch.compiler.disable as a decorator imports it."""
    code = "import sys, torch, anynorm; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
