"""Masks: every norm, form, layout and dtype against the reference on the real positions alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch import Tensor

import anynorm
from anynorm import reference
from padding.mask_cases import POSITIONED, draw, draw_mask, find_positions, spoil
from specimens import TRACKING, Specimen, assert_close, wide

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "strided")
FORMS = ("lengths", "prefix", "holes", "whole numbers", "floats", "shared by samples", "empty sample")


def split_rows(specimen: Specimen, t: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """The real positions as (positions, C...) arrays, one for each set of statistics of a reference call."""
    if specimen.scheme in ("layer", "rms"):
        return [t[mask]]
    t = np.moveaxis(t, 1, -1)
    return [t[mask]] if specimen.scheme == "batch" else [t[n][mask[n]] for n in range(len(t))]


def join_rows(specimen: Specimen, parts: list[np.ndarray], like: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The inverse, with 0 at padding."""
    if specimen.scheme in ("layer", "rms"):
        out = np.zeros(like.shape)
        out[mask] = parts[0]
        return out
    out = np.zeros(np.moveaxis(like, 1, -1).shape)
    if specimen.scheme == "batch":
        out[mask] = parts[0]
    else:
        for n, part in enumerate(parts):
            out[n][mask[n]] = part
    return np.moveaxis(out, -1, 1)


