"""Why evaluation is worse: the cause is found, and those before it are ruled out."""

import copy
from functools import cache

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from doctor.healthy import load_digits, make_resnet
from doctor.patients import Patient, find_loss, make_blobs, make_mlp, make_patient, train

pytestmark = pytest.mark.usefixtures("one_thread")


def far():
    return make_blobs(scale=4, shift=1)


def with_momentum(momentum, **options):
    return lambda: make_patient(0, lambda: make_mlp(lambda: nn.BatchNorm1d(16, momentum=momentum)), **options)


def forget(model):
    model[1].reset_running_stats()


def shift(model):
    model[1].running_mean += 3 * model[1].running_var.sqrt()


@cache
def train_on_pure_batches():
    """Trained on images in batches of one class each: within a batch it tells classes by what its statistics leave."""
    torch.manual_seed(0)
    x, y = load_digits()
    pure = [part for each in range(4) for part in y.eq(each).nonzero()[:, 0][:128].split(32)]
    batches = [(x[part], y[part]) for part in pure]
    model = make_resnet((8, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(8):
        train(model, [batches[each] for each in torch.randperm(len(batches))], optimizer, F.cross_entropy, 16)
    return Patient(model, batches, optimizer)


def sorted_by_class():
    return copy.deepcopy(train_on_pure_batches())


def padded():
    """The averages are of sequences without padding, the batches of padded ones."""
    patient = make_patient(0, make_reader, data=make_sequences)
    lengths = torch.randint(1, 4, (512,))
    x = patient.loader.dataset.tensors[0]
    x *= (torch.arange(12) < lengths[:, None])[:, None]
    return patient


def make_sequences():
    x, y = make_blobs()
    return x[:, :, None] + torch.randn(len(x), 8, 12), y


def make_reader():
    layers = (nn.Conv1d(8, 16, 1, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(16, 4))


@pytest.mark.parametrize(
    ("make", "cause", "ruled_out"),
    [
        (lambda: make_patient(0, after=forget, data=far), "never updated", []),
        (with_momentum(0.99, after=shift), "momentum inverted", ["never updated"]),
        (with_momentum(0.01, data=far), "momentum too slow", ["never updated", "momentum inverted"]),
        (sorted_by_class, "batches of few classes", ["never updated", "momentum inverted", "momentum too slow"]),
        (lambda: make_patient(0, after=shift), "other data or other weights", ["padding", "batches too small"]),
        (padded, "padding", ["batches of few classes"]),
    ],
)
def test_the_cause_is_named(make, cause, ruled_out):
    patient = make()
    (finding,) = patient.diagnose("train-eval-gap").findings
    assert finding.evidence["cause"] == cause
    for each in ruled_out:
        assert each in finding.evidence["ruled_out"]
    assert finding.evidence["loss_of_all"] > 0


def test_the_layer_that_costs_most_is_named():
    def build():
        parts = (nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
        return nn.Sequential(*make_mlp()[:3], *parts)

    def harm(place):
        def after(model):
            model[place].running_mean += 3 * model[place].running_var.sqrt()

        return after

    for place in (1, 4):
        (finding,) = make_patient(0, build, harm(place)).diagnose("train-eval-gap").findings
        assert finding.layer == str(place)


def test_batches_of_one_class_need_other_weights_and_get_them():
    patient = sorted_by_class()
    before = find_loss(patient)
    (finding,) = patient.diagnose("train-eval-gap").findings
    finding.apply()
    assert find_loss(patient) < before / 2
