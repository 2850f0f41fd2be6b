"""What moves and what stands still."""

import torch.nn as nn

import anynorm
from doctor.patients import Case, Patient, find_dependence, find_movement, make_mlp, make_patient


class KeepsEvaluation(nn.Sequential):
    """Whose `train` leaves norms in evaluation, as detectors do."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


def make_keeper():
    model = KeepsEvaluation(*make_mlp())
    return model.train()


def half_evaluated(model):
    model.eval()
    model[1].train()


def half_trained(model):
    model.train()
    model[1].eval()


def fix_affine(model):
    model.train()
    model[1].requires_grad_(False)


def freeze_affine(model):
    fix_affine(model)
    anynorm.freeze(model)


def fix_all(model):
    model.requires_grad_(False)


def fix_and_stop(model):
    fix_affine(model)
    model[1].momentum = 0


def with_dropout(seed):
    patient = make_patient(seed, lambda: nn.Sequential(*make_mlp(), nn.Dropout(0.5)))
    patient.model.eval()[4].train()
    return patient


def in_part(seed):
    patient = make_patient(seed)
    patient.model.eval()
    anynorm.freeze(patient.model)
    return patient


CASES = [
    Case(
        "training-in-evaluation",
        "1",
        lambda seed: make_patient(seed, after=half_evaluated),
        {
            "dropout that is on in evaluation": with_dropout,
            "all in training": make_patient,
            "frozen": in_part,
            "layer norm": lambda seed: make_patient(seed, lambda: make_mlp(lambda: nn.LayerNorm(16)), half_evaluated),
            "the norm alone": lambda seed: Patient(nn.BatchNorm1d(4)),
        },
        harm=find_dependence,
    ),
    Case(
        "frozen-but-moving",
        "1",
        lambda seed: make_patient(seed, after=fix_affine),
        {
            "frozen by anynorm.freeze": lambda seed: make_patient(seed, after=freeze_affine),
            "nothing is trained": lambda seed: make_patient(seed, after=fix_all),
            "momentum 0": lambda seed: make_patient(seed, after=fix_and_stop),
            "the model's own train keeps it in evaluation": lambda seed: make_patient(
                seed, make_keeper, lambda model: model[1].requires_grad_(False)
            ),
            "without gamma and beta": lambda seed: make_patient(
                seed, lambda: make_mlp(lambda: nn.BatchNorm1d(16, affine=False))
            ),
        },
        harm=find_movement,
    ),
    Case(
        "statistics-stand-still",
        "1",
        lambda seed: make_patient(seed, after=half_trained),
        {
            "all in evaluation": lambda seed: make_patient(seed, after=lambda model: model.eval()),
            "frozen by anynorm.freeze": lambda seed: make_patient(
                seed, after=lambda model: anynorm.freeze(model, affine=False)
            ),
            "the model's own train keeps it in evaluation": lambda seed: make_patient(seed, make_keeper),
            "layer norm": lambda seed: make_patient(seed, lambda: make_mlp(lambda: nn.LayerNorm(16)), half_trained),
        },
        harm=find_movement,
    ),
]
