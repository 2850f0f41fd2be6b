"""What batches are like."""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

import anynorm
from doctor.patients import Case, Patient, load, make_blobs, make_cnn, make_mlp, make_patient


def find_noise(patient):
    """How far a sample's output in training scatters with its batch mates, as a share of its spread."""
    torch.manual_seed(0)
    model = copy.deepcopy(patient.model).train()
    x = torch.cat([x for x, _ in patient.loader])
    size = len(next(iter(patient.loader))[0])
    with torch.no_grad():
        found = [model(torch.cat((x[:1], x[torch.randperm(len(x))[: size - 1]])))[0] for _ in range(50)]
    return float(torch.stack(found).std(0).mean())


def make_alike():
    """Images whose samples have the same mean and spread."""
    return torch.randn(256, 1, 8, 8), torch.randint(4, (256,))


def reordered(order, size=32, targets=None, change=None):
    """A trained model whose batches come in another order."""

    def make(seed):
        torch.manual_seed(seed)
        x, y = make_blobs(16 * size)
        y = y if targets is None else targets(y)
        place = order(x, y)
        model = make_mlp() if change is None else change()
        return Patient(model, load(x[place], y[place], size=size, shuffle=False))

    return make


def by_class(x, y):
    return y.argsort()


def by_value(x, y):
    return x[:, 0].argsort()


def shuffled(x, y):
    return torch.randperm(len(y))


def balanced(x, y):
    """The classes one after the other, in every batch alike."""
    return (torch.stack([(y == each).cumsum(0) for each in range(4)], 1).gather(1, y[:, None])[:, 0] * 4 + y).argsort()


def rare(y):
    return (torch.rand(len(y)) < 0.03).long()


class Reader(nn.Module):
    """A classifier of sequences (N, 6, L)."""

    def __init__(self, norm, channels=6):
        super().__init__()
        self.layer, self.norm, self.head = nn.Conv1d(channels, 8, 1), norm(), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.layer(x)).relu().mean(2))


class Last(nn.Module):
    """The same with features last, and layer norm."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.layer(x)).relu().mean(1))


def make_padded(seed, build=None, lengths=True, last=False, channels=6, unused=0):
    """Sequences of 4 to 20 positions, padded to 20."""
    torch.manual_seed(seed)
    x = torch.randn(64, channels, 20) + 1
    many = torch.randint(4, 21, (64,)) if lengths else torch.full((64,), 20)
    x = x * (torch.arange(20) < many[:, None])[:, None]
    if unused:
        x = F.one_hot(torch.randint(channels - unused, (64, 20)), channels).float().transpose(1, 2)
    x = x.transpose(1, 2) if last else x
    model = Reader(lambda: nn.BatchNorm1d(8), channels) if build is None else build()
    return Patient(model, load(x, torch.randint(4, (64,)), size=16))


def make_masked(seed):
    patient = make_padded(seed)
    anynorm.accelerate(patient.model)

    def call(model, batch):
        with anynorm.masked(batch[0].ne(0).any(1), model=model):
            return model(batch[0])

    patient.forward_fn = call
    return patient


CASES = [
    Case(
        "statistics-noisy",
        "1",
        lambda seed: make_patient(seed, size=4, steps=200),
        {
            "32 samples": make_patient,
            "4 images with as many values as 144": lambda seed: make_patient(seed, make_cnn, data=make_alike, size=4),
            "layer norm": lambda seed: make_patient(seed, lambda: make_mlp(lambda: nn.LayerNorm(16)), size=4),
            "frozen": lambda seed: make_patient(seed, after=anynorm.freeze, size=4),
        },
        harm=find_noise,
    ),
    Case(
        "batches-of-few-classes",
        "1",
        reordered(by_class),
        {
            "shuffled": reordered(shuffled),
            "as many of each class in each batch": reordered(balanced),
            "two samples of four classes": reordered(shuffled, size=2),
            "a class of 3 %": reordered(shuffled, size=8, targets=rare),
            "values for targets": reordered(by_class, targets=lambda y: y.float()),
        },
        no_repair="the loader is the user's",
    ),
    Case(
        "batches-drift",
        "1",
        reordered(by_value),
        {
            "shuffled": reordered(shuffled),
            "small batches": reordered(shuffled, size=4),
            "layer norm": reordered(by_value, change=lambda: make_mlp(lambda: nn.LayerNorm(16))),
        },
        no_repair="the loader is the user's",
    ),
    Case(
        "padding-in-statistics",
        "norm",
        make_padded,
        {
            "masked": make_masked,
            "no padding": lambda seed: make_padded(seed, lengths=False),
            "classes that do not occur": lambda seed: make_padded(seed, unused=3, channels=9),
            "layer norm": lambda seed: make_padded(seed, Last, last=True),
        },
        no_repair="only the call knows the lengths",
    ),
]
