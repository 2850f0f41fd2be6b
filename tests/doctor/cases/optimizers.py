"""What the optimizer does to gamma and beta, and how its steps compare with the batches that norms counted."""

import torch
import torch.nn as nn
import torch.nn.functional as F

import anynorm
from doctor.patients import Case, Patient, load, make_blobs, make_mlp, make_patient


def decayed(weight_decay, choose=None, after=None):
    def make(seed):
        patient = make_patient(seed, after=after)
        groups = patient.model.parameters() if choose is None else choose(patient.model)
        patient.optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=weight_decay)
        return patient

    return make


def find_decay(patient):
    norm = {id(p) for p in patient.model[1].parameters()}
    return sum(g["weight_decay"] for g in patient.optimizer.param_groups if norm & {id(p) for p in g["params"]})


def count_missing(patient):
    held = {id(p) for group in patient.optimizer.param_groups for p in group["params"]}
    return sum(id(p) not in held for p in patient.model.parameters())


def without_norms(model):
    return [*model[0].parameters(), *model[3].parameters()]


def fix_affine(model):
    model[1].requires_grad_(False)


def accumulated(micro, steps=50, before=0):
    """Trained by Adam, whose state counts steps, with so many batches for each."""

    def make(seed):
        torch.manual_seed(seed)
        model, loader = make_mlp(), load(*make_blobs(256))
        model[1].num_batches_tracked += before
        optimizer, batches = torch.optim.Adam(model.parameters(), 1e-2), list(loader)
        for step in range(steps):
            optimizer.zero_grad()
            for each in range(micro):
                x, y = batches[(step * micro + each) % len(batches)]
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return Patient(model, loader, optimizer)

    return make


CASES = [
    Case(
        "norms-decayed",
        "1",
        decayed(0.01),
        {
            "groups of anynorm.param_groups": decayed(0.01, lambda model: anynorm.param_groups(model, 0.01)),
            "no decay": decayed(0.0),
            "frozen gamma and beta": decayed(0.01, after=fix_affine),
        },
        harm=find_decay,
        template="the decay and the learning rate are the user's",
        names={"weight_decay": 0.01, "lr": 0.1},
    ),
    Case(
        "norms-not-optimized",
        "1",
        decayed(0.0, without_norms),
        {
            "only the head is trained": decayed(0.0, lambda model: model[3].parameters()),
            "frozen gamma and beta": decayed(0.0, without_norms, fix_affine),
            "the optimizer of another model": decayed(0.0, lambda model: nn.Linear(2, 2).parameters()),
            "all are there": decayed(0.0),
        },
        harm=count_missing,
    ),
    Case(
        "batches-counted-more-than-once",
        "1",
        accumulated(4),
        {
            "a counter of 123,456 from a checkpoint": accumulated(1, before=123_456),
            "a counter of 1,983 from a checkpoint": accumulated(1, before=1983),
            "one batch for each step": accumulated(1),
            "few steps": accumulated(2, steps=5),
        },
        no_repair="the loop of the training is the user's",
    ),
]
