"""`accelerate(model, fuse=True)` in Sequentials: the same outputs, gradients, buffers and steps, and the way back.

What cannot be fused without changing what somebody sees is left, and named with its reason.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn as nn

import anynorm
from surgery.fuse_cases import (
    NORMS,
    ONLY,
    SHARED,
    SHARED_NORM,
    assert_same_steps,
    check,
    draw,
    find_fused,
    find_left,
    hook,
    patch,
    shake,
)

MODULES = {
    "relu": lambda: nn.ReLU(),
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.01),
    "silu": lambda: nn.SiLU(),
    "gelu": lambda: nn.GELU("none"),
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "relu6 in place": lambda: nn.ReLU6(inplace=True),
    "hardswish": lambda: nn.Hardswish(),
    "elu": lambda: nn.ELU(),
    "elu(0.5)": lambda: nn.ELU(0.5),
    "leaky_relu(0.2) in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "tanh": lambda: nn.Tanh(),
    "sigmoid": lambda: nn.Sigmoid(),
    "mish": lambda: nn.Mish(),
}


def make_sequential(kind: str, activation: str) -> tuple[nn.Sequential, torch.Tensor]:
    norm, arguments, shape = NORMS[kind]
    model = nn.Sequential(
        nn.Identity(), norm(*arguments), MODULES[activation](), nn.Sequential(norm(*arguments), nn.Softplus())
    )
    return shake(model), draw(*shape)


@pytest.mark.parametrize("activation", MODULES)
@pytest.mark.parametrize("kind", NORMS)
def test_sequential_is_fused_in_place(kind, activation):
    model, x = make_sequential(kind, activation)
    report = check(model, x, fused=1, inside=1)
    assert type(model[1]) is getattr(anynorm, kind.replace("Norm", "NormAct"))
    assert model[1].activation == activation.split()[0]
    assert type(model[2]) is nn.Identity
    (entry,) = report.fused
    assert (entry.name, entry.then, entry.where) == ("1", activation.split()[0], "model")
    assert {entry.name: entry.became for entry in report.changed} == {
        "1": f"anynorm.{type(model[1]).__name__}",
        "3.0": f"anynorm.{kind}",
    }
    (left,) = find_left(report)
    assert left.name == "3.0"
    assert left.reason == f"not fused with torch.nn.Softplus: {ONLY}"


def test_same_objects_and_undo_gives_them_back():
    model, _ = make_sequential("BatchNorm2d", "relu in place")
    model[2].eval()
    objects = {name: (id(module), type(module)) for name, module in model.named_modules()}
    tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
    norm, attributes = model[1], set(vars(model[1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    anynorm.accelerate(model, fuse=True)
    assert model[1] is norm
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == tensors
    assert not model[2].training
    model(draw(3, 6, 4, 4)).sum().backward()
    optimizer.step()
    again = anynorm.accelerate(model, fuse=True)
    assert (again.changed, again.fused, again.model) == ([], [], model)
    report = anynorm.accelerate(model, undo=True)
    assert [(entry.kind, entry.became) for entry in report.changed] == [
        ("anynorm.BatchNorm2d", "torch.nn.BatchNorm2d"),
        ("anynorm.BatchNormAct2d", "torch.nn.BatchNorm2d"),
    ]
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == objects
    assert set(vars(norm)) == attributes
    assert find_left(report) == []


@pytest.mark.parametrize("activation", MODULES)
@pytest.mark.parametrize("kind", NORMS)
def test_undo_computes_the_same(kind, activation):
    model, x = make_sequential(kind, activation)
    before = copy.deepcopy(model)
    anynorm.accelerate(model, fuse=True)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # the way back survives both
    anynorm.accelerate(twin, undo=True)
    assert [type(module) for module in twin.modules()] == [type(module) for module in before.modules()]
    assert repr(twin) == repr(before)
    assert_same_steps(twin, before, x, 1e-7)


def test_undo_of_a_network_written_with_fused_norms():
    model = nn.Sequential(anynorm.BatchNormAct1d(4, activation="silu"), nn.Identity(), anynorm.LayerNormAct(4))
    model[2].load_state_dict(nn.LayerNorm(4).state_dict())
    report = anynorm.accelerate(model, undo=True)
    assert [type(module) for module in model] == [nn.BatchNorm1d, nn.SiLU, anynorm.LayerNormAct]
    (left,) = find_left(report)
    assert (left.name, left.kind) == ("2", "anynorm.LayerNormAct")
    assert "where torch.nn.Identity stands behind it" in left.reason


def test_both_ways_at_once_is_refused():
    with pytest.raises(ValueError, match="accelerate: undo and fuse exclude each other; got both; call it twice"):
        anynorm.accelerate(nn.Sequential(), undo=True, fuse=True)


class Tuned(nn.ReLU):
    """A ReLU with code of its own."""


class Steep(nn.ELU):
    """An ELU with code of its own."""


class Caller(nn.Module):
    """Runs a Sequential; keeps a module beside it under a second name."""

    def __init__(self, body, other=None, cut=None):
        super().__init__()
        self.body, self.other, self.cut = body, other, cut

    def forward(self, x):
        if self.cut is None:
            return self.body(x)
        middle = self.body[: self.cut](x)
        return self.body[self.cut :](middle) + middle


def pair(norm=None, activation=None) -> nn.Sequential:
    return nn.Sequential(norm or nn.BatchNorm1d(6), activation or nn.ReLU())


LEFT = {
    "forward hook on the norm": (lambda: pair(hook(nn.BatchNorm1d(6), "forward_hook")), "0 has hooks"),
    "forward pre-hook on the norm": (lambda: pair(hook(nn.BatchNorm1d(6), "forward_pre_hook")), "0 has hooks"),
    "backward hook on the norm": (lambda: pair(hook(nn.BatchNorm1d(6), "full_backward_hook")), "0 has hooks"),
    "backward pre-hook on the norm": (lambda: pair(hook(nn.BatchNorm1d(6), "full_backward_pre_hook")), "0 has hooks"),
    "hook on the activation": (lambda: pair(None, hook(nn.ReLU(), "forward_hook")), "1 has hooks"),
    "parametrization": (
        lambda: pair(nn.utils.parametrize.register_parametrization(nn.BatchNorm1d(6), "weight", nn.Tanh())),
        "a subclass of torch.nn.BatchNorm1d may have code of its own",
    ),
    "replaced forward of the norm": (lambda: pair(patch(nn.BatchNorm1d(6))), "its forward was replaced on the object"),
    "replaced forward of the activation": (lambda: pair(None, patch(nn.ReLU())), "the forward of 1 was replaced"),
    "shared activation": (lambda: nn.Sequential(pair(None, SHARED), SHARED), "0.1 is shared, it has 2 places"),
    "shared norm": (lambda: nn.Sequential(pair(SHARED_NORM), SHARED_NORM), "0.0 is shared, it has 2 places"),
    "norm under a second name": (lambda: Caller(pair(SHARED_NORM), other=SHARED_NORM), "body.0 is shared"),
    "a tensor as slope": (
        lambda: pair(None, nn.LeakyReLU(torch.tensor(0.25))),
        "torch.nn.LeakyReLU: leaky_relu is fused with a plain number as negative_slope, this has tensor(0.25",
    ),
    "hardtanh": (lambda: pair(None, nn.Hardtanh()), f"torch.nn.Hardtanh: {ONLY}"),
    "hardtanh to 6": (lambda: pair(None, nn.Hardtanh(-1.0, 6.0)), f"torch.nn.Hardtanh: {ONLY}"),
    "a subclass of ELU": (lambda: pair(None, hook(Steep(), "forward_hook")), "a subclass of torch.nn.ELU may have"),
    "a subclass": (lambda: pair(None, hook(Tuned(), "forward_hook")), "a subclass of torch.nn.ReLU may have code"),
    "a Sequential that is cut": (lambda: Caller(pair(), cut=1), "the norm's output is used elsewhere too"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_in_sequentials_and_why(name):
    make, reason = LEFT[name]
    model = make()
    report = check(model, draw(5, 6, 4), fused=0)
    assert [entry for entry in find_left(report) if reason in entry.reason], str(report)
    assert len(find_left(report)) == 1
    assert reason in str(report)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weight_norm_is_left():
    model = pair(nn.utils.weight_norm(nn.BatchNorm1d(6), dim=None))
    y = model(draw(5, 6))
    report = anynorm.accelerate(model, fuse=True)
    assert find_fused(report.model) == {}
    assert "0 has hooks or a parametrization" in find_left(report)[0].reason
    torch.testing.assert_close(model(draw(5, 6)), y, rtol=1e-5, atol=1e-6)


def test_a_subclass_of_an_activation_is_read_by_a_graph():
    """It was left where only its name is known; a graph knows what its code does."""
    report = check(shake(pair(None, Tuned())), draw(5, 6), fused=1)
    assert (find_left(report), report.fused[0].where) == ([], "report.model")


def test_lazy_norms_are_left_until_they_know_their_size():
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.ReLU())
    report = anynorm.accelerate(model, fuse=True)
    assert find_fused(model) == {}
    assert "0 does not know its size yet; call the model once before" in find_left(report)[0].reason
    model(draw(4, 6))
    assert len(anynorm.accelerate(model, fuse=True).fused) == 1


def test_other_neighbours_are_not_named():
    report = anynorm.accelerate(nn.Sequential(nn.BatchNorm1d(6), nn.Conv1d(6, 6, 1), nn.ReLU()), fuse=True)
    assert (find_left(report), report.fused) == ([], [])


class Reversed(nn.Sequential):
    def forward(self, x):
        for module in reversed(self):
            x = module(x)
        return x


class Blocks(nn.Sequential):
    """A Sequential by another name, as torchvision has them."""


def test_a_sequential_with_a_forward_of_its_own_is_no_sequential():
    check(shake(nn.Sequential(Blocks(nn.BatchNorm1d(6), nn.SiLU()))), draw(5, 6), fused=1, inside=1)
    report = check(shake(nn.Sequential(Reversed(nn.BatchNorm1d(6), nn.SiLU()))), draw(5, 6), fused=0)
    assert find_left(report) == []
    report = check(shake(nn.Sequential(Reversed(nn.SiLU(), nn.BatchNorm1d(6)))), draw(5, 6), fused=1)
    assert report.fused[0].where == "report.model"


def test_a_norm_alone_and_a_norm_that_is_the_model():
    for model in (nn.BatchNorm1d(6), nn.Sequential(nn.BatchNorm1d(6))):
        report = anynorm.accelerate(model, fuse=True)
        assert (len(report.changed), report.fused, find_left(report), report.model) == (1, [], [], model)
