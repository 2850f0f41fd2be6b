"""What `accelerate` says: norms it does not know, norms it did not fuse, and a fused model that is still the user's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import anynorm
from anynorm.apps.zoo import resnet18
from anynorm.modules.fused import Fused
from anynorm.surgery.fuse import NO_ACTIVATION

# Norms that are none of torch's


class LlamaRMSNorm(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class T5LayerNorm(LlamaRMSNorm):
    pass


class FrozenBatchNorm2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))


class Normalize(nn.Module):
    """No parameters and no children."""


class PreNorm(nn.Module):
    """A container that holds a norm is none."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(4), nn.Parameter(torch.ones(4))


class NormBlock(nn.Sequential):
    """A container without a norm is none either."""


class Normal(nn.Module):
    """A distribution."""


def test_norms_that_are_not_known_are_named():
    model = nn.ModuleDict(
        {
            "llama": LlamaRMSNorm(), "t5": T5LayerNorm(), "frozen": FrozenBatchNorm2d(), "images": Normalize(),
            "pre": PreNorm(), "block": NormBlock(nn.Linear(4, 4), nn.ReLU()), "draw": Normal(),
            "weight": weight_norm(nn.Linear(4, 4)), "spectral": spectral_norm(nn.Linear(4, 4)),
            "any": anynorm.AnyNorm("n c -> n"), "response": nn.LocalResponseNorm(2),
        }
    )  # fmt: skip
    report = anynorm.accelerate(model)
    assert [entry.name for entry in report.changed] == ["pre.norm"]
    assert [entry.name for entry in report.left] == ["llama", "t5", "frozen", "images"]
    assert (
        "LlamaRMSNorm): no norm of torch.nn, and nothing is known of its class: anynorm.register(LlamaRMSNorm, ...)"
        in str(report)
    )
    assert anynorm.accelerate(model, undo=True).left == []


# Norms that were not fused


class Bend(nn.Module):
    def forward(self, x):
        return x + x.sin() ** 2


def test_every_norm_is_fused_or_named():
    model, _ = resnet18()
    report = anynorm.accelerate(model, fuse=True)
    told = {entry.name for entry in (*report.fused, *report.left)}
    assert told == {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert [entry.reason for entry in report.left] == [NO_ACTIVATION] * 3
    assert f"{report.left[0].name} and 2 more" in str(report)


def test_an_activation_of_ones_own_is_named():
    report = anynorm.accelerate(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), Bend()), fuse=True)
    (left,) = report.left
    assert (left.name, "Bend: only relu" in left.reason) == ("1", True)


# The fused model


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.silu(self.bn(self.conv(x)))


class Trained(nn.Module):
    """As a LightningModule: methods beside forward, state that is no tensor, a class attribute."""

    kind = "trained"

    def __init__(self):
        super().__init__()
        self.trunk, self.norm, self.head = Trunk(), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.rate = 0.5

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.trunk(x))).mean((2, 3)))

    def training_step(self, batch):
        return self(batch).square().mean() * self.rate

    def predict(self, x):
        return self.forward(x).argmax(1)

    def first_features(self, x):
        return self.norm(self.trunk(x))

    def trunk_features(self, x):
        return self.trunk(x)

    @property
    def outputs(self):
        return self.head.out_features

    @staticmethod
    def double(x):
        return 2 * x


class Grown(Trained):
    def classes(self, x):
        return super().forward(x).softmax(1)


@pytest.fixture
def made():
    torch.manual_seed(0)
    model = Grown()
    before = copy.deepcopy(model)
    return before, anynorm.accelerate(model, fuse=True).model


def test_the_fused_model_keeps_class_methods_and_attributes(made):
    before, fast = made
    x = torch.randn(4, 3, 8, 8)
    assert isinstance(fast, Grown)
    assert sum(isinstance(module, Fused) for module in fast.modules()) == 2
    assert (type(fast).__name__, fast.kind, fast.rate, fast.outputs, fast.double(2)) == ("Grown", "trained", 0.5, 2, 4)
    torch.testing.assert_close(fast.training_step(x), before.training_step(x))
    assert torch.equal(fast.eval().predict(x), before.eval().predict(x))


def test_what_would_apply_an_activation_twice_raises(made):
    """Silu of silu is another number, and nobody would notice."""
    before, fast = made
    x = torch.randn(4, 3, 8, 8)
    for call, name in ((fast.first_features, "norm"), (fast.classes, "forward")):
        with pytest.raises(RuntimeError, match=f"uses {name} by itself.*given to accelerate"):
            call(x)
    for call in (fast.trunk_features, fast.trunk):
        with pytest.raises(RuntimeError, match="trunk was called by itself"):
            call(x)
    before.first_features(x)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_the_same_model(way, made):
    before, fast = made
    twin, x = way(fast), torch.randn(4, 3, 8, 8)
    assert isinstance(twin, Grown)
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in before.named_parameters()]
    torch.testing.assert_close(twin.training_step(x), before.training_step(x))
    with pytest.raises(RuntimeError, match="by itself"):
        twin.first_features(x)
    again = anynorm.accelerate(twin, fuse=True)
    assert (again.changed, again.fused, again.model) == ([], [], twin)
