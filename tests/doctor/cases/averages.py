"""Running averages and what moves them."""

import copy

import torch
import torch.nn as nn

import anynorm
from doctor.patients import Case, Patient, find_movement, find_norm, make_blobs, make_mlp, make_patient


def with_momentum(momentum, seed, after=None, **options):
    return make_patient(seed, lambda: make_mlp(lambda: nn.BatchNorm1d(16, momentum=momentum)), after, **options)


def count(number):
    return lambda model: model[1].num_batches_tracked.fill_(number)


def far():
    """Whose variance is far from 1 before the norm."""
    return make_blobs(scale=4, shift=1)


def near():
    """Whose variance is far below 1 before the norm."""
    return make_blobs(scale=0.1)


def still(patient):
    return -find_movement(patient)


def replaced(patient):
    """How far the next batch moves averages that weigh all alike."""
    patient = Patient(copy.deepcopy(patient.model), patient.loader)
    find_norm(patient).momentum = None
    return find_movement(patient)


def without_data(patient):
    return Patient(patient.model)


def fresh(change):
    """Not trained at all."""

    def make(seed):
        torch.manual_seed(seed)
        model = make_mlp()
        with torch.no_grad():
            change(model[1])
        return Patient(model, [make_blobs(32) for _ in range(4)])

    return make


def drop_counter(norm):
    norm.num_batches_tracked = None


def forget(model):
    """As if the buffers had not been in the checkpoint."""
    model[1].reset_running_stats()


def in_bfloat16(seed, after=None):
    patient = make_patient(seed, lambda: make_mlp(lambda: nn.BatchNorm1d(16, momentum=0.01)), data=far)
    model = patient.model.bfloat16()
    if after is not None:
        after(model)
    loader = [(x.bfloat16(), y) for x, y in patient.loader]
    return Patient(
        model, loader, torch.optim.SGD(model.parameters(), 0.1), lambda y, t: nn.functional.cross_entropy(y.float(), t)
    )


def stalled(patient):
    """How far averages stay from what they are in float64, after 400 batches."""
    model = copy.deepcopy(patient.model).train()
    exact = copy.deepcopy(model).double()
    for _ in range(25):
        for x, _ in patient.loader:
            with torch.no_grad():
                model(x), exact(x.double())
    off = model[1].running_var.double() - exact[1].running_var
    return float((off / exact[1].running_var).abs().median())


CASES = [
    Case(
        "momentum-zero",
        "1",
        lambda seed: with_momentum(0.0, seed),
        {
            "momentum None": lambda seed: with_momentum(None, seed),
            "frozen by anynorm.freeze": lambda seed: with_momentum(0.0, seed, anynorm.freeze),
            "a small momentum and a long training": lambda seed: with_momentum(1e-3, seed, count(50_000)),
            "no running averages": lambda seed: make_patient(
                seed, lambda: make_mlp(lambda: nn.BatchNorm1d(16, momentum=0.0, track_running_stats=False))
            ),
        },
        harm=still,
    ),
    Case(
        "momentum-inverted",
        "1",
        lambda seed: with_momentum(0.99, seed, size=8),
        {
            "0.5": lambda seed: with_momentum(0.5, seed),
            "momentum None": lambda seed: with_momentum(None, seed),
            "frozen": lambda seed: with_momentum(0.99, seed, anynorm.freeze),
        },
    ),
    Case(
        "momentum-slow",
        "1",
        lambda seed: with_momentum(0.01, seed, data=far),
        {
            "0.01 with 5,000 batches": lambda seed: with_momentum(0.01, seed, count(5000)),
            "0.1 with 60 batches": lambda seed: with_momentum(0.1, seed),
            "recalibrated on 8 batches": lambda seed: recalibrated(seed, 8),
            "from a checkpoint, its counter begun anew": lambda seed: without_data(
                with_momentum(0.1, seed, count(5), data=near)
            ),
        },
    ),
    Case(
        "counter-zero",
        "1",
        lambda seed: with_momentum(0.1, seed, count(0)),
        {
            "not trained": fresh(lambda norm: None),
            "no counter, as before torch 0.4.1": lambda seed: with_momentum(
                0.1, seed, lambda model: drop_counter(model[1])
            ),
            "counted": lambda seed: with_momentum(0.1, seed),
        },
        harm=replaced,
    ),
    Case(
        "never-updated",
        "1",
        lambda seed: with_momentum(0.1, seed, forget, data=far),
        {
            "gammas that begin with 0, as in residual branches": fresh(lambda norm: norm.weight.zero_()),
            "gammas that are drawn, as in DCGAN": fresh(lambda norm: norm.weight.normal_(1, 0.02)),
            "not trained": fresh(lambda norm: None),
            "trained": lambda seed: with_momentum(0.1, seed),
        },
    ),
    Case(
        "averages-in-half",
        "1",
        in_bfloat16,
        {
            "for evaluation only": lambda seed: Patient(make_patient(seed).model.half().eval()),
            "the norm in float32": lambda seed: in_bfloat16(seed, lambda model: model[1].float()),
            "frozen": lambda seed: in_bfloat16(seed, anynorm.freeze),
        },
        harm=stalled,
    ),
]


def recalibrated(seed, batches):
    patient = make_patient(seed, data=far)
    anynorm.recalibrate(patient.model.eval(), list(patient.loader)[:batches], progress=False)
    return patient
