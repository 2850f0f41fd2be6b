"""A default device or dtype in force changes nothing: every tensor that the library makes for itself says both."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

import anynorm

SOURCE = Path(anynorm.__file__).parent
# These make models and examples for a user, or data beside them, and follow the user's defaults as torch.nn does.
FOLLOWS = [SOURCE / "apps" / name for name in ("zoo.py", "speed.py", "models", "timing", "try_model", "studies")]
FACTORIES = {function.__name__ for function in _device_constructors()} | {"bincount"}
TYPED = {"empty", "zeros", "ones", "full", "rand", "randn", "linspace", "eye", "tensor"}


def find_calls(tree: ast.AST) -> list[tuple[ast.Call, str]]:
    return [
        (node, node.func.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in FACTORIES
    ]


def test_every_factory_says_device_and_dtype():
    seen = 0
    for path in sorted(SOURCE.rglob("*.py")):
        if any(path.is_relative_to(place) for place in FOLLOWS):
            continue
        for call, name in find_calls(ast.parse(path.read_text())):
            given = {keyword.arg for keyword in call.keywords}
            seen += 1
            if None in given or name in ("bincount", "from_numpy", "from_file", "set_default_device"):
                continue  # ** hands both on; these follow what they are given
            is_public = path.name == "masks.py" and name == "as_tensor"  # `mask_of` makes a mask for its caller
            assert "device" in given or is_public, f"{path}:{call.lineno} torch.{name}"
            assert "dtype" in given or name not in TYPED, f"{path}:{call.lineno} torch.{name}"
    assert seen > 20


CALLS = """
import torch, anynorm
from torch.nn.utils.rnn import pack_sequence
from anynorm import functional, recalibrate
from anynorm.engine.request import Request
from anynorm.functional.batch import BATCH_NORM
from anynorm.sources import Exchange, Merged

class Alone(Exchange):
    def merge(self, moments): return moments
    def merge_sums(self, sums): return sums

torch.manual_seed(0)
FLOAT = dict(dtype=torch.float32, device="cpu")
x = torch.randn(6, 8, 7, **FLOAT)
mask = torch.rand(6, 7, **FLOAT) > 0.3
g = torch.randn(6, 8, 7, **FLOAT)
lengths = [7, 3, 4, 7, 5, 6]
packed = pack_sequence([torch.randn(n, 8, **FLOAT) for n in (4, 3, 2)])
image = torch.randn(2, 8, 300, 300, **FLOAT).transpose(0, 1).transpose(1, 2)
options = {"device": "cpu", "dtype": torch.float32}
norms = {
    "batch": anynorm.BatchNorm1d(8, **options), "cumulative": anynorm.BatchNorm1d(8, momentum=None, **options),
    "ghost": anynorm.GhostBatchNorm1d(8, ghost_size=2, **options),
    "rest": anynorm.GhostBatchNorm1d(8, ghost_size=4, **options),
    "renorm": anynorm.BatchRenorm1d(8, **options), "group": anynorm.GroupNorm(2, 8, **options),
    "instance": anynorm.InstanceNorm1d(8, affine=True, track_running_stats=True, **options),
    "fused": anynorm.BatchNormAct1d(8, activation="gelu", **options),
    "sync": anynorm.SyncBatchNorm(8, **options),
}
rows = {"layer": anynorm.LayerNorm(7, **options), "rms": anynorm.RMSNorm(7, **options)}
recurrent = [anynorm.LSTM(8, 5, norm="layer", bidirectional=True, **options),
             anynorm.GRU(8, 5, norm="batch-sequence", **options), anynorm.LSTM(8, 5, **options)]
model = torch.nn.Sequential(torch.nn.Linear(8, 8, **options), anynorm.BatchNorm1d(8, **options))
data = [x[:, :, 0], x[:, :, 1]]

def run():
    found = []
    def add(y, leaf=None, grad=None):
        found.append(y.detach())
        if leaf is not None:
            found.append(torch.autograd.grad(y, leaf, grad, create_graph=False)[0])
    for norm in norms.values():
        for training in (True, False):
            norm.train(training)
            for given in ({}, {"mask": mask}, {"lengths": lengths}):
                leaf = x.clone().requires_grad_()
                add(norm(leaf, **given), leaf, g)
        norm.train()
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        first = torch.autograd.grad(y, leaf, g, create_graph=True)[0]
        found.append(torch.autograd.grad(first.square().sum(), leaf)[0])
        found += [norm.running_mean, norm.running_var] if hasattr(norm, "running_var") else []
        found += [norm.start_share] if hasattr(norm, "start_share") else []
    for norm in (norms["batch"], anynorm.LayerNorm(8, **options)):
        found.append(norm(packed).data.detach())
    for norm in (norms["instance"], norms["group"]):
        found.append(norm(packed).data.detach())
    for norm in rows.values():
        leaf = x.clone().requires_grad_()
        add(norm(leaf), leaf, g)
        add(norm(leaf, mask=mask[:, :1].expand(6, 8)), leaf, g)
    for net in recurrent:
        found.append(net(packed)[0].data.detach())
    leaf = x.clone().requires_grad_()
    request = Request(Merged(exchange=Alone()), mask=mask)
    add(BATCH_NORM.normalize(leaf, None, None, None, request), leaf, g)
    found.append(functional.batch_norm(image, None, None, training=True).detach())
    recalibrate(model, data)
    found += [model[1].running_mean, model[1].running_var]
    anynorm.accumulate(model, data, lambda net, part: net(part).square().mean())
    found.append(model[0].weight.grad)
    return found

import copy
start = [copy.deepcopy(m.state_dict()) for m in [*norms.values(), *rows.values(), *recurrent, model]]
def back():
    for m, s in zip([*norms.values(), *rows.values(), *recurrent, model], start):
        m.load_state_dict(s)
    norms["renorm"].batches.zero_()
    norms["renorm"].start_share.fill_(1)
    model.zero_grad()

true = [t.clone() for t in run()]
back()
DEFAULT
found = run()
torch.set_default_device(None)
torch.set_default_dtype(torch.float32)
assert len(found) == len(true)
for place, (a, b) in enumerate(zip(found, true)):
    assert a.device.type == "cpu" and a.dtype == b.dtype, (place, a.device, a.dtype)
    assert torch.equal(a, b), (place, a, b)
print("same", len(true))
"""
DEFAULTS = {
    "device": 'torch.set_default_device("meta")',
    "dtype": "torch.set_default_dtype(torch.float64)",
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("kernels", ["1", "0"])
def test_defaults_change_no_bit(default, kernels):
    """In a process of its own: room on another device was an address that a CPU kernel wrote to."""
    done = subprocess.run(
        [sys.executable, "-c", CALLS.replace("DEFAULT", DEFAULTS[default])],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SOURCE.parent), "ANYNORM_KERNELS": kernels},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("same"), done.stdout


def test_a_default_device_for_a_while():
    norm, x = anynorm.BatchNorm1d(4), torch.randn(3, 4)
    with torch.device("meta"):
        assert norm(x).device.type == "cpu"
