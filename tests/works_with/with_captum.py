"""captum: DeepLift, LRP and integrated gradients of an accelerated network equal those with torch's norms."""

import copy

import torch
from captum.attr import LRP, DeepLift, IntegratedGradients
from torch import nn

import anynorm

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 4)).eval()
fast = copy.deepcopy(model)
anynorm.accelerate(fast)
x = torch.randn(2, 3, 6, 6)
for method in (DeepLift, IntegratedGradients, LRP):
    expected = method(model).attribute(x, target=(1, 0, 0))
    torch.testing.assert_close(method(fast).attribute(x, target=(1, 0, 0)), expected, rtol=1e-4, atol=1e-5)
anynorm.accelerate(fast, fuse=True)
refused = []
for method in (DeepLift, LRP):
    try:
        method(fast).attribute(x, target=(1, 0, 0))
    except (NotImplementedError, TypeError):
        refused.append(method)
assert refused == [DeepLift, LRP]
print("with a catch: DeepLift and LRP refuse norms that are fused with an activation: `undo=True` first")
