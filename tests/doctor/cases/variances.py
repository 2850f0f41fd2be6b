"""Running variances that cannot be right, and the eps beside them."""

import copy

import torch
import torch.nn as nn

import anynorm
from doctor.patients import Case, Patient, make_blobs, make_mlp, make_patient


def with_eps(eps, seed, after=None, **options):
    return make_patient(seed, lambda: make_mlp(lambda: nn.BatchNorm1d(16, eps=eps)), after, **options)


def set_var(value, channels=2):
    return lambda model: model[1].running_var[:channels].fill_(value)


def set_eps(value):
    return lambda model: setattr(model[1], "eps", value)


def undefined(patient):
    """How many outputs are not finite where a channel has no variance, in evaluation: in training versions differ."""
    model = copy.deepcopy(patient.model).eval()
    model[1].running_var[0] = 0.0
    with torch.no_grad():
        return float((~model(torch.ones(4, 8)).isfinite()).sum())


def freeze_without_eps(model):
    model[1].eps = 0.0
    anynorm.freeze(model)


def small():
    """Whose variance before the norm is about 1e-4."""
    return make_blobs(scale=0.01)


def uneven():
    """Of eight features four hold noise, and little of it."""
    x, y = make_blobs(1024)
    x[:, 4:] = 0.005 * torch.randn(len(x), 4)
    return x, y


def make_uneven():
    """Most channels see the noise alone; with the right eps they stay small."""
    model = make_mlp(lambda: nn.BatchNorm1d(16, eps=1e-3, momentum=0.3))
    with torch.no_grad():
        model[0].weight[:4, 4:] = 0
        model[0].weight[4:, :4] = 0
        model[0].weight[4:] *= 2
        model[3].weight *= 4
    model[0].requires_grad_(False)
    return model


def too_sure(seed):
    """Trained on few noisy samples for long, and looked at on others."""
    torch.manual_seed(seed)
    x, y = small()
    y = torch.where(torch.rand(len(y)) < 0.3, torch.randint(4, (len(y),)), y)
    patient = make_patient(seed, data=lambda: (x[:64], y[:64]), steps=200)
    patient.loader = list(zip(x[64:].split(32), y[64:].split(32), strict=True))
    return patient


def kill(model):
    """Two channels are the same for all samples."""
    model[0].weight[:2] = 0
    model[1].running_mean[:2] = 0
    model[1].running_var[:2] = 0


CASES = [
    Case(
        "averages-impossible",
        "1",
        lambda seed: make_patient(seed, after=set_var(float("nan"))),
        {
            "a channel that is constant": lambda seed: make_patient(seed, after=set_var(0.0)),
            "small variances": lambda seed: make_patient(seed, after=set_var(1e-12)),
            "denormal in float16 and no fault": lambda seed: Patient(
                make_patient(seed, after=set_var(3e-5)).model.half().eval()
            ),
        },
    ),
    Case(
        "eps-zero",
        "1",
        lambda seed: make_patient(seed, after=set_eps(0.0)),
        {
            "1e-12": lambda seed: with_eps(1e-12, seed),
            "None, as in torch's RMS norm": lambda seed: make_patient(seed, lambda: make_mlp(lambda: nn.RMSNorm(16))),
            "frozen, with variances above 0": lambda seed: make_patient(seed, after=freeze_without_eps),
        },
        harm=undefined,
    ),
    Case(
        "eps-of-another-framework",
        "1",
        lambda seed: make_patient(seed, make_uneven, set_eps(1e-5), data=uneven, size=64, steps=60),
        {
            "small variances, trained with torch's": lambda seed: with_eps(1e-5, seed, data=small),
            "trained with 1e-3, and left so": lambda seed: with_eps(1e-3, seed, data=small, steps=300),
            "too sure of itself on other data": too_sure,
        },
    ),
    Case(
        "channels-constant",
        "1",
        lambda seed: make_patient(seed, after=kill),
        {
            "small variances": lambda seed: make_patient(seed, after=set_var(1e-7)),
            "data of 0.001": lambda seed: make_patient(seed, data=lambda: make_blobs(scale=1e-3)),
            "not trained": lambda seed: Patient(zero_var(make_mlp())),
        },
        no_repair="pruning a channel changes the layers around it",
    ),
]


def zero_var(model):
    model[1].running_var.zero_()
    return model
