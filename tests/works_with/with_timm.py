"""timm: one step of a ResNet-18 with its norms accelerated equals one without, and `undo=True` gives timm's back."""

import copy

import torch
import vision  # noqa: F401
from timm import create_model

import anynorm

torch.manual_seed(0)
model = create_model("resnet18", num_classes=4)
twin = copy.deepcopy(model)
report = anynorm.accelerate(model)
x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
for each in (model, twin):
    torch.nn.functional.cross_entropy(each(x), y).backward()
for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * float(theirs.grad.abs().max()))
model.eval(), twin.eval()
torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-5)
changed = len(report.changed)
assert changed == 20 and not report.left, report
anynorm.accelerate(model, undo=True)
assert type(model.bn1) is torch.nn.BatchNorm2d
print(f"works: {changed} norms changed; norm classes of timm's own: see the models below")
