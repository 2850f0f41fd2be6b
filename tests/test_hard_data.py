"""Data whose roundings do not cancel, against the reference in float64: the promise holds for any data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import anynorm
from anynorm import reference
from benchmarks import hard_data
from benchmarks.hard_data import CASES, FAMILIES, LAYOUTS

PROMISE = 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("norm", "layout"), CASES)
def test_the_promise_holds_for_data_that_round_alike(norm, layout, family):
    x = hard_data.draw_x(family, LAYOUTS[layout])
    for gradient in hard_data.GRADIENTS:
        errors = hard_data.measure(anynorm, norm, x, hard_data.draw_gradient(gradient, x))
        assert max(errors.values()) <= PROMISE, (gradient, errors)


def test_the_promise_holds_where_rows_are_long_and_far():
    """More than 4 MB in channels_last, above 128 channels, are summed in the order of memory."""
    layout = hard_data.Layout((33, 136, 16, 16), channels_last=True)
    x = hard_data.draw_x("two values", layout)
    errors = hard_data.measure(anynorm, "batch", x, hard_data.draw_gradient("mean 10", x))
    assert max(errors.values()) <= PROMISE, errors


@pytest.mark.parametrize("how", ["masked", "fused", "fused, masked"])
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_or_an_activation_takes_no_digit(family, layout, how):
    x = hard_data.draw_x(family, LAYOUTS[layout])
    for gradient in hard_data.GRADIENTS:
        errors = hard_data.measure(anynorm, "batch", x, hard_data.draw_gradient(gradient, x), how)
        assert max(errors.values()) <= PROMISE, (gradient, errors)


def test_a_channel_of_two_values():
    """In lanes that took 128 equal squares each y was off by 5.6e-6 and the running variance by 9e-6."""
    x = torch.zeros(128, 2, 32)
    x[..., 8:] = 1.9536933898925781
    norm = anynorm.BatchNorm1d(2, momentum=1.0)
    y = norm(x).detach().double().numpy()
    true = reference.forward(x.numpy(), (0, 2))
    var = x.double().numpy()[:, 0].var(ddof=1)
    assert np.abs(y - true).max() <= PROMISE * np.abs(true).max()
    assert norm.running_var[0].item() == pytest.approx(var, rel=2e-7)


@pytest.mark.parametrize("how", ["bare", "masked", "fused", "fused, masked"])
@pytest.mark.parametrize(("norm", "layout"), [case for case in CASES if case[1] != "long rows"])
@pytest.mark.parametrize(
    ("x_scale", "g_scale", "eps"), [(1e-42, 1.0, 1e-12), (1e29, 1e10, 1e-5), (1e-20, 1e-25, 1e-50), (1e10, 1e30, 1e-5)]
)
def test_products_may_leave_the_range_of_a_float(norm, layout, how, x_scale, g_scale, eps):
    """g * (x - mean) overflowed, or kept a few bits, where every input and every result is an ordinary float."""
    generator = torch.Generator().manual_seed(0)
    shape = LAYOUTS[layout].shape
    x = hard_data.lay_out(torch.randn(shape, generator=generator) * x_scale, LAYOUTS[layout])
    g = hard_data.lay_out(torch.randn(shape, generator=generator) * g_scale, LAYOUTS[layout])
    errors = hard_data.measure(anynorm, norm, x, g, how, eps=eps)
    errors.pop("running_var", None)  # no ordinary float
    assert max(errors.values()) <= 2 * PROMISE, errors


def test_gamma_times_gradient_may_leave_the_range_of_a_float():
    norm = anynorm.LayerNorm(64)
    torch.nn.init.constant_(norm.weight, 1e25)
    x = (torch.randn(48, 64) * 1e20).requires_grad_()
    g = torch.randn(48, 64) * 1e20
    wide = torch.nn.LayerNorm(64).double()
    wide.load_state_dict(norm.state_dict())
    leaf = x.detach().double().requires_grad_()
    (true,) = torch.autograd.grad(wide(leaf), leaf, g.double())
    (dx,) = torch.autograd.grad(norm(x), x, g)
    assert (dx.double() - true).abs().max() <= PROMISE * true.abs().max()


def test_the_measure_sees_an_error():
    """torch's norm of the same data is beyond the promise, so the measure can fail."""
    x = hard_data.draw_x("geometric", LAYOUTS["channels_last"]) + 1e4
    errors = hard_data.measure(torch.nn, "batch", x, hard_data.draw_gradient("mean 10", x))
    assert max(errors.values()) > 1e-5
