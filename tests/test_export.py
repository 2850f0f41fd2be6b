"""Graphs of recurrent layers with norms serve other batches than the one they were made with.

pytorch#191855; Sierkinhane/CRNN#302. The number of steps is fixed, as with torch's own layer in torch.export.
"""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import anynorm

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
