"""What comes back for backward need not be what was saved, and storages can be gone: rearranged or refused, never read.

Invariant: the gradients of hooks that change nothing, or a RuntimeError as torch.nn's layers raise.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import anynorm
from anynorm import functional
from anynorm.engine import kernels

MAKES: dict[str, Callable[[], torch.nn.Module]] = {
    "batch": lambda: anynorm.BatchNorm2d(8),
    "fused": lambda: anynorm.BatchNormAct2d(8, activation="silu"),
    "evaluation": lambda: anynorm.BatchNorm2d(8).eval(),
    "ghost": lambda: anynorm.GhostBatchNorm2d(8, ghost_size=2),
    "renorm": lambda: anynorm.BatchRenorm2d(8),
    "group": lambda: anynorm.GroupNorm(2, 8),
    "instance": lambda: anynorm.InstanceNorm2d(8, affine=True),
    "layer": lambda: anynorm.LayerNorm(6),
    "rms": lambda: anynorm.RMSNorm(6),
}


def backwards(t: Tensor) -> Tensor:
    axes = range(t.dim())[::-1]
    return t.permute(*axes).contiguous().permute(*axes)


def cut(t: Tensor, size: int = 16) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(size)
    return t


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "backwards": backwards,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "narrow": lambda t: t.bfloat16(),
    "wide": lambda t: t.float() if t.dtype == torch.float64 else t.double(),
    "whole": lambda t: t.int(),
    "elsewhere": lambda t: t.to("meta"),
    "short": lambda t: t.flatten()[:-1],
    "cut": cut,
    "freed": lambda t: cut(t, 0),
}


def find_gradients(
    norm: torch.nn.Module, last: bool, hook: Callable, masked: bool, twice: bool = False
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(4, 8, 5, 6, generator=generator) for _ in range(2))
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    options = {"mask": (torch.rand(4, 5, 6, generator=generator) > 0.3).float()} if masked else {}
    with saved_tensors_hooks(lambda t: t, hook):
        y = norm(x, **options)
    return list(torch.autograd.grad(y, [x, *norm.parameters()], g, create_graph=twice))


@pytest.mark.parametrize("kind", MAKES)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_another_layout_changes_no_gradient(kind, last):
    for masked in (False, True) if kind not in ("layer", "rms") else (False,):
        true = find_gradients(MAKES[kind](), last, lambda t: t, masked)
        for name, hook in LAYOUTS.items():
            for twice in (False, True):
                found = find_gradients(MAKES[kind](), last, hook, masked, twice)
                for a, b in zip(found, true, strict=True):
                    assert torch.allclose(a, b, rtol=1e-5, atol=3e-6), (name, masked, twice)


@pytest.mark.parametrize("kind", MAKES)
@pytest.mark.parametrize("other", OTHERS)
def test_anything_else_is_refused(kind, other):
    """As torch.nn does for another dtype; torch reads past a cut storage. Without kernels masks are autograd's."""
    if kernels.OFF and kind == "fused":
        pytest.skip(
            "without kernels autograd saves what the activation needs, and torch itself reads past cut storages"
        )
    for masked in (False, True) if kind not in ("layer", "rms") and not kernels.OFF else (False,):
        for is_input in (True, False):

            def hook(t: Tensor, is_input: bool = is_input) -> Tensor:
                return OTHERS[other](t) if (t.numel() == 960) == is_input else t

            with pytest.raises(RuntimeError):
                find_gradients(MAKES[kind](), False, hook, masked)


def test_torchs_own_hooks():
    """save_on_cpu(pin_memory=True) gives back a contiguous copy of a channels_last input."""
    norm, x = anynorm.BatchNorm2d(4), torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    g = torch.randn(3, 4, 5, 6)
    true = torch.autograd.grad(norm(x), [x, norm.weight], g)
    with save_on_cpu(pin_memory=True):
        y = norm(x)
    for a, b in zip(torch.autograd.grad(y, [x, norm.weight], g), true, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MAKES)
