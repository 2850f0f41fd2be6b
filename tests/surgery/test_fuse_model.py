"""The model that `accelerate(model, fuse=True)` returns: the user's class, on the same parameters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import anynorm
from anynorm.apps.zoo import ZOO
from anynorm.surgery import accelerate as surgery
from anynorm.surgery import fuse, graph_model, trace
from surgery.fuse_cases import SPELLINGS, Net, assert_same_steps, branch, draw, find_fused, find_left, shake, step


def test_sequentials_are_fused_where_there_is_no_graph():
    model = Net(branch, body=nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()))
    report = anynorm.accelerate(model, fuse=True)
    assert [(entry.name, entry.where) for entry in report.fused] == [("body.0", "model")]
    assert type(model.body[1]) is nn.Identity
    assert report.model is model


def test_undo_of_a_graph_trusts_no_identity_that_the_graph_does_not_call():
    body = nn.Sequential(nn.BatchNorm1d(6), nn.Identity())
    model = Net(lambda n, x: F.relu(n.body[0](x)), body=body).double()
    new, x = anynorm.accelerate(model, fuse=True).model, draw(5, 6, 4).double()
    before = new(x)
    assert [entry.name for entry in anynorm.accelerate(new, undo=True).left] == ["body.0"]
    assert torch.equal(new(x), before)


def test_parameters_buffers_attributes_and_order_are_the_models():
    model = Net(SPELLINGS["two norms"], unused=nn.Linear(2, 2))
    model.note = {"a": 1}
    order = [name for name, _ in model.named_parameters()]
    report = anynorm.accelerate(model, fuse=True)
    new = report.model
    assert type(new).__name__ == "Net"
    assert [name for name, _ in new.named_parameters()] == order
    for ours, theirs in ((new.parameters(), model.parameters()), (new.buffers(), model.buffers())):
        assert [id(t) for t in ours] == [id(t) for t in theirs]
    assert new.note == {"a": 1}
    assert all(new.get_submodule(name) is not module for name, module in model.named_modules())
    new.eval()
    assert model.training
    assert model.norm.training
    assert not new.norm.training


def test_an_optimizer_made_before_goes_on():
    model = Net(SPELLINGS["operator"])
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    new = anynorm.accelerate(model, fuse=True).model
    for seed in range(3):
        for network, optimizer in zip((new, twin), optimizers, strict=True):
            optimizer.zero_grad()
            network(draw(5, 6, 4, seed=seed)).square().sum().backward()
            optimizer.step()
    for found, expected in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_new_model_can_be_copied_pickled_compiled_and_accelerated_again():
    model = anynorm.apps.zoo.ResidualBlock(3, 6, 2).double()
    before, x = copy.deepcopy(shake(model)), draw(2, 3, 8, 8).double()
    new = anynorm.accelerate(model, fuse=True).model
    for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert list(twin.state_dict()) == list(before.state_dict())
        assert_same_steps(twin, copy.deepcopy(before), x)
    again = anynorm.accelerate(new, fuse=True)
    assert (again.changed, again.fused, find_left(again), again.model) == ([], [], [], new)
    torch.compiler.reset()
    compiled = torch.compile(new, fullgraph=True)
    torch.testing.assert_close(compiled(x), copy.deepcopy(before)(x), rtol=1e-6, atol=1e-6)
    undone = anynorm.accelerate(new, undo=True)
    assert [entry.name for entry in undone.left] == ["bn1", "bn2"]
    torch.testing.assert_close(new(x), before(x), rtol=1e-6, atol=1e-6)


def test_nothing_is_changed_where_anything_raises(monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("no")

    model = Net(SPELLINGS["operator"], body=nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()))
    kinds = [type(module) for module in model.modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    for module, name in (
        (fuse, "fuse_chain"),
        (graph_model, "apply_graph"),
        (graph_model, "copy_sharing"),
        (surgery, "plan_fusion"),
        (surgery, "report_fused"),
        (trace, "save_randomness"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, refuse)
            with pytest.raises(RuntimeError, match="no"):
                anynorm.accelerate(model, fuse=True)
        assert [type(module) for module in model.modules()] == kinds
        assert [dict(vars(module)) for module in model.modules()] == attributes
    assert len(anynorm.accelerate(model, fuse=True).fused) == 2


class Stubborn(nn.Module):
    def __deepcopy__(self, memo):
        raise TypeError("one only")


class Independent(nn.Linear):
    def __deepcopy__(self, memo):
        return type(self)(self.in_features, self.out_features)


@pytest.mark.parametrize(("part", "reason"), [(Stubborn(), "one only"), (Independent(4, 4), "does not share")])
def test_a_model_that_cannot_be_copied_is_named(part, reason):
    model = Net(SPELLINGS["operator"], part=part)
    report = anynorm.accelerate(model, fuse=True)
    assert report.model is model
    assert reason in find_left(report)[0].reason


# Whole networks


COUNTS = {
    "resnet18": (17, 0),
    "mlp": (3, 3),
    "unet": (10, 10),
    "mobilenetv2": (35, 35),
    "transformer": (0, 0),
    "transformer-rms": (0, 0),
    "lstm": (0, 0),
}


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    torch.manual_seed(0)
    model, x = ZOO[name]()
    x = x[:2, :, :32, :32] if x.dim() == 4 else x[:4, :16] if x.dim() == 3 else x[:4]
    model.double()
    x = x.double() if x.is_floating_point() else x
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if "Norm" in type(module).__name__ and module.weight is not None:  # gammas of both signs, of size one
            with torch.no_grad():
                module.weight[torch.rand(module.weight.shape) < 0.3] *= -1
    with torch.no_grad():
        model(x)  # running statistics that are not those of the start
    fused, inside = COUNTS[name]
    before = copy.deepcopy(model)
    report = anynorm.accelerate(model, fuse=True)
    assert (len(find_fused(report.model)), len(find_fused(model))) == (fused, inside)
    assert list(report.model.state_dict()) == list(before.state_dict())
    for training in (False, True):
        found, expected = step(report.model, x, training, 1e-3), step(before, x, training, 1e-3)
        for key, want in expected.items():
            if want is not None:
                error = float((found[key] - want).abs().max()) / max(1.0, float(want.abs().max()))
                assert error < 1e-8, key
    reasons = {entry.reason for entry in find_left(report)}
    assert reasons == set()
    if name == "resnet18":
        thens = [entry.then for entry in report.fused]
        assert (thens.count("relu"), thens.count("add, relu")) == (9, 8)
