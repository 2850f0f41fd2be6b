"""adapt by TENT: a step is the paper's, and all else stays."""

import copy

import pytest
import torch
import torch.nn as nn

import anynorm
from surgery.recalibration_cases import draw

pytestmark = pytest.mark.filterwarnings("ignore:adapt. a batch")


def make_classifier(room=nn) -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(5, 8), room.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), room.BatchNorm1d(8), nn.Linear(8, 4)
    )
    return net.double().eval()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def take_steps_by_hand(model: nn.Sequential, batches) -> list[torch.Tensor]:
    """As the paper's own code configures a model: batch norms in training mode without averages, all else frozen."""
    model.requires_grad_(False)
    moving = []
    for norm in (model[1], model[4]):
        norm.train()
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
        moving += [norm.weight.requires_grad_(True), norm.bias.requires_grad_(True)]
    optimizer, outputs = sgd(moving), []
    for x in batches:
        logits = model(x)
        probabilities = logits.softmax(1)
        loss = -(probabilities * probabilities.log()).sum(1).mean(0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        outputs.append(logits.detach())
    return outputs


@pytest.mark.parametrize("room", [nn, anynorm], ids=["torch", "ours"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_equals_the_papers_code(room, mode):
    """In float64, outputs and gammas of five steps."""
    model, batches = make_classifier(room), [draw(20, 5, seed=seed, mean=1, dtype=torch.float64) for seed in range(5)]
    twin = make_classifier()
    true = take_steps_by_hand(twin, batches)
    tent = anynorm.adapt(model, "tent", optimizer=sgd)
    with mode():
        found = [tent(x) for x in batches]
    for y, wanted in zip(found, true, strict=True):
        assert not y.requires_grad
        torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    for index in (1, 4):
        torch.testing.assert_close(
            model[index].weight, twin[index].weight.detach(), rtol=1e-10, atol=1e-10, check_dtype=True
        )
    assert type(model[1]) is room.BatchNorm1d


def test_all_but_gamma_and_beta_stays_and_reset_gives_those_back():
    model, x = make_classifier(), draw(20, 5, dtype=torch.float64)
    model[1].weight.requires_grad_(False)  # frozen, and moved all the same
    model[4].bias.grad = torch.full((8,), 3.0, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    tent = anynorm.adapt(model, "tent", optimizer=sgd)
    first = tent(x)
    second = tent(x)
    assert not torch.equal(first, second)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert [p.requires_grad for p in model[1].parameters()] == [False, True]
    assert torch.equal(model[4].bias.grad, torch.full((8,), 3.0, dtype=torch.float64))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "4.bias")
    assert not model.training and not model._forward_hooks
    tent.reset()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # A new optimizer: the momentum of the old one would make the second step another.
    assert torch.equal(tent(x), first)
    assert torch.equal(tent(x), second)


def test_predictions_become_surer():
    """Invariant: on the same batch the entropy falls at every step; Adam is what None stands for."""
    model, x = make_classifier(), draw(200, 5, dtype=torch.float64)
    tent, entropies = anynorm.adapt(model, "tent"), []
    for _ in range(5):
        p = tent(x).softmax(1)
        entropies.append(float(-(p * p.log()).sum(1).mean()))
    assert entropies == sorted(entropies, reverse=True)
    assert isinstance(tent.optimizer, torch.optim.Adam)


def test_named_logits_and_maps_of_classes():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, image: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
            return {"logits": self.norm(image) * scale}

    model = Named().eval()
    y = anynorm.adapt(model, "tent", optimizer=sgd)(image=draw(4, 3, 5, 5), scale=2.0)
    assert y["logits"].shape == (4, 3, 5, 5)
    assert not torch.equal(model.norm.weight, torch.ones(3))


def test_what_cannot_be_a_step():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Flatten(0)).eval()
    with pytest.raises(anynorm.UserError, match="tent needs logits"):
        anynorm.adapt(model, "tent")(draw(20, 3))
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    with pytest.warns(UserWarning, match="takes no step on a batch whose predictions are NaN"):
        anynorm.adapt(model, "tent")(torch.full((20, 3), torch.nan))
    assert torch.equal(model[0].weight, torch.ones(3))
    assert type(model[0]) is nn.BatchNorm1d