def test_data_exchanged_between_forward_and_backward(kind):
    if kernels.OFF and kind == "fused":
        pytest.skip("without kernels autograd saves what the activation needs, and does not look at its sizes")
    g = torch.randn(4, 8, 5, 6)
    start = torch.randn(4, 8, 5, 6)
    true = None
    for change in ("none", "layout", "dtype", "shape", "freed", "weight"):
        norm, x = MAKES[kind](), start.clone(memory_format=torch.channels_last).requires_grad_()
        y = norm(x)
        if change == "layout":
            x.data = x.data.contiguous()
        elif change == "dtype":
            x.data = x.data.bfloat16()
        elif change == "shape":
            x.data = x.data[:2]
        elif change == "freed":
            x.untyped_storage().resize_(0)
        elif change == "weight":
            norm.weight.data = norm.weight.data.double()
        try:
            (found,) = torch.autograd.grad(y, [x], g)
        except RuntimeError:
            assert change not in ("none", "layout")
            continue
        # Ghosts are views of the input, which keep what they were; channels_last has no walk for layer norm, which
        # keeps a copy; and the last two keep a copy of gamma, or a product of it.
        copied = ("dtype", "shape", "freed")
        safe = "none", "layout", *{"ghost": ("dtype", "shape"), "layer": copied, "rms": copied}.get(kind, ())
        assert change in safe or (change == "weight" and kind in ("instance", "renorm")), change
        true = found if true is None else true
        assert torch.allclose(found, true, rtol=1e-5, atol=3e-6)


def test_storages_are_looked_at_in_forward():
    x = torch.randn(4, 8, 6)
    for place in range(5):
        for size in (0, 16):
            given = [x.clone(), torch.zeros(8), torch.ones(8), torch.ones(8), torch.zeros(8)]
            functional.batch_norm(*given, training=True)
            given[place].untyped_storage().resize_(size)
            before = [t.clone() for t in given[1:3]] if place not in (1, 2) else []
            for training in (True, False):
                with pytest.raises(RuntimeError, match="storage of"):
                    functional.batch_norm(*given, training=training)
            assert all(torch.equal(a, b) for a, b in zip(before, given[1:3], strict=False))


def test_averages_that_cannot_be_written_are_refused_before_either_moves():
    x = torch.randn(4, 8, 6)
    for var in (torch.ones(1).expand(8), torch.ones(8, device="meta")):
        mean = torch.zeros(8)
        with pytest.raises(RuntimeError, match="running averages must be"):
            functional.batch_norm(x, mean, var, training=True)
        assert not mean.any()


def test_a_mask_that_changes_before_backward_is_noticed():
    x, mask = torch.randn(3, 4, 6, requires_grad=True), torch.ones(3, 6)
    y = functional.batch_norm(x, None, None, training=True, mask=mask, activation="relu")
    mask[0, 3:] = 0
    if not kernels.OFF:  # without them the mask is made bool, a copy
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.skipif(bool(kernels.OFF), reason="without the kernels it is torch's own operations that look")
@pytest.mark.parametrize("other", OTHERS)
def test_a_fused_layer_norm_of_channels_last_is_refused_too(other):
    """No walk serves the layout as it is; by the formula a narrow input was taken in silence."""

    def hook(t: Tensor) -> Tensor:
        return OTHERS[other](t) if t.numel() == 960 else t

    true = find_gradients(anynorm.LayerNormAct(6, activation="silu"), False, lambda t: t, False)
    found = find_gradients(anynorm.LayerNormAct(6, activation="silu"), True, lambda t: t, False)
    assert torch.allclose(found[0], true[0], atol=1e-6)
    with pytest.raises(RuntimeError):
        find_gradients(anynorm.LayerNormAct(6, activation="silu"), True, hook, False)