def shape_rows(specimen: Specimen, rows: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Rows as the reference takes them, and the axes that share a mean."""
    if specimen.scheme in ("layer", "rms"):
        return rows, tuple(range(1, rows.ndim))
    if specimen.scheme == "group":
        return rows.reshape(len(rows), 3, 2), (0, 2)
    return rows, (0,)


def expect(specimen: Specimen, module: nn.Module, g: Tensor, x: Tensor, mask: Tensor, given: tuple | None = None):
    """y, dx, dgamma and dbeta by the reference on the real positions alone."""
    keep = mask.numpy()
    gamma, beta = (p.reshape(-1) for p in specimen.affine(module))
    like, options = wide(x), specimen.options(module, given)
    ys, dxs, dgammas, dbetas = [], [], [], []
    for rows, grads in zip(split_rows(specimen, like, keep), split_rows(specimen, wide(g), keep), strict=True):
        shaped, axes = shape_rows(specimen, rows)
        scale, shift = (p.reshape(1, *shaped.shape[1:]) for p in (gamma, beta))
        if not len(rows):
            ys.append(rows), dxs.append(rows)
            continue
        ys.append(reference.forward(shaped, axes, scale, shift, **options).reshape(rows.shape))
        dx, dgamma, dbeta = reference.gradients(grads.reshape(shaped.shape), shaped, axes, scale, **options)
        dxs.append(dx.reshape(rows.shape)), dgammas.append(dgamma), dbetas.append(dbeta)
    shape = tuple(module.weight.shape)
    return (
        join_rows(specimen, ys, like, keep),
        join_rows(specimen, dxs, like, keep),
        np.sum(dgammas, axis=0).reshape(shape),
        np.sum(dbetas, axis=0).reshape(shape),
    )


def check(specimen: Specimen, module: nn.Module, layout: str, dtype: torch.dtype, form: str, given=None) -> None:
    mask, arguments = draw_mask(find_positions(specimen), form)
    x = spoil(draw(specimen, layout, dtype), mask, specimen)
    g = spoil(draw(specimen, "contiguous", dtype, seed=1) - 3, mask, specimen)
    leaf = x.detach().requires_grad_()
    parameters = [p for p in (module.weight, getattr(module, "bias", None)) if p is not None]
    y = module(leaf, **arguments)
    assert y.shape == x.shape
    assert y.dtype == dtype
    found = torch.autograd.grad(y, [leaf, *parameters], g)
    true_y, *true = expect(specimen, module, g, x, mask, given)
    stats = float(torch.nan_to_num(g.double(), 0.0, 0.0, 0.0).abs().max())
    rstd = 1 / module.eps**0.5 if module.eps else 1.0  # of a sample with one real position
    gamma = float(specimen.affine(module)[0].max())
    factor = 4 if dtype == torch.float32 else 64
    assert_close(y, true_y, factor, "y", float(np.abs(true_y).max()))
    terms = (abs(gamma) * rstd * stats if form != "holes" else 0.0, stats * 6, stats)
    for name, got, want, term in zip(("dx", "dgamma", "dbeta"), found, true, terms, strict=False):
        assert_close(got, want, factor, name, term)


def allowed(specimen: Specimen, form: str) -> bool:
    """Lengths need one axis of positions."""
    return form != "lengths" or len(find_positions(specimen)) == 2


CASES = [(s, form) for s in POSITIONED for form in FORMS if allowed(s, form)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("specimen", "form"), CASES, ids=lambda c: str(c).replace(" ", "_"))
def test_training(specimen, form, layout, dtype):
    check(
        specimen, specimen.make(dtype=torch.float64 if dtype == torch.float64 else torch.float32), layout, dtype, form
    )


@pytest.mark.parametrize("form", ["prefix", "holes"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("specimen", [s for s in TRACKING if s.spatial], ids=str)
def test_evaluation(specimen, layout, form):
    options = {"track_running_stats": True}
    module = specimen.make(**options).eval()
    mean, var = (wide(t).reshape(1, -1) for t in (module.running_mean, module.running_var))
    check(specimen, module, layout, torch.float32, form, given=(mean, var))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("form", ["prefix", "holes", "empty sample"])
@pytest.mark.parametrize("specimen", [s for s in TRACKING if s.spatial], ids=str)
def test_running_averages_move_by_real_positions_alone(specimen, form, momentum):
    if momentum is None and specimen.scheme == "instance":
        momentum = 0.3  # torch's instance norm has no cumulative average
    module = specimen.make(track_running_stats=True, momentum=momentum)
    before = [wide(t).copy() for t in (module.running_mean, module.running_var)]
    mask, arguments = draw_mask(find_positions(specimen), form)
    x = spoil(draw(specimen, "contiguous", torch.float32), mask, specimen)
    module(x, **arguments)
    means, variances = [], []
    for rows in split_rows(specimen, wide(x), mask.numpy()):
        if len(rows):
            means.append(rows.mean(0))
            variances.append(((rows - rows.mean(0)) ** 2).sum(0) / max(len(rows) - 1, 1))
    weight = 1.0 if momentum is None else momentum
    for got, old, new in zip(
        (module.running_mean, module.running_var), before, (np.mean(means, 0), np.mean(variances, 0)), strict=True
    ):
        assert_close(got, old * (1 - weight) + new * weight, 4, "running")
    assert int(module.num_batches_tracked) == (1 if specimen.scheme == "batch" else 0)


@pytest.mark.parametrize("kind", ["BatchNorm1d", "InstanceNorm1d"])
def test_a_batch_of_padding_changes_nothing(kind):
    module = getattr(anynorm, kind)(3, track_running_stats=True)
    state = {name: t.clone() for name, t in module.state_dict().items()}
    x = torch.full((2, 3, 4), float("nan"), requires_grad=True)
    y = module(x, lengths=[0, 0])
    assert torch.equal(y, torch.zeros(2, 3, 4))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 3, 4))
    assert all(torch.equal(t, state[name]) for name, t in module.state_dict().items())


def test_the_toy_of_a_mask_that_was_ignored():
    """tensorflow#30161: 2 and 4 beside two padded zeros have the mean 3.0; Keras once said 1.5."""
    x = torch.tensor([[[2.0, 4.0, 0.0, 0.0]]])
    counted, ignored = anynorm.BatchNorm1d(1, momentum=1.0), anynorm.BatchNorm1d(1, momentum=1.0)
    counted(x, lengths=[2])
    ignored(x)
    assert (counted.running_mean.item(), ignored.running_mean.item()) == (3.0, 1.5)
    assert counted.running_var.item() == 2.0
