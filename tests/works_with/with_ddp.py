"""torch DistributedDataParallel: two ranks with `anynorm.sync` train to the weights of one process on both batches."""

import copy

import torch
from ranks import run
from torch import nn

import anynorm

torch.manual_seed(0)
START = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
X, Y = torch.randn(12, 3, 6, 6), torch.arange(12) % 4


def train(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def task(rank):
    model, alone = copy.deepcopy(START), copy.deepcopy(START)
    anynorm.accelerate(model)
    anynorm.sync(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(wrapped, X.tensor_split(2)[rank], Y.tensor_split(2)[rank])
    train(alone, X, Y)
    for ours, theirs in zip(model.state_dict().values(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    anynorm.recalibrate(wrapped, X.tensor_split(2)[rank].split(3))
    seen = model[0](X).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_var, seen.var(1), rtol=1e-4, atol=1e-4)


run(task)
print("works: accelerate and sync before wrapping; recalibrate takes the wrapper off and merges the ranks")
