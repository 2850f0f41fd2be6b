"""Norms, models and comparisons that the tests of `accelerate(model, fuse=True)` share."""

from __future__ import annotations

import copy
import operator

import torch
import torch.nn as nn
import torch.nn.functional as F

import anynorm
from anynorm.modules.fused import Fused
from anynorm.surgery import accelerate as surgery
from anynorm.surgery import fuse

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


def find_left(report):
    """What was left though an activation follows; the rest is tested in test_report.py."""
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
        found, expected = step(ours, x, training), step(theirs, x, training)
        assert list(found) == list(expected)
        for name, want in expected.items():
            if want is None or not want.is_floating_point():
                assert (want is None and found[name] is None) or torch.equal(found[name], want), name
                continue
            error = float((found[name] - want).abs().max()) / max(1.0, float(want.abs().max()))
            assert error <= tolerance, f"step {number}, {name}: {error}"


def find_fused(model: nn.Module) -> dict[str, Fused]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Fused)}


def check(
    model: nn.Module, x: torch.Tensor, fused: int, inside: int = 0, tolerance: float = 1e-9
) -> surgery.SurgeryReport:
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


def hook(module: nn.Module, kind: str) -> nn.Module:
    getattr(module, f"register_{kind}")(lambda *arguments: None)
    return module


def patch(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x
    return module


SHARED, SHARED_NORM = nn.ReLU(), nn.BatchNorm1d(6)
ONLY = "only relu, leaky_relu, silu, gelu, relu6, hardswish, elu, tanh, sigmoid, mish and gelu_tanh can be fused"


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
    "leaky_relu 0.3": lambda n, x: F.leaky_relu(n.norm(x) + x, 0.3, True),
    "leaky_relu_": lambda n, x: F.leaky_relu_(n.norm(x) + x, negative_slope=0.01),
    "gelu tanh": lambda n, x: F.gelu(n.norm(x) + x, approximate="tanh"),
    "relu6": lambda n, x: F.relu6(n.norm(x) + x),
    "relu6 in place": lambda n, x: F.relu6(n.norm(x) + x, inplace=True),
    "hardswish": lambda n, x: F.hardswish(n.norm(x) + x),
    "hardswish in place": lambda n, x: F.hardswish(n.norm(x) + x, True),
    "elu": lambda n, x: F.elu(n.norm(x) + x),
    "elu 0.5": lambda n, x: F.elu(n.norm(x) + x, alpha=0.5),
    "elu_ 2": lambda n, x: F.elu_(n.norm(x) + x, 2),
    "mish": lambda n, x: F.mish(n.norm(x) + x),
    "torch.tanh": lambda n, x: torch.tanh(n.norm(x) + x),
    "Tensor.tanh_": lambda n, x: (n.norm(x) + x).tanh_(),
    "F.tanh": lambda n, x: F.tanh(n.norm(x)),
    "torch.sigmoid": lambda n, x: torch.sigmoid(n.norm(x) + x),
    "Tensor.sigmoid": lambda n, x: n.norm(x).sigmoid(),
    "F.sigmoid": lambda n, x: F.sigmoid(n.norm(x)),
    "functional": lambda n, x: F.silu(n.norm(x)),
    "method": lambda n, x: n.norm(x).relu(),
    "in place method": lambda n, x: n.norm(x).relu_(),
    "module alone": lambda n, x: n.act(n.norm(x)),
    "two norms": lambda n, x: F.relu(n.norm(x) + n.other(x)),
    "input is the residual": lambda n, x: F.relu(n.norm(x) + x),
    "keyword": lambda n, x: F.relu(n.norm(input=x) + x),
}


def another_moves(n, x):
    """Not the residual, nor a view of it."""
    residual = x.sin() * 1
    other = residual * 2
    y = n.norm(x)
    other.mul_(2)
    total = y + residual
    F.relu_(other)
    return F.relu(total) * other


def branch(n, x):
    return F.relu(n.norm(x) + x) * (2 if n.training else 1)
