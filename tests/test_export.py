"""Graphs of norms, and of recurrent layers with them, serve other batches and lengths than their example's.

pytorch#191855; Sierkinhane/CRNN#302. The number of steps is fixed, as with torch's own layer in torch.export. ONNX is
tried by tests/works_with/export.py, which has the layers and writes docs/export.md.
"""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import anynorm
from works_with.export import PAGE, check, export, read_rows, trace
from works_with.export_layers import LAYERS, Layer, settle

KINDS = [
    ("LSTM", {"norm": "layer"}),
    ("LSTM", {"norm": "batch-sequence", "bidirectional": True, "batch_first": True}),
    ("LSTM", {"norm": "batch-per-step", "max_steps": 3, "num_layers": 2}),
    ("GRU", {"norm": "layer", "bidirectional": True, "batch_first": True}),
    ("GRU", {"norm": "batch-sequence", "num_layers": 2}),
    ("GRU", {"norm": "batch-per-step", "max_steps": 3, "batch_first": True}),
]
each_kind = pytest.mark.parametrize(("kind", "options"), KINDS, ids=[f"{k}-{o['norm']}" for k, o in KINDS])


class Net(nn.Module):
    def __init__(self, kind: str, options: dict) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = getattr(anynorm, kind)(4, 6, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        output, state = self.layer(x)
        return (output, *state) if isinstance(state, tuple) else (output, state)

    def draw(self, samples: int) -> Tensor:
        """5 steps."""
        x = torch.randn(samples, 5, 4)
        return x if self.layer.batch_first else x.transpose(0, 1)


@pytest.fixture(autouse=True)
def quiet():
    """The exporter logs its own errors."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def make(kind: str, options: dict) -> Net:
    """In evaluation, with running averages of two batches."""
    net = Net(kind, options)
    for _ in range(2):
        net(net.draw(3))
    return net.eval()


STEPS = {name: layer for name, layer in LAYERS.items() if "LSTM" in name or "GRU" in name}
NORMS = {name: layer for name, layer in LAYERS.items() if name not in STEPS}
WRITTEN_OUT = [name for name in NORMS if "AnyNorm" in name or "mask" in name or "lengths" in name]


@pytest.mark.filterwarnings("ignore")  # torch's own: torch.jit.trace is deprecated, and warns of every size it reads
@pytest.mark.parametrize("name", NORMS)
def test_traced_norms_equal_eager_at_other_batch_sizes_and_lengths(name):
    layer, model = NORMS[name], NORMS[name].make()
    check(trace(layer, model, "nl"), layer, model, "nl")


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("name", ["BatchNorm1d", "RMSNorm", "a frozen model in `train()`", *WRITTEN_OUT])
def test_exported_norms_equal_eager_at_other_batch_sizes_and_lengths(name):
    """And hold no operation that exporters to ONNX do not know, as the bits of floats were."""
    layer, model = NORMS[name], NORMS[name].make()
    graph = export(layer, model, "nl")
    check(graph, layer, model, "nl")
    assert not [node for node in graph.graph.nodes if str(node.target) == "aten.view.dtype" or "anynorm" in str(node)]


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("RMSNorm", "aten::rms_norm"),
        ("BatchNorm1d without running averages", "aten::batch_norm"),
        ("InstanceNorm1d with running averages", "aten::instance_norm"),
    ],
)
def test_what_the_exporter_by_tracing_does_not_know_is_written_out(name, operation, monkeypatch):
    """torch.onnx says that it exports; elsewhere torch's operation stays."""
    layer, model = NORMS[name], NORMS[name].make()
    assert operation in str(trace(layer, model, "nl").inlined_graph)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    graph = trace(layer, model, "nl")
    assert operation not in str(graph.inlined_graph)
    check(graph, layer, model, "nl")


@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.parametrize("name", ["GroupNorm, `lengths=`", "BatchNorm1d, `mask=`", 'AnyNorm("n (g k) s -> n g")'])
def test_traced_graphs_hold_no_size_of_their_example(name):
    """What torch's exporter to ONNX would take for a constant behind an unflatten."""
    layer = NORMS[name]
    assert "aten::expand(" not in str(trace(layer, layer.make(), "nl").inlined_graph)


@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.parametrize(
    "activation", ["relu", "leaky_relu(0.3)", "silu", "gelu", "gelu_tanh", "hardswish", "elu(0.5)"]
)
def test_traced_activations_equal_eager(activation):
    layer = Layer(lambda: settle(anynorm.GroupNormAct(2, 6, activation=activation)))
    model = layer.make()
    check(trace(layer, model, "nl"), layer, model, "nl")


def test_a_power_of_two_in_a_graph_is_one(monkeypatch):
    """It scales values exactly, or norms would lose a digit; which of its neighbours it is does not matter."""
    from anynorm import statistics

    sizes = torch.cat([2.0 ** torch.arange(-126.0, 128), torch.rand(1000) * 1e5])
    want = statistics.find_power(sizes)
    monkeypatch.setattr(statistics, "is_recording", lambda: True)
    found = statistics.find_power(sizes)
    mantissa, _ = torch.frexp(found)
    assert (mantissa == 0.5).all()
    assert ((found / want).log2().abs() <= 1).all()
    assert statistics.find_power(torch.zeros(1)) == 0


def test_the_page_has_a_row_for_each_layer_and_what_fails_is_known():
    """`make works-with` writes it."""
    rows = read_rows(PAGE.read_text())
    assert list(rows) == list(LAYERS)
    for name, cells in rows.items():
        said = "works, with the length fixed" if name in STEPS else "works"
        assert cells[:4] == [said] * 4, name
        assert cells[4:] == [said if LAYERS[name].aot else ""], name


@pytest.mark.filterwarnings("ignore")  # torch's own, of the flat weights that every recurrent layer has
@each_kind
def test_exported_equals_eager_at_other_batch_sizes(kind, options):
    net = make(kind, options)
    axis = 0 if net.layer.batch_first else 1
    shapes = {"x": {axis: torch.export.Dim("batch", min=2, max=64)}}
    graph = torch.export.export(net, (net.draw(3),), dynamic_shapes=shapes).module()
    for samples in (3, 2, 7):
        x = net.draw(samples)
        torch.testing.assert_close(graph(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # as above
@each_kind
def test_traced_equals_eager_at_other_batch_sizes(kind, options):
    """What the TorchScript exporter of ONNX starts from: no size of the batch is a constant of the graph."""
    net = make(kind, options)
    traced = torch.jit.trace(net, (net.draw(3),), check_trace=False)
    for samples in (3, 1, 7):
        x = net.draw(samples)
        torch.testing.assert_close(traced(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # as above, and the exporter's word that it is deprecated
@each_kind
def test_onnx_equals_eager_at_other_batch_sizes(kind, options):
    """By the reference evaluator of the onnx package, where that is installed."""
    onnx = pytest.importorskip("onnx", reason="the exporter to ONNX needs the package onnx")
    reference = pytest.importorskip("onnx.reference")
    import io

    net, file = make(kind, options), io.BytesIO()
    axes = {"x": {0 if net.layer.batch_first else 1: "batch"}}
    torch.onnx.export(net, (net.draw(3),), file, dynamo=False, input_names=["x"], dynamic_axes=axes, opset_version=17)
    session = reference.ReferenceEvaluator(onnx.load_from_string(file.getvalue()))
    for samples in (3, 1, 7):
        x = net.draw(samples)
        found = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(tuple(map(torch.from_numpy, found)), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # as above
def test_another_number_of_steps_is_refused_as_with_torchs_layer():
    """A graph of fixed steps that took others would be wrong in silence."""

    class Plain(Net):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.layer = nn.LSTM(4, 6)

    shapes = {"x": {0: torch.export.Dim("steps", min=2, max=64)}}
    for net in (Plain().eval(), make("LSTM", {"norm": "layer"})):
        with pytest.raises(torch._dynamo.exc.UserError, match="steps"):
            torch.export.export(net, (net.draw(3),), dynamic_shapes=shapes)
