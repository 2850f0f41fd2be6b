"""`accelerate`: the same objects, the same outputs, a way back, and a report of what was left and why."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn

import anynorm
from anynorm.surgery.accelerate import PAIRS


def network() -> nn.Sequential:
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(8)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), shared, nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), shared,
        nn.Sequential(nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)),
        nn.Flatten(), nn.LayerNorm(8 * 36), nn.Linear(8 * 36, 10), nn.RMSNorm(10), nn.BatchNorm1d(10),
    )  # fmt: skip


def test_same_objects_and_a_way_back():
    model = network()
    objects = {name: (id(module), type(module)) for name, module in model.named_modules()}
    parameters = [id(p) for p in model.parameters()]
    buffers = [id(b) for b in model.buffers()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    model[10].eval()
    report = anynorm.accelerate(model)
    assert [id(p) for p in model.parameters()] == parameters
    assert [id(b) for b in model.buffers()] == buffers
    assert {entry.name for entry in report.changed} == {"1", "5.0", "5.1", "7", "9", "10"}  # the shared one once
    assert report.left == []
    assert model[1] is model[4]
    assert not model[10].training
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    optimizer.step()
    assert calls == [1, 1]
    back = anynorm.accelerate(model, undo=True)
    assert len(back.changed) == 6
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == objects


def test_same_outputs_in_training_and_evaluation():
    model = network()
    fast = copy.deepcopy(model)
    anynorm.accelerate(fast)
    for step in range(3):
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind.__name__ for kind in PAIRS])
def test_every_exact_type(kind):
    arguments = () if kind.startswith("Lazy") else (2, 4) if kind == "GroupNorm" else (4,)
    module = getattr(nn, kind)(*arguments)
    report = anynorm.accelerate(module)
    assert type(module) is getattr(anynorm, kind)
    assert (report.changed[0].kind, report.changed[0].became) == (f"torch.nn.{kind}", f"anynorm.{kind}")
    assert anynorm.accelerate(module).changed == []
    anynorm.accelerate(module, undo=True)
    assert type(module) is getattr(nn, kind)


class Own(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


def test_what_is_left_and_why():
    patched = nn.BatchNorm1d(4)
    patched.forward = lambda x: x
    model = nn.ModuleDict({"own": Own(4), "sync": nn.SyncBatchNorm(4), "patched": patched, "plain": nn.BatchNorm1d(4)})
    report = anynorm.accelerate(model)
    reasons = {entry.name: entry.reason for entry in report.left}
    assert [entry.name for entry in report.changed] == ["plain"]
    assert "a subclass of torch.nn.LayerNorm" in reasons["own"]
    assert "anynorm.sync(model)" in reasons["sync"]
    assert "forward was replaced" in reasons["patched"]
    assert type(model["own"]) is Own
    assert "left own (test_accelerate.Own)" in str(report) or "Own)" in str(report)


def test_norms_that_the_encoder_bypasses_are_left():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, nn.LayerNorm(8))
    report = anynorm.accelerate(model)
    assert [entry.name for entry in report.changed] == ["norm"]
    assert {entry.name for entry in report.left} == {f"layers.{i}.norm{j}" for i in (0, 1) for j in (1, 2)}
    assert all("never calls it" in entry.reason for entry in report.left)


def test_the_encoder_really_bypasses_them():
    """Why they are left: in evaluation the layer's own norm is not called."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    calls = []
    layer.norm1.register_forward_hook(lambda *_: calls.append(1))
    layer.norm1._forward_hooks.clear()
    original = nn.LayerNorm.forward
    try:
        nn.LayerNorm.forward = lambda self, x: calls.append(1) or original(self, x)
        with torch.inference_mode():
            layer(torch.randn(2, 3, 8))
    finally:
        nn.LayerNorm.forward = original
    assert calls == []


def test_undo_leaves_torchs_alone_and_brings_checkpoints_home():
    model = network()
    state = copy.deepcopy(model.state_dict())
    assert anynorm.accelerate(model, undo=True).changed == []
    anynorm.accelerate(model)
    model.load_state_dict(state, strict=True)


def test_not_a_module():
    with pytest.raises(TypeError, match=r"accelerate: model must be a torch\.nn\.Module; got dict"):
        anynorm.accelerate({})
