"""segmentation-models-pytorch: a U-Net is accelerated, and recalibrated on its data."""

import copy

import torch
import vision  # noqa: F401
from segmentation_models_pytorch import Unet

import anynorm

torch.manual_seed(0)
model = Unet("resnet18", encoder_weights=None, classes=2)
twin = copy.deepcopy(model)
report = anynorm.accelerate(model)
assert report.changed and not report.left, report
x = torch.randn(6, 3, 64, 64)
torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-4)
for each in (model, twin):
    anynorm.recalibrate(each.eval(), x.split(2))
torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-4)
print(f"works: {len(report.changed)} norms changed")
