"""Dependence on batch mates and on padding."""

import copy

import torch
import torch.nn as nn

from doctor.cases.batches import make_padded
from doctor.patients import Case, Patient, find_dependence, make_mlp, make_patient


class TimeFirst(nn.Module):
    """Takes (L, N, D): the first axis is no batch."""

    def __init__(self):
        super().__init__()
        self.norm, self.lstm = nn.LayerNorm(8), nn.LSTM(8, 8)

    def forward(self, x):
        return self.lstm(self.norm(x))[0]


class Positions(nn.Module):
    """One output for each position."""

    def __init__(self, norm):
        super().__init__()
        self.layer, self.norm, self.head = nn.Conv1d(6, 8, 1), norm, nn.Conv1d(8, 4, 1)

    def forward(self, x):
        return self.head(self.norm(self.layer(x)))


class FeaturesLast(nn.Module):
    """The same with layer norm over features."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.layer(x)))


def in_evaluation(patient):
    return find_dependence(Patient(copy.deepcopy(patient.model).eval(), patient.loader))


def positions(norm, **options):
    def make(seed):
        patient = make_padded(seed, lambda: Positions(norm()), **options)
        patient.loss_fn = None
        return patient

    return make


def make_last(seed):
    patient = make_padded(seed, FeaturesLast, last=True)
    patient.loss_fn = None
    return patient


CASES = [
    Case(
        "samples-leak",
        "1",
        lambda seed: make_patient(seed, lambda: make_mlp(lambda: nn.BatchNorm1d(16, track_running_stats=False))),
        {
            "time first": lambda seed: Patient(TimeFirst(), [torch.randn(10, 4, 8)], loss_fn=None),
            "group norm": lambda seed: make_patient(seed, lambda: make_mlp(lambda: nn.GroupNorm(4, 16))),
            "running averages": make_patient,
        },
        harm=in_evaluation,
    ),
    Case(
        "output-depends-on-padding",
        "norm",
        positions(lambda: nn.GroupNorm(2, 8)),
        {
            "batch norm in evaluation": positions(lambda: nn.BatchNorm1d(8)),
            "layer norm over features": make_last,
            "data without padding": positions(lambda: nn.GroupNorm(2, 8), lengths=False),
        },
        no_repair="only the call knows the lengths",
    ),
]
