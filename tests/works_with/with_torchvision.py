"""torchvision: a MobileNetV3 and an LR-ASPP with accelerated norms give the same outputs and gradients."""

import copy

import torch
import vision  # noqa: F401
from torchvision.models import mobilenet_v3_small
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import anynorm

torch.manual_seed(0)
changed = 0
options = {"weights": None, "weights_backbone": None, "num_classes": 3}
for model in (mobilenet_v3_small(), lraspp_mobilenet_v3_large(**options)):
    model.eval()  # Dropout off; the running averages are those of a new model.
    twin = copy.deepcopy(model)
    report = anynorm.accelerate(model)
    changed += len(report.changed)
    x = torch.randn(2, 3, 64, 64)
    found = [each(x) for each in (model, twin)]
    found = [y["out"] if isinstance(y, dict) else y for y in found]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    for y in found:
        y.square().sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * scale + 1e-7)
print(f"works: {changed} norms changed in the two")
