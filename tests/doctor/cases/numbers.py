"""Numbers that arithmetic cannot hold."""

import copy

import torch.nn as nn

import anynorm
from doctor.cases.batches import make_masked
from doctor.patients import Case, Patient, make_blobs, make_mlp, make_patient


def with_values(change, **options):
    """Data that are changed after the training."""

    def make(seed):
        patient = make_patient(seed, **options)
        patient.loader = [(change(x.clone(), place), y) for place, (x, y) in enumerate(patient.loader)]
        return patient

    return make


def spoil(x, place):
    if place == 2:
        x[3, 1] = float("nan")
    return x


def masked_nan(seed):
    """NaN at padding, which a mask leaves out."""
    patient = make_masked(seed)
    call = patient.forward_fn

    def spoiled(model, batch):
        def hook(norm, given):
            return (given[0].masked_fill(~batch[0].ne(0).any(1, keepdim=True), float("nan")),)

        handle = model.norm.register_forward_pre_hook(hook, prepend=True)
        try:
            return call(model, batch)
        finally:
            handle.remove()

    patient.forward_fn = spoiled
    return patient


def scale(factor):
    def after(model):
        model[0].weight.mul_(factor)
        model[1].running_mean.mul_(factor)
        model[1].running_var.mul_(factor**2)

    return after


def find_largest(patient):
    x, _ = next(iter(patient.loader))
    return float(copy.deepcopy(patient.model)[0](x).abs().max())


def in_bfloat16(seed):
    patient = make_patient(seed, after=scale(1e5))
    loader = [(x.bfloat16(), y) for x, y in patient.loader]
    return Patient(patient.model.bfloat16(), loader, loss_fn=None)


def make_first(norm):
    """The norm before all else, at 0."""
    return lambda: nn.Sequential(norm(8), nn.Linear(8, 4))


def off(shift, norm=nn.BatchNorm1d):
    return lambda seed: make_patient(seed, make_first(norm), data=lambda: make_blobs(shift=shift), steps=100)


def find_error(patient):
    """Of the norm in training, against float64."""
    x, _ = next(iter(patient.loader))
    norm = copy.deepcopy(patient.model[0]).train()
    exact = nn.functional.batch_norm(x.double(), None, None, norm.weight.double(), norm.bias.double(), True)
    return float((norm(x) - exact).abs().max())


def set_beta(value, channels=5):
    return lambda model: model[1].bias[:channels].fill_(value)


def few_samples(seed):
    patient = make_patient(seed, after=set_beta(-1.5))
    x, y = make_blobs(16)
    patient.loader = [(x[:8], y[:8]), (x[8:], y[8:])]
    return patient


class Branch(nn.Module):
    """A norm whose ReLU stands behind an addition."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head((self.norm(self.layer(x)) + x).relu())


CASES = [
    Case(
        "input-not-finite",
        "1",
        with_values(spoil),
        {
            "large and finite": with_values(lambda x, place: 1e30 * x),
            "NaN at padding, which a mask leaves out": masked_nan,
            "usual": make_patient,
        },
        no_repair="only the user knows where NaN comes from",
    ),
    Case(
        "overflow-in-half",
        "1",
        lambda seed: make_patient(seed, after=scale(1e5)),
        {
            "up to 10,000": lambda seed: make_patient(seed, after=scale(1e3)),
            "bfloat16, which holds more": in_bfloat16,
            "usual": make_patient,
        },
        harm=find_largest,
    ),
    Case(
        "digits-lost",
        "0",
        off(1e6),
        {
            "a mean of 1,000, where torch loses little": off(1e3),
            "ours": off(1e6, anynorm.BatchNorm1d),
            "layer norm": off(1e4, nn.LayerNorm),
        },
        harm=find_error,
    ),
    Case(
        "channels-dead",
        "1",
        lambda seed: make_patient(seed, after=set_beta(-30)),
        {
            "a leaky ReLU": lambda seed: make_patient(
                seed, lambda: nn.Sequential(*make_mlp()[:2], nn.LeakyReLU(), nn.Linear(16, 4)), set_beta(-30)
            ),
            "few samples": few_samples,
            "the ReLU behind an addition": lambda seed: make_patient(
                seed, Branch, lambda model: model.norm.bias.fill_(-30)
            ),
        },
        no_repair="pruning a channel changes the layers around it",
    ),
]
