"""`anynorm try` finds by trying what a sample's output depends on."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from anynorm.apps.try_model.accuracy import compare_outputs
from anynorm.apps.try_model.sentences import describe_finding
from anynorm.doctor.call import Call
from anynorm.doctor.dependence import find_batch_dependence, find_padding_dependence

pytestmark = pytest.mark.usefixtures("one_thread")


def across(model, x):
    """Return (evaluation, training) findings about the other samples."""
    return find_batch_dependence(model, Call((x,)))


def padded(model, x):
    """Return (evaluation, training) findings about padding."""
    return find_padding_dependence(model, Call((x,)))


@pytest.mark.parametrize(
    ("norm", "evaluation", "training"),
    [
        (nn.BatchNorm2d(4), False, True),
        (nn.BatchNorm2d(4, track_running_stats=False), True, True),
        (nn.InstanceNorm2d(4), False, False),
        (nn.GroupNorm(2, 4), False, False),
        (nn.LayerNorm([4, 6, 6]), False, False),
    ],
)
def test_dependence_on_other_samples(norm, evaluation, training):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Dropout(0.5))
    findings = across(model, torch.randn(4, 3, 8, 8))
    assert [finding.depends for finding in findings] == [evaluation, training]
    for finding in findings:
        assert finding.only_norms == finding.depends
        assert finding.change == 0.0 or finding.change > 1e-3


def test_a_single_sample_is_given_company():
    findings = across(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(1, 3, 8, 8))
    assert [finding.depends for finding in findings] == [False, True]


def test_another_layer_that_joins_samples_is_named_as_such():
    class Centre(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    finding = across(nn.Sequential(Centre(), nn.LayerNorm(5)), torch.randn(4, 5))[1]
    assert finding.depends
    assert not finding.only_norms
    assert "another layer joins the samples" in " ".join(describe_finding(finding, "samples"))


@pytest.mark.parametrize(
    ("norm", "evaluation", "training"),
    [
        (nn.BatchNorm1d(4), False, True),
        (nn.InstanceNorm1d(4, affine=True), True, True),
        (nn.GroupNorm(2, 4), True, True),
        (nn.InstanceNorm1d(4, track_running_stats=True), False, True),
    ],
)
def test_padding_reaches_real_positions_through_norms(norm, evaluation, training):
    # A convolution of width 1 reads no neighbour, so that only the norm can carry the change.
    findings = padded(nn.Sequential(nn.Conv1d(3, 4, 1), norm, nn.Conv1d(4, 2, 1)), torch.randn(4, 3, 12))
    assert [finding.depends for finding in findings] == [evaluation, training]
    assert [finding.only_norms for finding in findings] == [evaluation, training]


def test_padding_reaches_real_positions_through_other_layers_too():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4))
    evaluation, training = padded(model, torch.randn(4, 3, 12))
    assert evaluation.depends
    assert evaluation.kinds == ()
    assert training.depends
    assert not training.only_norms
    assert "another layer does it too" in " ".join(describe_finding(training, "padding"))


def test_layer_norm_over_features_is_free_of_padding():
    for finding in padded(nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6)), torch.randn(4, 9, 5)):
        assert not finding.depends


def test_images_have_no_padding_to_test():
    assert padded(nn.BatchNorm2d(3), torch.randn(4, 3, 8, 8)) == []


def test_a_fixed_length_is_reported():
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm([9, 6]))
    assert [finding.change for finding in padded(model, torch.randn(4, 9, 5))] == [None, None]


def test_chance_is_not_taken_for_dependence():
    class FunctionalDropout(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training)

    evaluation, training = padded(nn.Sequential(nn.LayerNorm(5), FunctionalDropout()), torch.randn(4, 9, 5))
    assert not evaluation.depends
    assert training.change is None
    assert "another output each time" in training.note


def test_a_model_made_for_one_batch_size_can_be_tried():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            return self.norm(x.view(8, 5))

    assert [finding.depends for finding in across(Fixed(), torch.randn(8, 5))] == [False, True]


def test_a_model_that_refuses_float64_is_tested_in_float32():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)
            self.register_buffer("scale", torch.ones(5))

        def forward(self, x):
            return self.norm(x) @ torch.eye(5)

    assert [finding.depends for finding in across(Narrow(), torch.randn(8, 5))] == [False, True]
    assert compare_outputs(Narrow(), Narrow(), Call((torch.randn(8, 5),)), training=True).errors is None
