"""torchao: `quantize_` to int8 weights, on a model with accelerated norms and on one with torch's."""

import copy

import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import anynorm

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
print("works: accelerate before or after `quantize_`")
