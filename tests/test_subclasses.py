"""Tensor subclasses without a dispatch of their own get the kernels' numbers, under their own name."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import anynorm
from anynorm.engine import kernels, paths, plain

X = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(3)) + 2


class Tagged(torch.Tensor):
    """As MONAI's MetaTensor and fastai's TensorImage: a name, and what belongs to it, over ordinary memory.

    MONAI#4462, pytorch#79321, pytorch#94160.
    """

    heard: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.heard.append(function)
        y = super().__torch_function__(function, types, args, kwargs)
        if isinstance(y, cls):
            y.note = next((t.note for t in args if hasattr(t, "note")), None)
        return y


class Named(nn.Parameter):
    """Parameters leave the protocol off, and so do their subclasses."""


def tag(t: torch.Tensor, note: str = "spacing") -> Any:
    y = t.clone(memory_format=torch.preserve_format).as_subclass(Tagged)
    y.note = note
    return y


MAKE = {
    "batch": lambda: anynorm.BatchNorm2d(6),
    "evaluation": lambda: anynorm.BatchNorm2d(6).eval(),
    "instance": lambda: anynorm.InstanceNorm2d(6, affine=True),
    "averages": lambda: anynorm.InstanceNorm2d(6, track_running_stats=True),
    "group": lambda: anynorm.GroupNorm(3, 6),
    "layer": lambda: anynorm.LayerNorm(3),
    "rms": lambda: anynorm.RMSNorm((5, 3)),
    "ghost": lambda: anynorm.GhostBatchNorm2d(6, ghost_size=2),
    "renorm": lambda: anynorm.BatchRenorm2d(6, warmup=(0, 0, 0)),
    "fused": lambda: anynorm.BatchNormAct2d(6, activation="silu"),
    "any": lambda: anynorm.AnyNorm("n c h w -> n h w", affine="c", c=6),
}


def forbid(*_: Any, **__: Any) -> None:
    raise AssertionError("the formula in differentiable operations served memory that the kernels can read")


def find_all(norm: nn.Module, x: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    leaf = x.detach().requires_grad_()
    y = norm(leaf, **options)
    return [y, *torch.autograd.grad(y.square().sum(), [leaf, *norm.parameters()]), *norm.buffers()]


@pytest.mark.parametrize("how", ["plain", "masked", "channels_last", "parameters"])
@pytest.mark.parametrize("name", MAKE)
def test_same_bits_under_the_same_name(name, how, monkeypatch):
    norm, x, options = MAKE[name](), X, {}
    if how == "masked":
        if name in ("any", "layer", "rms"):
            mask = torch.ones(4, 6, 5) if name == "layer" else torch.ones(4, 6)
        else:
            mask = torch.ones(4, 5, 3)
        if name != "any":
            mask[1:, 2:] = 0
            options["mask"] = mask
    if how == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    twin = copy.deepcopy(norm)
    if how == "parameters":
        for key, parameter in list(norm._parameters.items()):
            norm._parameters[key] = None if parameter is None else Named(parameter.detach().clone())
    expected = find_all(twin, x, **options)
    if name != "any":  # its pattern has no walk
        monkeypatch.setattr(plain, "compose", forbid)
    given = {key: tag(value) for key, value in options.items()}
    found = find_all(norm, x if how == "parameters" else tag(x), **given)
    assert how == "parameters" or (type(found[0]) is Tagged and found[0].note == "spacing")
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine.as_subclass(torch.Tensor), its)
        assert mine.stride() == its.stride()


@pytest.mark.parametrize("member", ["x", "weight", "bias", "running_mean", "residual", "mask"])
def test_any_argument_may_be_one(member, monkeypatch):
    given = {
        "x": X, "running_mean": torch.zeros(6), "running_var": torch.ones(6), "weight": torch.rand(6),
        "bias": torch.rand(6), "residual": torch.randn(X.shape), "mask": torch.ones(4, 5, 3),
    }  # fmt: skip

    def call(values):
        values = {key: t.clone() for key, t in values.items()}
        first = [values.pop(key) for key in ("x", "running_mean", "running_var", "weight", "bias")]
        y = anynorm.functional.batch_norm(*first, training=True, activation="relu", **values)
        return y, first[1], first[2]

    expected = call(given)
    monkeypatch.setattr(plain, "compose", forbid)
    found = call(given | {member: given[member].as_subclass(Tagged)})
    assert type(found[0]) is Tagged
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine.as_subclass(torch.Tensor), its)


def test_who_listens_hears_one_call_as_from_torch():
    theirs, ours = nn.BatchNorm2d(6), anynorm.BatchNorm2d(6)
    heard = []
    for norm in (theirs, ours):
        Tagged.heard.clear()
        norm(tag(X))
        heard.append([f.__name__ for f in Tagged.heard if f.__name__ not in ("clone", "as_subclass")])
    assert heard[0] == heard[1]
    assert anynorm.functional.batch_norm in Tagged.heard


class Strict(torch.Tensor):
    """Knows torch's layer norm, and refuses everything else."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return "torch's" if function is F.layer_norm else NotImplemented


def test_who_knows_torchs_norm_alone_is_asked_for_that():
    x = torch.ones(2, 3).as_subclass(Strict)
    assert anynorm.LayerNorm(3)(x) == "torch's"
    with pytest.raises(TypeError, match="no implementation found"):
        anynorm.GroupNorm(1, 3)(x)
    with pytest.raises(TypeError, match="no implementation found"):
        anynorm.LayerNormAct(3)(x)


class Refusing(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise PermissionError(function.__name__)


def test_a_refusal_is_heard():
    with pytest.raises(PermissionError, match="group_norm"):
        anynorm.functional.group_norm(torch.ones(2, 4).as_subclass(Refusing), 2)
    norm = anynorm.LayerNorm(3)
    norm.weight = nn.UninitializedParameter()
    for library in (F, anynorm.functional):
        with pytest.raises(ValueError, match="uninitialized parameter"):
            library.layer_norm(torch.ones(2, 3), (3,), norm.weight)


class Wrapper(torch.Tensor):
    """A dispatch of its own: what reads as its memory is not its values."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def opened(t):
            return t.inner if isinstance(t, cls) else t

        y = function(*torch.utils._pytree.tree_map(opened, args), **torch.utils._pytree.tree_map(opened, kwargs or {}))
        return torch.utils._pytree.tree_map(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, y)


def test_a_dispatch_of_its_own_sees_operations():
    norm = anynorm.GroupNorm(3, 6)
    y = norm(Wrapper(X))
    assert type(y) is Wrapper
    torch.testing.assert_close(y.inner, norm(X).detach(), rtol=1e-6, atol=1e-6)


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_a_function_mode_sees_one_call(monkeypatch):
    monkeypatch.setattr(plain, "compose", forbid)
    expected = anynorm.functional.layer_norm(X, (3,))
    with Functions() as mode:
        y = anynorm.functional.layer_norm(X, (3,))
    assert torch.equal(y, expected)
    assert mode.seen == [anynorm.functional.layer_norm]


def test_no_copies_for_a_subclass(monkeypatch):
    """No wide copy: the kernels are handed the very memory."""
    handed = []
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda x, *rest: handed.append(x.data_ptr()) or forward(x, *rest))
    x = tag(X)
    anynorm.functional.group_norm(x, 3)
    assert kernels.OFF or handed == [x.data_ptr()]
    assert paths.is_plain(X)
