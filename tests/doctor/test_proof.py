"""A repair stays only where it is proved: what could go wrong with one, and what is left of it then."""

import copy

import pytest
import torch
import torch.nn as nn

import anynorm
from anynorm.doctor.check import Finding, Repair, find_checks
from anynorm.doctor.inputs import Inputs
from anynorm.doctor.proof import repair
from anynorm.surgery.operation import NotProved


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0.99), nn.ReLU(), nn.Linear(8, 3))
    return model, [(torch.randn(16, 4), torch.randint(0, 3, (16,))) for _ in range(4)]


def try_repair(perform, exact=False, targets=True):
    """A repair of the momentum that does something else, too."""
    model, batches = build()
    given = Inputs(model, batches if targets else [(x,) for x, _ in batches])

    def change():
        model[1].momentum = 0.01
        perform(model)

    check = find_checks()["momentum-inverted"]
    finding = Finding(check.id, check.title, "error", "1", "", repair=Repair("", change, is_exact=exact))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotProved) as raised:
        repair(given, finding)
    assert model[1].momentum == 0.99
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    return str(raised.value)


def test_one_that_breaks_the_model_is_refused():
    """Without outputs nothing else would tell."""
    said = try_repair(lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(5, 5))), targets=False)
    assert "the model must take the batches as before; it raises" in said


def test_outputs_that_become_nan_have_moved():
    said = try_repair(lambda model: model[1].running_var.fill_(-1.0), exact=True, targets=False)
    assert "they moved by inf" in said


def test_a_fallen_accuracy_is_refused():
    def turn(model):  # lower loss, wrong classes
        with torch.no_grad():
            model[3].weight.zero_()
            model[3].bias.copy_(torch.tensor([0.0, 0.0, 0.001]))

    model, batches = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    assert "accuracy" in try_trained(turn, model, batches, optimizer)


def try_trained(change, model, batches, optimizer):
    """The same for a model that is right and too sure of what it gets wrong."""
    for _ in range(60):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    with torch.no_grad():
        model[3].weight.mul_(50)
        model[3].bias.mul_(50)
    batches = [(x, torch.where(torch.rand(16) < 0.3, (y + 1) % 3, y)) for x, y in batches]

    def perform():
        model[1].momentum = 0.01
        change(model)

    check = find_checks()["momentum-inverted"]
    finding = Finding(check.id, check.title, "error", "1", "", repair=Repair("", perform))
    with pytest.raises(NotProved) as raised:
        repair(Inputs(model, batches), finding)
    return str(raised.value)


def test_a_frozen_norm_has_no_gap_between_the_modes():
    """It normalizes by its averages in both, however far those are from the data."""
    model, batches = build()
    model[1].momentum = 0.1
    model[1].running_mean.fill_(5.0)
    without = [(x,) for x, _ in batches]
    assert anynorm.diagnose(model, without, checks=["train-eval-gap"]).findings
    anynorm.freeze(model)
    assert not anynorm.diagnose(model, without, checks=["train-eval-gap"]).findings


class Branching(nn.Module):
    """Asks for its mode itself; its averages are right."""

    def __init__(self):
        super().__init__()
        self.inner = build()[0]
        self.inner[1].momentum = 0.1

    def forward(self, x):
        y = self.inner(x)
        return y if self.training else -5 * y


def test_a_forward_that_asks_for_the_mode_is_not_laid_on_the_averages():
    """No averages bring the loss back, and no training with these batches would."""
    model, batches = Branching(), build()[1]
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    for _ in range(40):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    (finding,) = anynorm.diagnose(model, batches, optimizer, checks=["train-eval-gap"]).findings
    assert finding.repair is None
    assert "something else than averages differs" in finding.message and "self.training" in finding.advice


def test_what_ours_would_lose_is_measured():
    model, batches = build()
    model[0].bias.data += 1e6
    (finding,) = anynorm.diagnose(model, batches, checks=["digits-lost"]).findings
    (effect,) = finding.effects
    assert effect.before == finding.evidence["error"] > 1e-3
    assert 0 < effect.after == finding.evidence["error_after"] < 1e-5


def test_readme_counts_the_checks():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"{len(find_checks())} checks name the" in text
