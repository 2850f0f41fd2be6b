"""`anynorm.sync`: what it changes in a model, and back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn

import anynorm

PLAIN = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.3), nn.ReLU(), nn.Conv2d(8, 8, 1))
    model.append(nn.BatchNorm2d(8, momentum=None)).append(nn.SiLU()).append(nn.Flatten()).append(nn.BatchNorm1d(128))
    model(torch.randn(4, 3, 6, 6))
    return model


@pytest.mark.parametrize("library", [nn, anynorm], ids=["torch", "anynorm"])
@pytest.mark.parametrize("kind", PLAIN)
def test_every_exact_type_and_back(library, kind):
    """pytorch#41081: no way back from torch's."""
    module = getattr(library, kind)(4)
    report = anynorm.sync(module)
    assert type(module) is anynorm.SyncBatchNorm
    assert report.changed[0].became == "anynorm.SyncBatchNorm"
    assert anynorm.sync(module).changed == []
    anynorm.sync(module, undo=True)
    assert type(module) is getattr(library, kind)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_a_fused_activation_stays(dimension):
    """pytorch#187298, timm#1254: torch's conversion dropped it."""
    kind = f"BatchNormAct{dimension}d"
    module = getattr(anynorm, kind)(4, activation="silu")
    x = torch.randn(3, 4, *[5] * (dimension if dimension > 1 else 0))
    expected = copy.deepcopy(module)(x)
    anynorm.sync(module)
    assert type(module) is anynorm.SyncBatchNormAct and module.activation == "silu"
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
    anynorm.sync(module, undo=True)
    assert type(module) is getattr(anynorm, kind)


def test_nothing_is_lost_on_the_way():
    """timm's way back loses momentum and num_batches_tracked; here every object and attribute is as before."""
    model = make_model()
    model[1].register_forward_hook(lambda *_: None)
    model[1].eval()
    ids = [id(t) for t in (*model.modules(), *model.parameters(), *model.buffers())]
    attributes = [set(vars(module)) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    anynorm.sync(model)
    assert list(model.state_dict()) == list(state)
    assert [model[i].momentum for i in (1, 4)] == [0.3, None]
    assert [int(model[i].num_batches_tracked) for i in (1, 4)] == [1, 1]
    anynorm.sync(model, undo=True)
    assert [id(t) for t in (*model.modules(), *model.parameters(), *model.buffers())] == ids
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not model[1].training and len(model[1]._forward_hooks) == 1


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_is_batch_norm(training):
    model = make_model().train(training)
    anynorm.accelerate(model)
    twin, x = copy.deepcopy(model), torch.randn(4, 3, 6, 6)
    anynorm.sync(twin)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_accelerate_and_sync_in_any_order():
    model, x = make_model().eval(), torch.randn(2, 3, 6, 6)
    expected = model(x)
    anynorm.accelerate(model, fuse=True)
    assert len(anynorm.sync(model).changed) == 3
    report = anynorm.accelerate(model, undo=True)
    assert {entry.reason.split(": ")[1] for entry in report.left} == {"anynorm.sync(model, undo=True) comes first"}
    assert type(model[1]) is anynorm.SyncBatchNormAct
    torch.testing.assert_close(model(x), expected)
    anynorm.sync(model, undo=True)
    anynorm.accelerate(model, undo=True)
    assert [type(model[i]) for i in (1, 2, 4, 5, 7)] == [
        nn.BatchNorm2d,
        nn.ReLU,
        nn.BatchNorm2d,
        nn.SiLU,
        nn.BatchNorm1d,
    ]
    torch.testing.assert_close(model(x), expected)


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def test_what_is_left_and_why():
    model = nn.ModuleDict({"own": Own(4), "lazy": nn.LazyBatchNorm2d(), "built": anynorm.SyncBatchNorm(4)})
    model["patched"] = nn.BatchNorm2d(4)
    model["patched"].forward = lambda x: x
    reasons = {entry.name: entry.reason for entry in anynorm.sync(model).left}
    assert "a subclass may have code of its own" in reasons["own"]
    assert "run one batch first" in reasons["lazy"]
    assert "forward was replaced" in reasons["patched"]
    (left,) = anynorm.sync(model, undo=True).left
    assert left.name == "built" and "nobody knows the dimension" in left.reason
    with pytest.raises(TypeError, match=r"sync: model must be a torch.nn.Module; got list"):
        anynorm.sync([])


def test_another_process_group_for_norms_that_are_synchronized():
    model, group = make_model(), object()
    anynorm.sync(model)
    assert len(anynorm.sync(model, process_group=group).changed) == 3
    assert model[1].process_group is group
    assert anynorm.sync(model, process_group=group).changed == []
    anynorm.sync(model, undo=True)
    assert type(model[1]) is nn.BatchNorm2d


def test_copies_and_files():
    model = make_model()
    anynorm.sync(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        anynorm.sync(twin, undo=True)
        assert [type(m) for m in twin.modules()] == [type(m) for m in make_model().modules()]


def test_checkpoints_go_both_ways():
    theirs, ours = nn.BatchNorm2d(4), anynorm.SyncBatchNorm(4)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    nn.SyncBatchNorm(4).load_state_dict(anynorm.SyncBatchNormAct(4).state_dict())


def test_names_stand_in_errors():
    model = make_model()
    anynorm.sync(model)
    with pytest.raises(ValueError, match=r"^7 = SyncBatchNorm\(128") as error:
        model[7](torch.randn(1, 128))
    assert "more than 1 value" in str(error.value)


def test_frozen_norms_stay_frozen_on_the_way_back_and_ranks_do_not_part():
    model = nn.Sequential(nn.BatchNorm1d(3))
    anynorm.sync(model)
    anynorm.freeze(model)
    (left,) = anynorm.sync(model, undo=True).left
    assert left.reason == "it is frozen: anynorm.unfreeze(model) comes first"
    assert not model.train()[0].training
    anynorm.unfreeze(model)
    assert len(anynorm.sync(model, undo=True).changed) == 1
    assert type(model[0]) is nn.BatchNorm1d
    anynorm.freeze(model, updates=False)
    (left,) = anynorm.sync(model).left
    assert "follows the batches of its own rank; freeze its updates too" in left.reason


class Subclass(nn.BatchNorm1d):
    pass


def test_an_adapted_norm_is_pickled_and_finds_its_class_again():
    model = nn.Sequential(Subclass(3))
    anynorm.accelerate(model)
    adapted = type(model[0])
    anynorm.sync(model)
    back = pickle.loads(pickle.dumps(model))
    for each in (model, back):
        assert len(anynorm.sync(each, undo=True).changed) == 1
        assert type(each[0]) is adapted
