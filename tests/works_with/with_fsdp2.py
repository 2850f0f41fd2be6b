"""torch FSDP2 (`fully_shard`): two ranks with accelerated layer and batch norms take the steps torch's norms take."""

import copy

import torch
from ranks import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import anynorm

torch.manual_seed(0)
LAYERS = (nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))
X, Y = torch.randn(2, 8, 6), torch.arange(8) % 4


def task(rank):
    found = []
    for order in ("before", "after", "never"):
        model = copy.deepcopy(nn.Sequential(*LAYERS))
        if order == "before":
            anynorm.accelerate(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        if order == "after":
            anynorm.accelerate(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[rank]), Y).backward()
            optimizer.step()
        found.append([p.full_tensor() for p in model.parameters()])
    for before, after, never in zip(*found, strict=True):
        torch.testing.assert_close(before, never, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after, never, rtol=1e-4, atol=1e-5)


run(task)
print("works: accelerate before or after `fully_shard`")
