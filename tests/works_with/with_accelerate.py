"""accelerate: norms changed before and after `prepare` train to the same weights, also under bf16 autocast."""

import copy

import torch
import vision  # noqa: F401
from accelerate import Accelerator
from torch import nn

import anynorm

torch.manual_seed(0)
start = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
x, y = torch.randn(8, 3, 6, 6), torch.arange(8) % 4
for precision in ("no", "bf16"):
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    found = []
    for order in ("before", "after", "never"):
        model = copy.deepcopy(start)
        if order == "before":
            anynorm.accelerate(model)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        if order == "after":
            anynorm.accelerate(model)
        for _ in range(3):
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
        found.append(list(accelerator.unwrap_model(model).parameters()))
    tolerance = 1e-4 if precision == "no" else 2e-2
    for before, after, never in zip(*found, strict=True):
        assert torch.equal(before, after)
        torch.testing.assert_close(before, never, rtol=tolerance, atol=tolerance)
    accelerator.free_memory()
    accelerator.state._reset_state(reset_partial_state=True)
print("works: before or after `prepare`, the same to the bit")
