"""A mask in the compiled kernels: padding enters nothing, and its size changes no bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anynorm.engine import kernels
from anynorm.engine.walks import Layout
from specimens import assert_close, wide

pytestmark = pytest.mark.skipif(bool(kernels.OFF), reason=f"kernels are off: {kernels.OFF}")


def run(layout: Layout, x: Tensor, g: Tensor, mask: Tensor, gamma: Tensor, beta: Tensor, activation: int = 0):
    """y, dx, dgamma, dbeta, mean and m2."""
    plan = kernels.compiled.Plan(**layout._asdict())
    pools = layout.g if layout.pool_n else layout.n * layout.g
    y, dx, dgamma, dbeta = torch.empty_like(x), torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(beta)
    mean, m2 = torch.empty(pools, dtype=torch.float64), torch.empty(pools, dtype=torch.float64)
    read = {"x": x, "gamma": gamma, "beta": beta, "mask": mask, "mean": mean, "m2": m2}
    options = {"threads": 2, "eps": 1e-5, "activation": activation}
    options |= {name: t.data_ptr() for name, t in read.items()}
    kernels.compiled.forward(plan, y=y.data_ptr(), **options)
    results = {"dx": dx, "dgamma": dgamma, "dbeta": dbeta}
    kernels.compiled.backward(plan, grad=g.data_ptr(), **{k: t.data_ptr() for k, t in results.items()}, **options)
    return y, dx, dgamma, dbeta, mean, m2


CASES = {
    "batch, rows": Layout(3, 4, 1, 70, False, True, True, 0, 0, 0),
    "batch, columns": Layout(3 * 70, 4, 1, 1, False, True, True, 0, 0, 70),
    "instance, rows": Layout(3, 4, 1, 70, False, False, True, 0, 0, 0),
    "instance, columns": Layout(3, 4, 1, 70, True, False, True, 0, 0, 0),
    "group, rows": Layout(3, 2, 2, 70, False, False, True, 0, 0, 0),
    "group, columns": Layout(3, 2, 2, 70, True, False, True, 0, 0, 0),
    "layer": Layout(3 * 70, 1, 4, 1, False, False, True, 0, 0, 0),
}


def run_padded(name: str, padding: int, activation: int = 0):
    """A case's results when the samples, 70, 33 and 1 long, are padded by NaN; positions first, as (n, s, c)."""
    layout = CASES[name]
    generator = torch.Generator().manual_seed(3)
    x, g = (torch.randn(3, 70, 4, generator=generator) + 3 for _ in range(2))
    gamma, beta = (torch.randn(4, generator=generator) for _ in range(2))
    lengths = torch.tensor([70, 33, 1])
    length = 70 + padding
    mask = (torch.arange(length) < lengths[:, None]).float()
    x, g = (
        torch.nn.functional.pad(t, (0, 0, 0, padding)).masked_fill(mask[..., None] == 0, float("nan")) for t in (x, g)
    )
    n, s = (length if size == 70 else 3 * length if size == 210 else size for size in (layout.n, layout.s))
    padded = layout._replace(n=n, s=s, sample_rows=length if layout.sample_rows else 0)
    is_last = layout.channels_last or "columns" in name or name == "layer"
    lay = (lambda t: t.contiguous()) if is_last else (lambda t: t.movedim(1, 2).contiguous())
    back = (lambda t: t) if is_last else (lambda t: t.movedim(2, 1))
    y, dx, *rest = run(padded, lay(x), lay(g), mask, gamma, beta, activation)
    return back(y), back(dx), rest, (x, g, gamma, beta, mask)


@pytest.mark.parametrize("activation", [0, 1, 4], ids=["", "relu", "gelu"])
@pytest.mark.parametrize("name", CASES)
def test_masked_positions_do_not_count(name, activation):
    """Equals the formula over the real positions alone; NaN in the padding does not leak, its outputs are 0."""
    y, dx, (dgamma, dbeta, *_), (x, g, gamma, beta, mask) = run_padded(name, 0, activation)
    kept = mask[..., None] > 0
    leaf, scale, shift = (t.double().requires_grad_() for t in (torch.where(kept, x, 0), gamma, beta))
    view, keep = leaf.view(3, 70, 2, 2), kept.double().view(3, 70, 1, 1)
    axes, size = {"b": ((0, 1), 1), "i": ((1,), 1), "g": ((1, 3), 2), "l": ((2, 3), 4)}[name[0]]
    along = tuple(a for a in axes if a < 2)
    count = ((keep.sum(along, keepdim=True) if along else keep) * size).clamp(min=1)
    mean = (view * keep).sum(axes, keepdim=True) / count
    var = ((view - mean).square() * keep).sum(axes, keepdim=True) / count
    true = ((view - mean) / (var + 1e-5).sqrt()).reshape(3, 70, 4) * scale + shift
    true = (true, torch.relu(true), None, None, torch.nn.functional.gelu(true))[activation] * kept
    want = torch.autograd.grad(true, (leaf, scale, shift), torch.where(kept, g, 0).double())
    assert (y[~kept.expand_as(y)] == 0).all()
    assert (dx[~kept.expand_as(dx)] == 0).all()
    assert_close(y, wide(true), 8, "y", 4.0)
    term = float(g.nan_to_num().abs().max() * gamma.abs().max()) * float((1 / (var + 1e-5).sqrt()).max().detach()) * 4
    for what, got, its in zip(("dx", "dgamma", "dbeta"), (dx, dgamma, dbeta), want, strict=True):
        assert_close(got, wide(its), 8, what, term)


@pytest.mark.parametrize("name", CASES)
def test_more_padding_changes_no_bit(name):
    short, long = run_padded(name, 0), run_padded(name, 4000)
    for mine, its in zip(short[:2], long[:2], strict=True):
        assert torch.equal(mine, its[:, :70])
    if name != "layer":  # whose gradients of gamma and beta are summed in chunks of rows, padded or not
        assert torch.equal(short[2][0], long[2][0])
        assert torch.equal(short[2][1], long[2][1])


def test_where_nothing_counts_nothing_changes():
    x, mask = torch.randn(2, 3, 40), torch.zeros(2, 40)
    running_mean, running_var = torch.randn(3), torch.rand(3)
    before = running_mean.clone(), running_var.clone()
    y, mean, m2 = torch.empty_like(x), torch.empty(3, dtype=torch.float64), torch.empty(3, dtype=torch.float64)
    tensors = {"x": x, "y": y, "mean": mean, "m2": m2, "mask": mask}
    tensors |= {"running_mean": running_mean, "running_var": running_var}
    plan = kernels.compiled.Plan(**Layout(2, 3, 1, 40, False, True, True, 0, 0, 0)._asdict())
    addresses = {name: t.data_ptr() for name, t in tensors.items()}
    kernels.compiled.forward(plan, threads=1, eps=1e-5, momentum=0.1, **addresses)
    assert (y == 0).all()
    assert torch.equal(running_mean, before[0])
    assert torch.equal(running_var, before[1])
