"""What batches show of where norms stand."""

import copy

import torch
import torch.nn as nn

import anynorm
from doctor.patients import (
    Case,
    find_gradient,
    load,
    make_blobs,
    make_cnn,
    make_images,
    make_mlp,
    make_patient,
)


def make_sequences():
    x, y = make_blobs()
    return x[:, None] + torch.randn(len(x), 5, 8), y


class Features(nn.Module):
    """Behind a linear layer over features, before the norm or with a transposition."""

    def __init__(self, turns):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8 if turns else 5), nn.Linear(40, 4)
        self.turns = turns

    def forward(self, x):
        x = self.layer(x)
        x = self.norm(x.transpose(1, 2)) if self.turns else self.norm(x)
        return self.head(x.flatten(1))


class Mixer(nn.Module):
    """A linear layer over positions, with the features as channels."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(5, 5), nn.BatchNorm1d(8), nn.Linear(40, 4)

    def forward(self, x):
        return self.head(self.norm(self.layer(x.transpose(1, 2))).flatten(1))


def pooled(norm, size=1):
    """Images that are pooled before the norm, which stands at 2."""

    def build():
        layers = (nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(size), norm(), nn.ReLU(), nn.Flatten())
        return nn.Sequential(*layers, nn.Linear(8 * size * size, 4))

    return lambda seed: make_patient(seed, build, data=make_images, steps=20)


def make_left_over(seed, left=1, build=make_mlp, after=None, data=make_blobs, **options):
    patient = make_patient(seed, build, after, data=data)
    x, y = data()
    patient.loader = load(x[: 96 + left], y[: 96 + left], **options)
    return patient


def count_refused(patient):
    """Batches of the loader that cannot be trained on."""
    model, refused = copy.deepcopy(patient.model).train(), 0
    for x, _ in patient.loader:
        try:
            model(x)
        except ValueError:
            refused += 1
    return refused


def dropped(p, after=None):
    def build():
        return nn.Sequential(nn.Dropout(p), *make_mlp())

    return lambda seed: make_patient(seed, build, after, data=lambda: make_blobs(scale=3), steps=120)


def recalibrated(seed):
    patient = dropped(0.5)(seed)
    anynorm.recalibrate(patient.model.eval(), list(patient.loader), progress=False)
    return patient


CASES = [
    Case(
        "channels-on-the-last-axis",
        "norm",
        lambda seed: make_patient(seed, lambda: Features(False), data=make_sequences),
        {
            "transposed before the norm": lambda seed: make_patient(seed, lambda: Features(True), data=make_sequences),
            "a linear layer over positions": lambda seed: make_patient(seed, Mixer, data=make_sequences),
            "two axes": make_patient,
        },
        no_repair="the transposition stands in the model's code",
    ),
    Case(
        "groups-of-one-element",
        "2",
        pooled(lambda: nn.GroupNorm(8, 8)),
        {
            "instance norm on 2x2": pooled(lambda: nn.InstanceNorm2d(8), 2),
            "two channels in a group": pooled(lambda: nn.GroupNorm(4, 8)),
            "groups of one channel on 2x2": pooled(lambda: nn.GroupNorm(8, 8), 2),
            "batch norm on 1x1": pooled(lambda: nn.BatchNorm2d(8)),
        },
        harm=find_gradient,
    ),
    Case(
        "one-value-per-channel",
        "1",
        make_left_over,
        {
            "the last batch is dropped": lambda seed: make_left_over(seed, drop_last=True),
            "two are left": lambda seed: make_left_over(seed, 2),
            "one image is left, of many values": lambda seed: make_left_over(seed, 1, make_cnn, data=make_images),
            "frozen": lambda seed: make_left_over(seed, after=anynorm.freeze),
            "on_single='running'": lambda seed: make_left_over(
                seed, build=lambda: make_mlp(lambda: anynorm.BatchNorm1d(16, on_single="running"))
            ),
            "layer norm": lambda seed: make_left_over(seed, build=lambda: make_mlp(lambda: nn.LayerNorm(16))),
        },
        harm=count_refused,
    ),
    Case(
        "dropout-before-batch-norm",
        "2",
        dropped(0.5),
        {
            "dropout behind the last norm": lambda seed: make_patient(
                seed, lambda: nn.Sequential(*make_mlp()[:3], nn.Dropout(0.5), nn.Linear(16, 4))
            ),
            "dropout of nothing": dropped(0.0),
            "dropout of little": dropped(0.05),
            "averages without dropout": recalibrated,
            "without dropout": make_patient,
        },
    ),
]
