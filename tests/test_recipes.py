"""A remembered recipe is the checked call: the same bits, and the same refusals. Each test keeps an invariant."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import anynorm
from anynorm import functional
from anynorm.engine import paths
from fused_specimens import TORCHS

X, RESIDUAL, G = (torch.randn(6, 4, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
MASK = torch.rand(6, 7, generator=torch.Generator().manual_seed(3)) > 0.2
ACTIVATIONS = (None, "identity", *TORCHS)


def with_averages(function: Callable[..., Tensor], **more: Any) -> Callable[..., Tensor]:
    def call(x: Tensor, weight: Tensor, bias: Tensor, momentum: Any = 0.1, **options: Any) -> Tensor:
        mean, var = torch.full((4,), 0.5), torch.full((4,), 2.0)
        y = function(x, mean, var, weight, bias, True, momentum, **more, **options)
        return torch.cat([y.flatten(), mean, var])

    return call


def without(function: Callable[..., Tensor], size: Any) -> Callable[..., Tensor]:
    def call(x: Tensor, weight: Tensor, bias: Tensor, momentum: Any = 0.1, **options: Any) -> Tensor:
        first = weight.repeat(2)[: x.shape[-1]] if isinstance(size, tuple) else weight
        return function(x, size, first, **options).flatten()

    return call


CALLS = {
    "batch": with_averages(functional.batch_norm),
    "instance": with_averages(functional.instance_norm),
    "renorm": with_averages(functional.batch_renorm),
    "ghost": with_averages(functional.ghost_batch_norm, ghost_size=3),
    "ghost_rest": with_averages(functional.ghost_batch_norm, ghost_size=4),
    "layer": without(functional.layer_norm, (7,)),
    "rms": without(functional.rms_norm, (7,)),
    "group": without(functional.group_norm, 2),
}


def find_all(call: Callable[..., Tensor], **options: Any) -> list[Tensor]:
    weight, bias = (torch.linspace(a, 2, 4, requires_grad=True) for a in (0.5, -1))
    leaves = [X.clone().requires_grad_(), weight, bias]
    if "residual" in options:
        leaves.append(options["residual"].clone().requires_grad_())
        options["residual"] = leaves[3]
    y = call(*leaves[:3], **options)
    g = torch.ones_like(y)
    g[: G.numel()] = G.flatten()
    found = torch.autograd.grad(y, leaves, g, allow_unused=True)
    return [y.detach(), *(t for t in found if t is not None)]


@pytest.mark.parametrize("name", CALLS)
def test_first_second_and_third_call_agree_to_the_bit(name):
    """activation="identity" was None at first and "identity", another walk, ever after."""
    masks: list[dict] = [{}, {"mask": MASK if name not in ("layer", "rms") else MASK[:, :4]}]
    for activation, more, residual in product(ACTIVATIONS, masks, (False, True)):
        options: dict[str, Any] = {"activation": activation, **more}
        if residual:
            options["residual"] = RESIDUAL
        moments = (0.1, 1, torch.tensor(0.25)) if activation == "identity" and name in ("batch", "instance") else (0.1,)
        for momentum in moments:
            paths.PLANS.clear()
            first, second, third = (find_all(CALLS[name], momentum=momentum, **options) for _ in range(3))
            for a, b, c in zip(first, second, third, strict=True):
                assert torch.equal(a, b), (activation, residual)
                assert torch.equal(b, c), (activation, residual)


REFUSED = {
    "activation": lambda: functional.layer_norm(X, (7,), activation="softplus"),
    "activation of a type": lambda: functional.group_norm(X, 2, activation=[1]),  # type: ignore[arg-type]
    "eps": lambda: functional.batch_norm(X, None, None, training=True, eps=-1.0),
    "no eps": lambda: functional.layer_norm(X, (7,), eps=None),  # type: ignore[arg-type]
    "residual's dtype": lambda: functional.rms_norm(X, (7,), residual=X.double()),
    "residual's shape": lambda: functional.instance_norm(X, residual=X[:1]),
    "weight's dtype": lambda: functional.group_norm(X, 2, torch.ones(4, dtype=torch.float64)),
    "weight's size": lambda: functional.batch_norm(X, None, None, torch.ones(5), training=True),
    "groups": lambda: functional.group_norm(X, 2.0),  # type: ignore[arg-type]
    "shared averages": lambda: functional.batch_norm(
        X, *[torch.ones(4)] * 2, training=True, momentum=torch.tensor(0.1)
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_checks_refuse_is_refused_after_a_good_call_too(what):
    def find_error() -> Exception:
        with pytest.raises(Exception) as caught:
            REFUSED[what]()
        return caught.value

    paths.PLANS.clear()
    first = find_error()
    for activation in (None, "relu"):
        functional.layer_norm(X, (7,), activation=activation)
        functional.rms_norm(X, (7,), activation=activation)
        functional.group_norm(X, 2, activation=activation)
        functional.instance_norm(X, activation=activation)
        functional.batch_norm(X, None, None, training=True, activation=activation)
        functional.batch_norm(X, torch.ones(4), torch.ones(4), training=True, activation=activation)
    second = find_error()
    assert type(first) is type(second)
    assert str(first) == str(second)


DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int64, torch.uint8, torch.bool]
MODULES = {
    "batch": lambda **o: anynorm.BatchNorm1d(4, **o),
    "bare batch": lambda **o: anynorm.BatchNorm1d(4, affine=False, track_running_stats=False, **o),
    "ghost": lambda **o: anynorm.GhostBatchNorm1d(4, ghost_size=2, affine=False, **o),
    "renorm": lambda **o: anynorm.BatchRenorm1d(4, affine=False, **o),
    "instance": lambda **o: anynorm.InstanceNorm1d(4, **o),
    "layer": lambda **o: anynorm.LayerNorm(7, elementwise_affine=False, **o),
    "rms": lambda **o: anynorm.RMSNorm(7, **o),
    "bare rms": lambda **o: anynorm.RMSNorm(7, elementwise_affine=False, **o),
    "group": lambda **o: anynorm.GroupNorm(2, 4, affine=False, **o),
    "any": lambda **o: anynorm.AnyNorm("n c s -> n", **o),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_dtypes_are_refused_as_torch_refuses_them(name, dtype):
    """torch raises NotImplementedError for every norm of float8; a norm without parameters took it in silence."""
    x = (X * 2).to(dtype)
    for training in (True, False):
        norm = MODULES[name]().train(training)
        for options in (
            ({}, {"lengths": [7, 3, 4, 7, 7, 7]}) if name not in ("any", "layer", "rms", "bare rms") else ({},)
        ):
            with pytest.raises(NotImplementedError, match="input must be float16, bfloat16, float32 or float64"):
                norm(x, **options)


def test_rms_norm_trains_on_what_was_made_in_inference_mode():
    """As torch's RMSNorm does, being composed of operations that keep something else."""
    with torch.inference_mode():
        frozen = {dtype: X.to(dtype) for dtype in (torch.float32, torch.float64)}
    for dtype, x in frozen.items():
        ours, theirs = anynorm.RMSNorm(7, dtype=dtype), torch.nn.RMSNorm(7, dtype=dtype)
        for norm in (ours, theirs):
            norm(x).pow(2).sum().backward()
        assert torch.allclose(ours.weight.grad, theirs.weight.grad, rtol=1e-5)
        act = anynorm.RMSNormAct(7, activation="silu", dtype=dtype)
        act(x, residual=x).sum().backward()
        assert act.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "options", [{}, {"mask": MASK}, {"activation": "silu"}, {"residual": RESIDUAL, "activation": "relu"}]
)
def test_instance_norms_parameters_may_change_before_backward(options):
    """torch copies them; what a backward uses is what its forward saw."""
    found = []
    for change in (False, True):
        for recipe in range(2):
            weight, bias = (torch.linspace(a, 2, 4, requires_grad=True) for a in (0.5, -1))
            x = X.clone().requires_grad_()
            y = functional.instance_norm(x, weight=weight, bias=bias, **options)
            if change:
                with torch.no_grad():
                    weight.mul_(3)
                    bias.add_(2)
            found.append(torch.autograd.grad(y, [x, weight, bias], G))
            del recipe
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
