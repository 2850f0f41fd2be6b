"""opacus: `make_private` refuses an accelerated batch norm, and trains an accelerated group norm with noise."""

import copy

import torch
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import anynorm

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
anynorm.accelerate(model)
assert not ModuleValidator.is_valid(model)
model = ModuleValidator.fix(model)
anynorm.accelerate(model)
assert type(model[1]) is anynorm.GroupNorm and ModuleValidator.is_valid(model)
fused = copy.deepcopy(model)
anynorm.accelerate(fused, fuse=True)
assert not ModuleValidator.is_valid(fused)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(torch.randn(32, 3, 6, 6), torch.arange(32) % 4), batch_size=8)
options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
model, optimizer, loader = PrivacyEngine().make_private(
    module=model, optimizer=optimizer, data_loader=loader, **options
)
for x, y in loader:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    assert all(p.grad_sample is not None and p.grad_sample.isfinite().all() for p in model.parameters())
    optimizer.step()
print("with a catch: batch norms are refused, as torch's are, and so are norms fused with an activation")
