"""`accelerate(model, fuse=True)`: the same outputs, gradients, buffers and steps, in Sequentials and in graphs.

What cannot be fused without changing what somebody sees is left, and named with its reason.
"""

from __future__ import annotations

import copy
import operator
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import anynorm
from anynorm.apps.zoo import ZOO
from anynorm.modules.fused import Fused
from anynorm.surgery import accelerate as surgery
from anynorm.surgery import fuse, trace

NORMS = {
    "BatchNorm1d": (nn.BatchNorm1d, (6,), (5, 6, 4)),
    "BatchNorm2d": (nn.BatchNorm2d, (6,), (3, 6, 4, 4)),
    "BatchNorm3d": (nn.BatchNorm3d, (6,), (3, 6, 2, 3, 3)),
    "InstanceNorm1d": (nn.InstanceNorm1d, (6, 1e-5, 0.1, True, True), (5, 6, 4)),
    "InstanceNorm2d": (nn.InstanceNorm2d, (6, 1e-5, 0.1, True, True), (3, 6, 4, 4)),
    "InstanceNorm3d": (nn.InstanceNorm3d, (6, 1e-5, 0.1, True, True), (3, 6, 2, 3, 3)),
    "GroupNorm": (nn.GroupNorm, (2, 6), (3, 6, 4, 4)),
    "LayerNorm": (nn.LayerNorm, (6,), (5, 3, 6)),
    "RMSNorm": (nn.RMSNorm, (6,), (5, 3, 6)),
}
MODULES = {
    "relu": lambda: nn.ReLU(),
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.01),
    "silu": lambda: nn.SiLU(),
    "gelu": lambda: nn.GELU("none"),
}


def find_left(report):
    """What was left though an activation follows; the rest is held in test_report.py."""
    return [entry for entry in report.left if entry.reason != fuse.NO_ACTIVATION]


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters of both signs and running statistics of an odd distribution."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if "Norm" not in type(module).__name__:
                continue
            for name, tensor in module.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
                if name == "running_var":
                    tensor.abs_().add_(0.5)
    return model


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, x: torch.Tensor, training: bool, rate: float = 0.1) -> dict[str, torch.Tensor]:
    """Outputs, all gradients, then parameters and buffers after a step of SGD."""
    model.train(training)
    model.zero_grad()
    leaf = x.clone().requires_grad_(x.is_floating_point())
    y = model(leaf)
    (y * draw(*y.shape, seed=9)).sum().backward()
    found = {"y": y.detach(), "dx": leaf.grad}
    found |= {f"d {name}": p.grad for name, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=rate).step()
    return found | {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_steps(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, tolerance: float = 1e-9) -> None:
    """Two training steps, one in evaluation and one more in training, from the same state, all in float64."""
    for number, training in enumerate((True, True, False, True)):
        mine, its = step(ours, x, training), step(theirs, x, training)
        assert list(mine) == list(its)
        for name, want in its.items():
            if want is None or not want.is_floating_point():
                assert (want is None and mine[name] is None) or torch.equal(mine[name], want), name
                continue
            error = float((mine[name] - want).abs().max()) / max(1.0, float(want.abs().max()))
            assert error <= tolerance, f"step {number}, {name}: {error}"


def find_fused(model: nn.Module) -> dict[str, Fused]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Fused)}


def check(model: nn.Module, x: torch.Tensor, fused: int, inside: int = 0, tolerance: float = 1e-9) -> surgery.Report:
    """Fuse, count what was fused in the new model and in the given one, and compare with the model as it was.

    The given model and the new one share parameters: each gets its own comparison.
    """
    if tolerance < 1e-6:
        model, x = model.double(), x.double() if x.is_floating_point() else x
    before, given = copy.deepcopy(model), copy.deepcopy(model)
    keys = list(model.state_dict())
    report = anynorm.accelerate(model, fuse=True)
    assert len(find_fused(report.model)) == fused, str(report)
    assert len(find_fused(model)) == inside, str(report)
    assert list(report.model.state_dict()) == list(model.state_dict()) == keys
    assert (report.model is model) == (fused == inside)
    assert_same_steps(report.model, before, x, tolerance)
    model.load_state_dict(given.state_dict())
    assert_same_steps(model, given, x, tolerance)
    return report


