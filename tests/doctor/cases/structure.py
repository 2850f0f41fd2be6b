"""Where norms stand: behind activations, at several places, over one feature, in several processes."""

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import anynorm
from doctor.patients import Case, Patient, find_gradient, load, make_blobs, make_mlp, make_patient


def make_postnorm():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 4))


class Preactivated(nn.Module):
    """A residual branch that begins with its norm."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.inside, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.first(x)
        return self.head(x + self.inside(self.norm(x).relu()))


def make_shared(make):
    """The same norm behind two layers whose outputs differ much."""
    norm = make()
    first, second = nn.Linear(8, 16, bias=False), nn.Linear(16, 16, bias=False)
    with torch.no_grad():
        second.weight.mul_(6)
    return nn.Sequential(first, norm, nn.ReLU(), second, norm, nn.ReLU(), nn.Linear(16, 4))


class Siamese(nn.Module):
    """Two views of a sample through the same layers."""

    def __init__(self):
        super().__init__()
        self.inside, self.head = make_mlp(), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.cat((self.inside(x), self.inside(x + 0.1 * torch.randn_like(x))), 1))


def make_narrow(norm, wide=1):
    return lambda: nn.Sequential(nn.Linear(8, wide), norm(), nn.Linear(wide, 4))


def make_distributed(seed, world=2, size=8, change=None):
    """Ranks that do not talk: one process is enough to see how a model is wrapped."""
    torch.manual_seed(seed)
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    model = make_mlp()
    if change is not None:
        change(model)
    return Patient(DistributedDataParallel(model), load(*make_blobs(256), size=size))


def count_unsynchronized(patient):
    """In one process no more can be seen of it; `anynorm.sync` has its own tests with several."""
    return sum(type(module) is nn.BatchNorm1d for module in patient.model.modules())


class Own(nn.BatchNorm1d):
    """With code of its own."""

    def forward(self, input):
        return super().forward(input) * 1.5


class Renamed(nn.BatchNorm1d):
    """With a name of its own."""


CASES = [
    Case(
        "norm-after-activation",
        "2",
        lambda seed: make_patient(seed, make_postnorm),
        {
            "pre-activation": lambda seed: make_patient(seed, Preactivated),
            "behind the next layer": lambda seed: make_patient(
                seed, lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4))
            ),
            "layer norm": lambda seed: make_patient(
                seed, lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 4))
            ),
            "an activation of the input": lambda seed: make_patient(
                seed, lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 4))
            ),
        },
        no_repair="another order computes something else, and a trained network is right as it is",
    ),
    Case(
        "norm-shared",
        "1",
        lambda seed: make_patient(seed, lambda: make_shared(lambda: nn.BatchNorm1d(16))),
        {
            "layer norm in two places": lambda seed: make_patient(seed, lambda: make_shared(lambda: nn.LayerNorm(16))),
            "two views of the same data": lambda seed: make_patient(seed, Siamese),
            "batch norm without averages": lambda seed: make_patient(
                seed, lambda: make_shared(lambda: nn.BatchNorm1d(16, track_running_stats=False))
            ),
        },
    ),
    Case(
        "norm-of-one-feature",
        "1",
        lambda seed: make_patient(seed, make_narrow(lambda: nn.LayerNorm(1))),
        {
            "batch norm of one channel": lambda seed: make_patient(seed, make_narrow(lambda: nn.BatchNorm1d(1))),
            "RMS norm of one feature, which gives the sign": lambda seed: make_patient(
                seed, make_narrow(lambda: nn.RMSNorm(1))
            ),
            "two features": lambda seed: make_patient(seed, make_narrow(lambda: nn.LayerNorm(2), 2)),
            "one group of all channels": lambda seed: make_patient(seed, make_narrow(lambda: nn.GroupNorm(1, 4), 4)),
        },
        harm=find_gradient,
    ),
    Case(
        "batch-norm-unsynchronized",
        "1",
        make_distributed,
        {
            "one process": lambda seed: make_distributed(seed, world=1),
            "large batches": lambda seed: make_distributed(seed, size=64),
            "synchronized": lambda seed: make_distributed(seed, change=anynorm.sync),
            "not distributed": lambda seed: make_patient(seed, size=8),
        },
        harm=count_unsynchronized,
    ),
    Case(
        "left-by-accelerate",
        "1",
        lambda seed: make_patient(seed, lambda: make_mlp(lambda: Own(16))),
        {
            "torch's, where torch reads its weights": lambda seed: Patient(
                nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
            ),
            "a subclass without code": lambda seed: make_patient(seed, lambda: make_mlp(lambda: Renamed(16))),
            "ours": lambda seed: make_patient(seed, lambda: make_mlp(lambda: anynorm.BatchNorm1d(16))),
        },
        no_repair="only its author knows what the class computes",
    ),
]
