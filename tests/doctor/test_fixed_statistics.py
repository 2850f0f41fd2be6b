"""`anynorm try` on norms with code of their own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anynorm
from anynorm.apps.try_model.sentences import describe_finding
from anynorm.doctor.call import Call
from anynorm.doctor.dependence import find_batch_dependence, find_padding_dependence


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: torch's state, and an activation inside."""

    def forward(self, x):
        return F.leaky_relu(super().forward(x), 0.1)


class Functional(nn.BatchNorm2d):
    def forward(self, x):
        mean, var = (None, None) if self.training else (self.running_mean, self.running_var)
        return F.silu(F.batch_norm(x, mean, var, self.weight, self.bias, self.training))


class Stubborn(nn.BatchNorm2d):
    """Statistics that no running average replaces."""

    def forward(self, x):
        return x - x.mean((0, 2, 3), keepdim=True)


class Mixing(nn.Module):
    def forward(self, x):
        return x + x.mean(0, keepdim=True)


def find(norm, *more):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 1), *more).train()
    return find_batch_dependence(model, Call((torch.randn(4, 3, 8, 8),)))[1]


@pytest.mark.parametrize(
    "norm",
    [
        NormAct(8), Functional(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), anynorm.BatchNorm2d(8),
        nn.BatchNorm2d(8, track_running_stats=False), NormAct(8, momentum=None), anynorm.BatchNormAct2d(8),
    ],
    ids=lambda norm: type(norm).__name__,
)  # fmt: skip
def test_a_norms_own_code_is_no_other_layer(norm):
    finding = find(norm)
    assert finding.only_norms
    assert finding.kinds == (type(norm).__name__,)
    assert norm.training
    assert "another layer" not in " ".join(describe_finding(finding, "samples"))


@pytest.mark.parametrize("norm", [NormAct(8), nn.BatchNorm2d(8)], ids=lambda norm: type(norm).__name__)
def test_another_layer_is_still_found(norm):
    words = " ".join(describe_finding(find(norm, Mixing()), "samples"))
    assert "another layer does it too" in words


@pytest.mark.parametrize("norm", [Stubborn(8), anynorm.GhostBatchNorm2d(8, ghost_size=2)])
def test_what_cannot_be_held_is_not_laid_at_another_layers_door(norm):
    words = " ".join(describe_finding(find(norm), "samples"))
    assert f"cannot be told: {type(norm).__name__} has code of its own" in words
    assert "remain" not in words


class Own(nn.InstanceNorm1d):
    def forward(self, x):
        return super().forward(x).relu()


def test_the_same_holds_for_padding():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), Own(4, affine=True)).train()
    finding = find_padding_dependence(model, Call((torch.randn(4, 3, 9),)))[1]
    words = " ".join(describe_finding(finding, "padding"))
    assert "Own has code of its own" in words
    assert "another layer does it too:" not in words
