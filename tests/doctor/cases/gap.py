"""Fine in training and useless in evaluation."""

import torch.nn as nn

from doctor.patients import Case, make_mlp, make_patient


def shift(model):
    """The averages of other data."""
    model[1].running_mean += 3 * model[1].running_var.sqrt()


def little(model):
    model[1].running_mean += 0.02 * model[1].running_var.sqrt()


CASES = [
    Case(
        "train-eval-gap",
        "1",
        lambda seed: make_patient(seed, after=shift),
        {
            "trained as usual": make_patient,
            "trained a little": lambda seed: make_patient(seed, steps=30),
            "small batches": lambda seed: make_patient(seed, size=8),
            "half of it dropped in training": lambda seed: make_patient(
                seed, lambda: nn.Sequential(*make_mlp()[:3], nn.Dropout(0.5), nn.Linear(16, 4))
            ),
            "averages that are off by little": lambda seed: make_patient(seed, after=little),
            "layer norm": lambda seed: make_patient(seed, lambda: make_mlp(lambda: nn.LayerNorm(16))),
        },
    ),
]
