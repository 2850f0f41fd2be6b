"""torchao: int8 weights by `quantize_`, and int8 convolutions by PT2E, with accelerated norms as with torch's."""

import copy

import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import anynorm


def quantize_pt2e(model, x, qat):
    """The operations of the quantized graph, and its output."""
    config = get_default_x86_inductor_quantization_config(is_qat=qat)
    graph = torch.export.export(model.train(qat), (x,)).module()
    graph = (prepare_qat_pt2e if qat else prepare_pt2e)(graph, X86InductorQuantizer().set_global(config))
    graph(x)
    graph = convert_pt2e(graph)
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"], graph(x)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.RMSNorm(64)).eval()
twin, late = copy.deepcopy(model), copy.deepcopy(model)
anynorm.accelerate(model)
for each in (model, twin, late):
    quantize_(each, Int8WeightOnlyConfig())
anynorm.accelerate(late)
x = torch.randn(4, 64)
for each in (model, late):
    assert type(each[1]) is anynorm.LayerNorm
    torch.testing.assert_close(each(x), twin(x), rtol=1e-4, atol=1e-4)

x = torch.randn(4, 3, 8, 8)
for qat in (False, True):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model(x)
    twin = copy.deepcopy(model)
    anynorm.accelerate(model)
    found, want = quantize_pt2e(model, x, qat), quantize_pt2e(twin, x, qat)
    assert found[0] == want[0] and not any("batch_norm" in name for name in found[0]), found[0]
    torch.testing.assert_close(found[1], want[1], rtol=1e-4, atol=1e-4)
print("works: accelerate before or after `quantize_`; PT2E folds the norms, also in quantization-aware training")
