"""monai: a 3D U-Net with batch norm, and one with instance norm, give the same losses through three steps."""

import copy

import torch
import vision  # noqa: F401
from monai.losses import DiceLoss
from monai.networks.nets import UNet

import anynorm

changed = 0
for norm in ("batch", "instance"):
    torch.manual_seed(0)
    model = UNet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1, norm=norm)
    twin = copy.deepcopy(model)
    report = anynorm.accelerate(model)
    assert report.changed and not report.left, report
    changed += len(report.changed)
    x, y = torch.randn(2, 1, 16, 16, 16), torch.randint(2, (2, 1, 16, 16, 16))
    losses = []
    for each in (model, twin):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            loss = DiceLoss(softmax=True, to_onehot_y=True)(each(x), y)
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)
print(f"works: {changed} norms changed in the two")
