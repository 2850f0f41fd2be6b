"""Each clause of the fast path's allow-list (`watch.is_plain`) keeps something away from the kernels."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn as nn
from torch.func import vmap
from torch.overrides import TorchFunctionMode

import anynorm
from anynorm.engine import kernels, watch
from specimens import Operations, assert_same

X = torch.randn(5, 6, 4, 3, generator=torch.Generator().manual_seed(0))


class Counting(torch.Tensor):
    """A subclass: what comes out must be one, too."""


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


def test_fast_path_serves_plain_tensors():
    assert watch.is_plain(X, nn.Parameter(torch.ones(6)), None)


@pytest.mark.parametrize("member", ["x", "weight", "bias"])
def test_fast_path_takes_subclasses_through_torchs_protocol(member):
    tensors = {"x": X, "weight": torch.ones(6), "bias": torch.zeros(6)}
    tensors[member] = tensors[member].as_subclass(Counting)
    assert not watch.is_plain(*tensors.values())
    assert type(anynorm.functional.group_norm(tensors["x"], 3, tensors["weight"], tensors["bias"])) is Counting


def test_fast_path_leaves_other_devices_and_layouts():
    assert not watch.is_plain(X.to("meta"))
    assert not watch.is_plain(X[0, 0].to_sparse())


def test_fast_path_leaves_transforms_and_duals(monkeypatch):
    monkeypatch.setattr(kernels, "forward", None)
    assert vmap(anynorm.LayerNorm(3))(X).shape == X.shape
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        assert torch.autograd.forward_ad.unpack_dual(anynorm.LayerNorm(3)(dual)).tangent is not None


@pytest.mark.parametrize("mode", [Functions, Operations])
def test_fast_path_leaves_modes(mode):
    """A function mode is shown the norm as one call before the kernels serve it; so is a dispatch mode, of memory."""
    with mode() as watching:
        anynorm.LayerNorm(3)(X)
    one = {"layer_norm", "anynorm.forward.default"} & set(watching.seen)
    assert one or any("rsqrt" in name for name in watching.seen)


def test_fast_path_stays_under_a_default_device():
    """torch.set_default_device and `with torch.device(...)` are function modes that watch nothing."""
    with torch.device("cpu"):
        assert watch.is_plain(X)
        with Functions():
            assert not watch.is_plain(X)


def test_batched_gradients():
    norm = anynorm.LayerNorm(3)
    leaf = X.clone().requires_grad_()
    g = torch.randn(2, *X.shape)
    (together,) = torch.autograd.grad(norm(leaf), leaf, g, is_grads_batched=True)
    alone = torch.stack([torch.autograd.grad(norm(leaf), leaf, one)[0] for one in g])
    assert_same([together], [alone])
    jacobian = torch.autograd.functional.jacobian
    assert_same([jacobian(norm, X[0, 0], vectorize=True)], [jacobian(norm, X[0, 0])])


def test_fast_path_leaves_tracing():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(anynorm.BatchNorm2d(6).eval(), X)
    assert "aten::batch_norm" in str(traced.inlined_graph)
