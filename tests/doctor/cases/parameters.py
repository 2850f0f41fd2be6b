"""Gamma, beta, and the bias before a norm."""

import torch
import torch.nn as nn

import anynorm
from doctor.patients import Case, Patient, count_parameters, make_blobs, make_cnn, make_images, make_mlp, make_patient


class Twice(nn.Module):
    """A layer that is called once before the norm and once past it."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.layer(x)) + self.layer(x + 1))


class Turned(nn.Module):
    """Sequences whose features a linear layer has last, and the norm second."""

    def __init__(self, turns):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(64, 4)
        self.turns = turns

    def forward(self, x):
        x = self.layer(x)
        x = self.norm(x.transpose(1, 2)) if self.turns else self.norm(x)
        return self.head(x.flatten(1))


def make_sequences():
    x, y = make_blobs()
    return x[:, None] + torch.randn(len(x), 8, 8), y


class OnePlus(nn.Module):
    """A norm whose scale is 1 + weight, as in Gemma."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16))

    def forward(self, x):
        return nn.functional.rms_norm(x, (16,)) * (1 + self.weight)


OnePlus.__name__ = "GemmaRMSNorm"


def scale(factor, channels=4):
    return lambda model: model[1].weight[:channels].mul_(factor)


def absolute(model):
    model[1].weight.abs_()


def negative(model):
    absolute(model)
    model[1].weight[:3].neg_()


def count_negative(patient):
    return float((patient.model[1].weight < 0).sum())


def with_pool(*behind, after=negative):
    return lambda seed: make_patient(seed, lambda: make_cnn(*behind), after, data=make_images)


def fresh_zero(seed):
    model = make_mlp()
    nn.init.zeros_(model[1].weight)
    return Patient(model)


CASES = [
    Case(
        "bias-useless",
        "1",
        lambda seed: make_patient(seed, lambda: make_mlp(bias=True)),
        {
            "no bias": make_patient,
            "before layer norm": lambda seed: make_patient(seed, lambda: make_mlp(lambda: nn.LayerNorm(16), bias=True)),
            "before an activation": lambda seed: make_patient(
                seed, lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 4))
            ),
            "before averages that stand still": lambda seed: make_patient(
                seed, lambda: make_mlp(bias=True), anynorm.freeze
            ),
            "of a layer that is called elsewhere too": lambda seed: make_patient(seed, Twice),
            "before a transposition": lambda seed: make_patient(seed, lambda: Turned(True), data=make_sequences),
            "over features where the norm counts positions": lambda seed: make_patient(
                seed, lambda: Turned(False), data=make_sequences
            ),
        },
        harm=count_parameters,
    ),
    Case(
        "gamma-zero",
        "1",
        lambda seed: make_patient(seed, after=scale(0)),
        {
            "as a residual branch begins": fresh_zero,
            "small": lambda seed: make_patient(seed, after=scale(1e-4)),
            "a scale of 1 + weight": lambda seed: Patient(make_mlp(OnePlus)),
        },
        no_repair="pruning a channel changes the layers around it",
    ),
    Case(
        "gamma-negative",
        "1",
        with_pool(nn.MaxPool2d(2), nn.ReLU()),
        {
            "behind an activation": with_pool(nn.ReLU(), nn.MaxPool2d(2)),
            "average pooling": with_pool(nn.AvgPool2d(2), nn.ReLU()),
            "all above 0": with_pool(nn.MaxPool2d(2), nn.ReLU(), after=absolute),
            "behind another layer": with_pool(nn.Conv2d(8, 8, 1), nn.MaxPool2d(2), nn.ReLU()),
        },
        harm=count_negative,
    ),
]