# Sequentials, in place


def make_sequential(kind: str, activation: str) -> tuple[nn.Sequential, torch.Tensor]:
    norm, arguments, shape = NORMS[kind]
    model = nn.Sequential(
        nn.Identity(), norm(*arguments), MODULES[activation](), nn.Sequential(norm(*arguments), nn.Tanh())
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
    assert left.reason == "not fused with torch.nn.Tanh: only relu, leaky_relu, silu and gelu can be fused"


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


def hook(module: nn.Module, kind: str) -> nn.Module:
    getattr(module, f"register_{kind}")(lambda *arguments: None)
    return module


def patch(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x
    return module


class Tuned(nn.ReLU):
    """A ReLU with code of its own."""


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


SHARED, SHARED_NORM = nn.ReLU(), nn.BatchNorm1d(6)
ONLY = "only relu, leaky_relu, silu and gelu can be fused"
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
    "another slope": (
        lambda: pair(None, nn.LeakyReLU(0.2)),
        "torch.nn.LeakyReLU: leaky_relu is fused with negative_slope=0.01 only, this has 0.2",
    ),
    "gelu by tanh": (
        lambda: pair(None, nn.GELU("tanh")),
        "torch.nn.GELU: gelu is fused with approximate='none' only, this has 'tanh'",
    ),
    "relu6": (lambda: pair(None, nn.ReLU6()), f"torch.nn.ReLU6: {ONLY}"),
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


# Graphs


class Net(nn.Module):
    """A linear layer, a norm, something in between, and what a test makes of them."""

    def __init__(self, forward, kind="BatchNorm1d", **modules):
        super().__init__()
        norm, arguments, _ = NORMS[kind]
        self.act = nn.ReLU()
        self.norm, self.other = norm(*arguments), norm(*arguments)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("offset", torch.full((6,), 0.25), persistent=False)
        for name, module in modules.items():
            setattr(self, name, module)
        self.call = forward
        shake(self)

    def forward(self, x):
        return self.call(self, x * self.scale)


SPELLINGS = {
    "operator": lambda n, x: F.relu(n.norm(x) + x.sin()),
    "reversed": lambda n, x: F.relu(x.sin() + n.norm(x)),
    "operator.add": lambda n, x: torch.relu(operator.add(n.norm(x), x.sin())),
    "torch.add": lambda n, x: torch.relu(torch.add(n.norm(x), x.sin())),
    "Tensor.add": lambda n, x: n.norm(x).add(x.sin()).relu(),
    "Tensor.add_": lambda n, x: n.norm(x).add_(x.sin()).relu_(),
    "torch.relu_": lambda n, x: torch.relu_(n.norm(x) + x.sin()),
    "relu in place": lambda n, x: F.relu(n.norm(x) + x.sin(), inplace=True),
    "relu in place, by position": lambda n, x: F.relu(n.norm(x) + x.sin(), True),
    "operator.iadd": lambda n, x: n.act(operator.iadd(n.norm(x), x.sin())),
    "module": lambda n, x: n.act(n.norm(x) + x),
    "silu": lambda n, x: F.silu(n.norm(x) + x),
    "silu in place": lambda n, x: F.silu(n.norm(x) + x, inplace=True),
    "gelu": lambda n, x: F.gelu(n.norm(x) + x),
    "gelu none": lambda n, x: F.gelu(n.norm(x) + x, approximate="none"),
    "leaky_relu": lambda n, x: F.leaky_relu(n.norm(x) + x),
    "leaky_relu 0.01": lambda n, x: F.leaky_relu(n.norm(x) + x, 0.01),
    "leaky_relu_": lambda n, x: F.leaky_relu_(n.norm(x) + x, negative_slope=0.01),
    "functional": lambda n, x: F.silu(n.norm(x)),
    "method": lambda n, x: n.norm(x).relu(),
    "in place method": lambda n, x: n.norm(x).relu_(),
    "module alone": lambda n, x: n.act(n.norm(x)),
    "two norms": lambda n, x: F.relu(n.norm(x) + n.other(x)),
    "input is the residual": lambda n, x: F.relu(n.norm(x) + x),
    "keyword": lambda n, x: F.relu(n.norm(input=x) + x),
}


def augmented(n, x):
    y = n.norm(x)
    y += x.sin()
    return F.relu(y)


def later(n, x):
    y = n.norm(x)
    residual = n.other(x.cos()).sin()
    return n.act(residual + y)


SPELLINGS |= {"+=": augmented, "residual after the norm": later}


@pytest.mark.parametrize("name", SPELLINGS)
def test_graph_is_fused(name):
    model = Net(SPELLINGS[name])
    report = check(model, draw(5, 6, 4), fused=1)
    (entry,) = report.fused
    assert (entry.name, entry.became, entry.where) == ("norm", "anynorm.BatchNormAct1d", "report.model")
    assert find_left(report) == []
    assert type(model.norm) is anynorm.BatchNorm1d


@pytest.mark.parametrize("kind", NORMS)
def test_every_norm_is_fused_with_its_sum(kind):
    forward = (lambda n, x: F.gelu(n.norm(x) + n.other(x))) if kind != "RMSNorm" else SPELLINGS["gelu"]
    check(Net(forward, kind), draw(*NORMS[kind][2]), fused=1)


def twice(n, x):
    return F.relu(n.norm(F.relu(n.norm(x) + x)))


def sum_seen(n, x):
    total = n.norm(x) + x
    return F.relu(total) * total


def output_seen(n, x):
    y = n.norm(x)
    return F.relu(y + x) * y


def ignored_result(n, x):
    y = n.norm(x)
    F.relu_(y)
    return y


def into_another(n, x):
    z = x.sin()
    total = z
    total += n.norm(x)
    return F.relu(total) * z


def input_moves(n, x):
    x = x.sin()
    y = n.norm(x)
    x.mul_(2)
    return F.relu(y + x)


def residual_moves(n, x):
    """A sum does not keep what it adds; torch allows this."""
    residual = x.sin()
    total = n.norm(x) + residual
    residual.mul_(2)
    return F.relu(total) * 2


def view_of_residual_moves(n, x):
    residual = x.sin()
    view = residual.flatten(1)
    total = n.norm(x) + residual
    F.relu(view, inplace=True)
    return F.relu(total) * 2


def base_of_residual_moves(n, x):
    base = x.sin()
    total = n.norm(x) + base.view(x.shape)
    base.mul_(2)
    return F.relu(total) * 2


def another_moves(n, x):
    """Not the residual, nor a view of it."""
    residual = x.sin() * 1
    other = residual * 2
    y = n.norm(x)
    other.mul_(2)
    total = y + residual
    F.relu_(other)
    return F.relu(total) * other


STAY = {
    "the norm is called twice": (twice, "the norm or its tensors are used 2 times"),
    "its weight is read": (lambda n, x: F.relu(n.norm(x) + x) * n.norm.weight[0], "used 2 times"),
    "the sum is seen": (sum_seen, "the sum is used elsewhere too"),
    "the output is seen": (output_seen, "the norm's output is used elsewhere too"),
    "the activation's result is ignored": (ignored_result, "the norm's output is used elsewhere too"),
    "the sum goes into another tensor": (into_another, "the sum is written into a tensor that others may see"),
    "the residual moves afterwards": (residual_moves, "mul_ may change the residual after the sum"),
    "a view of it moves": (view_of_residual_moves, "relu may change the residual after the sum"),
    "its base moves": (base_of_residual_moves, "mul_ may change the residual after the sum"),
    "a number is added": (lambda n, x: F.relu(n.norm(x) + 1), "what is added is no other tensor"),
    "added to itself": (lambda n, x: F.relu((y := n.norm(x)) + y), "what is added is no other tensor"),
    "a multiple is added": (lambda n, x: F.relu(torch.add(n.norm(x), x, alpha=2)), "the sum has further arguments"),
    "gelu by tanh": (lambda n, x: F.gelu(n.norm(x) + x, approximate="tanh"), "this has 'tanh'"),
    "another slope": (lambda n, x: F.leaky_relu(n.norm(x) + x, 0.3), "negative_slope=0.01 only, this has 0.3"),
    "hardtanh": (lambda n, x: F.hardtanh(n.norm(x) + x), f"not fused with hardtanh: {ONLY}"),
    "tanh": (lambda n, x: n.norm(x).tanh(), f"not fused with tanh: {ONLY}"),
}


@pytest.mark.parametrize("name", STAY)
def test_what_is_left_in_graphs_and_why(name):
    forward, reason = STAY[name]
    report = check(Net(forward), draw(5, 6, 4), fused=0)
    (entry,) = find_left(report)
    assert entry.name == "norm"
    assert reason in entry.reason


def input_moves_later(n, x):
    x = x * 1
    total = n.norm(x) + x * 2
    x.mul_(2)
    return F.relu(total)


@pytest.mark.parametrize("forward", [input_moves, input_moves_later])
def test_an_input_that_moves(forward):
    """Without gradients, which such a model cannot have: before the sum it is left, afterwards it is no harm."""
    model = Net(forward).double().eval().requires_grad_(False)
    x = draw(5, 6, 4).double()
    before = model(x)
    report = anynorm.accelerate(model, fuse=True)
    reasons = [entry.reason for entry in find_left(report)]
    assert (
        reasons == []
        if forward is input_moves_later
        else "mul_ may change the norm's input before the sum" in reasons[0]
    )
    assert len(report.fused) == (forward is input_moves_later)
    torch.testing.assert_close(report.model(x), before, rtol=1e-9, atol=1e-9)


def test_hooked_and_shared_members_of_a_chain_are_left():
    for changes, reason in (
        ({"norm": hook(nn.BatchNorm1d(6), "forward_hook")}, "norm has hooks"),
        ({"act": hook(nn.ReLU(), "full_backward_hook")}, "act has hooks"),
        ({"act": SHARED, "second": SHARED}, "act is shared, it has 2 places"),
        ({"norm": SHARED_NORM, "second": SHARED_NORM}, "norm is shared, it has 2 places"),
    ):
        report = check(Net(SPELLINGS["module"], **changes), draw(5, 6, 4), fused=0)
        assert [reason in entry.reason for entry in find_left(report)] == [True]


def test_what_moves_elsewhere_is_no_harm():
    check(Net(another_moves), draw(5, 6, 4), fused=1)


def test_one_activation_module_called_many_times_is_not_shared():
    """As in torchvision's residual blocks: it is called, not changed."""
    check(Net(lambda n, x: n.act(n.norm(n.act(n.other(x))) + x)), draw(5, 6, 4), fused=2)


class Sub(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = shake(nn.BatchNorm1d(6), 3)

    def forward(self, x):
        return F.silu(self.norm(x) + x)


def test_a_hooked_part_stays_a_call_of_its_own_and_is_named():
    calls = []
    model = Net(lambda n, x: F.relu(n.norm(n.sub(x)) + x), sub=Sub())
    model.sub.register_forward_hook(lambda *arguments: calls.append(1))
    report = anynorm.accelerate(model, fuse=True)
    assert [entry.name for entry in report.fused] == ["norm"]
    assert [(entry.name, "it has hooks" in entry.reason) for entry in find_left(report)] == [("sub", True)]
    report.model(draw(5, 6, 4))
    assert calls == [1]


def test_hooks_elsewhere_go_on_working():
    """The very same callables, also those of weight norm, and parametrizations."""
    seen = []
    conv = nn.utils.weight_norm(nn.Conv1d(6, 6, 1))
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = Net(lambda n, x: F.relu(n.norm(n.linear(n.conv(x))) + x), conv=conv, linear=linear)
    conv(draw(5, 6, 4))  # its weight is now the result of a computation, which deepcopy refuses
    conv.register_forward_hook(lambda module, arguments, y: seen.append(y))
    model_before = copy_by_state(model)
    report = anynorm.accelerate(model, fuse=True)
    assert len(report.fused) == 1
    x = draw(5, 6, 4)
    torch.testing.assert_close(report.model(x), model_before(x), rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


class Watched(nn.Linear):
    """Its hook is a method of its own, as that of lazy modules."""

    def __init__(self):
        super().__init__(4, 4)
        self.register_forward_hook(self.see)

    def see(self, module, arguments, y):
        assert module is self
        return y * 2


def test_hooks_are_not_copied_unless_they_are_methods_of_the_model():
    class Watcher:
        seen = 0

        def see(self, module, arguments, y):
            self.seen += 1

    watcher, model = Watcher(), Net(lambda n, x: F.relu(n.norm(n.part(x)) + x), part=Watched())
    model.part.register_forward_hook(watcher.see)
    before = model(draw(5, 6, 4))
    torch.testing.assert_close(anynorm.accelerate(model, fuse=True).model(draw(5, 6, 4)), before, rtol=1e-5, atol=1e-5)
    assert watcher.seen == 2


class Block(nn.Module):
    """A residual block in torchvision's manner: one activation module, in place, called twice."""

    def __init__(self, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        shortcut = nn.Sequential(nn.Conv2d(channels, 6, 1, stride, bias=False), nn.BatchNorm2d(6))
        self.downsample = None if stride == 1 else shortcut

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def test_residual_blocks_of_torchvision():
    model = shake(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), Block(6, 2), Block(6, 1)))
    report = check(model, draw(2, 3, 9, 9), fused=5, inside=1)
    assert [(entry.name, entry.then) for entry in report.fused] == [
        ("1", "relu"), ("3.bn1", "relu"), ("3.bn2", "add, relu"), ("4.bn1", "relu"), ("4.bn2", "add, relu"),
    ]  # fmt: skip
    assert find_left(report) == []


def copy_by_state(model: Net) -> Net:
    conv = nn.utils.weight_norm(nn.Conv1d(6, 6, 1))
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    twin = Net(model.call, conv=conv, linear=linear)
    twin.load_state_dict(model.state_dict())
    return twin


ODD = {
    "broadcasts": lambda n, x: x.mean(-1, keepdim=True),
    "is a buffer": lambda n, x: n.offset[:, None],
    "is larger": lambda n, x: torch.stack([x, x]),
    "is narrower": lambda n, x: x.float(),
    "is a number": lambda n, x: x.shape[0],
    "is a scalar parameter": lambda n, x: n.scale,
}


@pytest.mark.parametrize("name", ODD)
def test_a_sum_that_broadcasts_or_promotes_computes_the_same(name):
    """What shape and dtype it has is not known when the model is fused."""
    residual = ODD[name]
    check(Net(lambda n, x: F.relu(n.norm(x) + residual(n, x))), draw(5, 6, 4), fused=1)


def add_in_place(n, x):
    y = n.norm(x)
    y += x.double()
    return F.relu(y)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_wider_residual_promotes_a_new_sum_and_no_sum_in_place(in_place):
    model = Net(add_in_place if in_place else lambda n, x: F.relu(n.norm(x) + x.double()))
    x, before = draw(5, 6, 4), copy.deepcopy(model)
    new = anynorm.accelerate(model, fuse=True).model
    assert list(find_fused(new)) == ["norm"]
    assert new(x).dtype == before(x).dtype == (torch.float32 if in_place else torch.float64)
    torch.testing.assert_close(new(x), before(x), rtol=1e-5, atol=1e-5)


def test_under_autocast():
    model = Net(lambda n, x: F.relu(n.norm(n.linear(x)) + x), linear=nn.Linear(4, 4))
    before = copy.deepcopy(model)
    fast = anynorm.accelerate(model, fuse=True).model
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fast(draw(5, 6, 4)), before(draw(5, 6, 4))
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


# What torch.fx would freeze or lose without a word


def drop(n, x):
    return F.dropout(F.relu(n.norm(x) + x), 0.5, n.training)


def branch(n, x):
    return F.relu(n.norm(x) + x) * (2 if n.training else 1)


def frozen(n, x):
    with torch.no_grad():
        y = F.relu(n.norm(x) + x)
    return y + x


def constant(n, x):
    return F.relu(n.norm(x) + x) * torch.ones(4)


def noise(n, x):
    return F.relu(n.norm(x) + x) * random.random()


def numpy_noise(n, x):
    return F.relu(n.norm(x) + x) * float(np.random.rand())  # noqa: NPY002


def torch_noise(n, x):
    return F.relu(n.norm(x) + x) * torch.rand(1).item()


def remember(n, x):
    n.last = F.relu(n.norm(x) + x)
    return n.last


def collect(n, x):
    n.seen.append(x)
    return F.relu(n.norm(x) + x)


def count(n, x):
    n.calls += 1
    return F.relu(n.norm(x) + x) * n.calls


def recompute(n, x):
    return checkpoint(lambda x: F.relu(n.norm(x) + x), x, use_reentrant=False)


class Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


def turn(n, x):
    return F.relu(n.norm(Turn.apply(x)) + x)


def steer(n, x):
    return F.relu(n.norm(x) + x) if x.sum() > 0 else n.other(x)


def narrow(n, x):
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        return F.relu(n.norm(x) + x)


def narrowed(n, x):
    with torch.autocast("cpu", torch.bfloat16):
        return F.relu(n.norm(x) + x)


def enabled(n, x):
    with torch.enable_grad():
        return F.relu(n.norm(x) + x)


def plain_tensor(n, x):
    return F.relu(n.norm(x) + x) + n.plain


LOST = {
    "dropout by a flag": (drop, "differs between training and evaluation"),
    "a branch on the mode": (branch, "differs between training and evaluation"),
    "no_grad": (frozen, "part of its forward runs under torch.no_grad"),
    "a constant tensor": (constant, "tensors that are neither parameters nor buffers"),
    "a tensor as an attribute": (plain_tensor, "tensors that are neither parameters nor buffers"),
    "random": (noise, "draws random numbers"),
    "numpy.random": (numpy_noise, "draws random numbers"),
    "torch.rand": (torch_noise, "draws random numbers"),
    "an attribute": (remember, "changes attributes of the model"),
    "a list": (collect, "changes attributes of the model"),
    "a counter": (count, "changes attributes of the model"),
    "a checkpoint": (recompute, "under torch.no_grad, autocast, a checkpoint"),
    "an autograd function": (turn, "or an autograd function, which a graph would lose"),
    "a branch on values": (steer, "torch.fx cannot trace it"),
    "autocast off": (narrow, "part of its forward runs under torch.no_grad, autocast"),
    "autocast on": (narrowed, "part of its forward runs under torch.no_grad, autocast"),
    "enable_grad": (enabled, "part of its forward runs under torch.no_grad, autocast"),
}


@pytest.mark.parametrize("name", LOST)
def test_models_that_a_graph_would_change_stay(name):
    forward, reason = LOST[name]
    model = Net(forward)
    model.calls, model.seen, model.plain = 0, [], torch.ones(4)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    report = anynorm.accelerate(model, fuse=True)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert report.model is model
    assert report.fused == []
    (entry,) = find_left(report)
    assert (entry.name, entry.kind) == ("", f"{Net.__module__}.Net")
    assert reason in entry.reason
    assert "left the model" in str(report)
    assert (model.calls, model.seen, hasattr(model, "last")) == (0, [], False)


def test_the_chain_of_these_models_would_be_fused_otherwise():
    """So that the reasons above are reasons."""
    check(Net(lambda n, x: F.relu(n.norm(x) + x) * 0.5), draw(5, 6, 4), fused=1)


class Optional(Net):
    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask)


class Several(Net):
    def forward(self, *inputs):
        return super().forward(inputs[0])


class Frozen(Net):
    def train(self, mode=True):
        return super().train(False)


def test_models_whose_class_does_more_than_forward_stay():
    call = SPELLINGS["operator"]
    hooked = hook(Net(call), "forward_hook")
    for model, reason in (
        (Net(call, lazy=nn.LazyLinear(4)), "it has lazy modules that do not know their size yet"),
        (Optional(call), "takes optional arguments (mask)"),
        (Several(call), "takes optional arguments (inputs)"),
        (Frozen(call), "it overrides train"),
        (hooked, "it has hooks or a replaced forward"),
        (patch(Net(call)), "it has hooks or a replaced forward"),
    ):
        report = anynorm.accelerate(model, fuse=True)
        assert (report.model, report.fused) == (model, [])
        assert reason in find_left(report)[0].reason


def test_sequentials_are_fused_where_there_is_no_graph():
    model = Net(branch, body=nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()))
    report = anynorm.accelerate(model, fuse=True)
    assert [(entry.name, entry.where) for entry in report.fused] == [("body.0", "model")]
    assert type(model.body[1]) is nn.Identity
    assert report.model is model


def bump(n, x):
    """`+=` on a tensor with a second name, and on a number."""
    y = x.sin()
    alias = y
    y += 1
    rows = x.shape[0]
    more = rows
    more += 1
    return F.relu(n.norm(x) + x) * alias * rows / more


def test_in_place_operators_keep_their_meaning():
    """torch.fx alone makes them new tensors."""
    model = Net(bump)
    check(model, draw(5, 6, 4), fused=1)
    x = draw(5, 6, 4).double()
    assert not torch.allclose(torch.fx.symbolic_trace(model)(x), model(x))
    new = anynorm.accelerate(model, fuse=True).model
    del new.call  # a function of this file, which pickle may not find
    assert torch.equal(pickle.loads(pickle.dumps(new))(x), new(x))


def test_undo_of_a_graph_trusts_no_identity_that_the_graph_does_not_call():
    body = nn.Sequential(nn.BatchNorm1d(6), nn.Identity())
    model = Net(lambda n, x: F.relu(n.body[0](x)), body=body).double()
    new, x = anynorm.accelerate(model, fuse=True).model, draw(5, 6, 4).double()
    before = new(x)
    assert [entry.name for entry in anynorm.accelerate(new, undo=True).left] == ["body.0"]
    assert torch.equal(new(x), before)


# The new model


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
    for mine, its in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


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
    for room, name in (
        (fuse, "fuse_chain"),
        (surgery, "build"),
        (surgery, "copy_sharing"),
        (surgery, "find_places"),
        (surgery, "tell_fused"),
        (trace, "find_random_state"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(room, name, refuse)
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
    "mobilenetv2": (0, 0),
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
        mine, its = step(report.model, x, training, 1e-3), step(before, x, training, 1e-3)
        for key, want in its.items():
            if want is not None:
                error = float((mine[key] - want).abs().max()) / max(1.0, float(want.abs().max()))
                assert error < 1e-8, key
    reasons = {entry.reason for entry in find_left(report)}
    if name == "mobilenetv2":
        assert len(find_left(report)) == 35
        assert reasons == {f"not fused with torch.nn.ReLU6: {ONLY}"}
    else:
        assert reasons == set()
    if name == "resnet18":
        thens = [entry.then for entry in report.fused]
        assert (thens.count("relu"), thens.count("add, relu")) == (9, 8)
