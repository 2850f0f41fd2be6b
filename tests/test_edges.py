"""Where numbers end and batches are empty: far tails, Inf and NaN in evaluation, constants, padding alone."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap

import anynorm
from anynorm import accumulate, functional
from anynorm.engine import kernels
from fused_specimens import TORCHS, apply_torch

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# ---- activations -----------------------------------------------------------------------------------------------------

TAILS = [-INF, -3.4e38, -1e37, -1e30, -1e4, -104, -89, -60, 60, 89, 1e4, 1e30, 1e37, 3.4e38, INF, NAN, 0.5, -0.5]
TAILS += [0.0, -0.0, 3, -3, 6, 1e-40, -1e-40]  # kinks
# Without kernels torch's own functions follow, in x's precision: two overflow, and the place decides of these at NaN.
OVERFLOWING = ("gelu_tanh", "hardswish") if kernels.OFF else ()
PLACED = ("relu6", "hardswish", "elu", "elu(0.5)") if kernels.OFF else ()


@pytest.mark.parametrize("as_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("shape", [(-1, 1), (1, 1, -1)], ids=["columns", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", TORCHS)
def test_far_tails_are_torchs(activation, dtype, shape, as_residual):
    """*Equals torch* wherever a value is: exp ends at 88, and what is times 1e38 must have ended at 0 exactly."""
    far = 1e100 if activation == "gelu_tanh" else 1e300  # torch makes NaN of a square that overflows
    values = TAILS + ([-far, far, -709.5, 709.5] if dtype == torch.float64 else [])
    x = torch.tensor(values, dtype=dtype).view(shape)
    norm = anynorm.BatchNormAct1d(1, activation=activation, eps=1e-20, dtype=dtype).eval()  # the identity here
    if activation in OVERFLOWING:
        x = x[(x.abs() < 1e19) | x.isinf()].view(shape)
    if activation in PLACED:
        x = x[~x.isnan()].view(shape)
    if as_residual:
        x = x[x.abs() < 3e38].view(shape)  # Inf + Inf is another question
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    y = norm(torch.zeros_like(x), residual=leaf) if as_residual else norm(leaf)
    z = apply_torch(activation, wide)
    assert_alike(y, z)
    assert_alike(torch.autograd.grad(y.sum(), leaf)[0], torch.autograd.grad(z.sum(), wide)[0])


def assert_alike(got: Tensor, want: Tensor) -> None:
    """To a rounding of the largest value and of each, NaN where NaN is."""
    eps = torch.finfo(got.dtype).eps
    least = max(1e-36, float(torch.finfo(got.dtype).smallest_normal))
    torch.testing.assert_close(got, want.to(got.dtype), rtol=4 * eps, atol=max(least, 4 * eps), equal_nan=True)


@pytest.mark.parametrize("layout", ["rows", "columns", "last"])
@pytest.mark.parametrize("form", [None, "prefix", "holes"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [*TORCHS, None])
def test_infinite_inputs_in_evaluation(activation, with_residual, form, layout):
    """*Equals torch*: the gradient is finite where torch's norm, then its activation, has a finite one."""
    torch.manual_seed(0)
    shape = (40, 3) if layout == "columns" else (2, 3, 4, 10)
    x, g, residual = (torch.randn(shape) for _ in range(3))
    for t, spots in ((x, (INF, -INF, NAN)), (g, (INF, 0.0))):
        for i, spot in enumerate(spots):
            t.view(-1)[torch.randperm(t.numel())[i::7]] = spot
    mask = torch.ones([size for axis, size in enumerate(shape) if axis != 1], dtype=torch.bool)
    if form == "prefix":
        mask[..., -1] = False
    elif form == "holes":
        mask = torch.rand(mask.shape) < 0.6
    if layout == "last":
        x, g, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, g, residual))
    if layout == "columns" and form == "prefix":
        mask = torch.arange(40) < 33
    real = mask.unsqueeze(1)
    mean, var, gamma, beta = torch.randn(3), torch.rand(3) + 0.5, torch.randn(3), torch.randn(3)
    leaves, theirs = ([t.clone().requires_grad_() for t in (x, residual)] for _ in range(2))
    options = {"activation": activation, "mask": None if form is None else mask}
    y = functional.batch_norm(
        leaves[0], mean, var, gamma, beta, residual=leaves[1] if with_residual else None, **options
    )
    z = F.batch_norm(theirs[0], mean, var, gamma, beta)
    z = z + theirs[1] if with_residual else z
    z = apply_torch(activation, z)
    inputs = 2 if with_residual else 1
    got = torch.autograd.grad(y, leaves[:inputs], g)
    want = torch.autograd.grad(z, theirs[:inputs], g)
    for a, b in zip((y, *got), (z, *want), strict=True):
        if activation in PLACED and a is not y:
            a, b = a.where(~z.isnan(), 0), b.where(~z.isnan(), 0)
        b = b if form is None else torch.where(real, b, 0)
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: anynorm.BatchNorm1d(3),
        lambda: anynorm.LayerNorm(3),
        lambda: anynorm.RMSNorm(3),
        lambda: anynorm.GroupNorm(1, 3),
        lambda: anynorm.LayerNormAct(3, activation="silu"),
    ],
    ids=["batch", "layer", "rms", "group", "fused"],
)
def test_an_eps_of_infinity_makes_beta_of_all(make):
    x, norm = torch.randn(8, 3, requires_grad=True), make()
    norm.eps = INF
    y = norm(x)
    assert not y.any()
    assert not torch.autograd.grad(y.sum() + (y * x.detach()).sum(), x)[0].any()


def test_sums_that_cancel_before_an_activation():
    """*Equals the reference*: to 4 roundings of the largest term that is summed, gamma * xhat or beta."""
    torch.manual_seed(0)
    x = torch.randn(64, 3, 5, 5)
    gamma, beta = torch.tensor([1000.0, -300.0, 5.0]), torch.tensor([-1000.0, 300.0, -5.0])
    xhat = (x.double() - x.double().mean((0, 2, 3), keepdim=True)) / (
        x.double().var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    terms = (xhat * gamma.view(3, 1, 1)).abs() + beta.abs().view(3, 1, 1)
    want = F.silu(xhat * gamma.view(3, 1, 1) + beta.view(3, 1, 1))
    for t in (x, x.contiguous(memory_format=torch.channels_last)):
        y = functional.batch_norm(t, None, None, gamma, beta, training=True, activation="silu")
        assert float(((y.double() - want).abs() / terms).max()) < 4 * 2**-23


# ---- constants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [2, 3, 5, 7, 11, 13, 25, 49])
@pytest.mark.parametrize("value", [0.1, 1e5, 1e30])
def test_a_constant_gives_beta_exactly(value, count, dtype):
    """*Keeps an invariant*: on every path, for any number of real positions."""
    x, beta = torch.full((2, 2, 64), value, dtype=dtype), torch.tensor([0.25, -3.0], dtype=dtype)
    mask = anynorm.mask_of([count, 1], 64)
    norms = {
        "batch": lambda t: functional.batch_norm(t, None, None, None, beta, training=True, mask=mask),
        "instance": lambda t: functional.instance_norm(t, bias=beta, mask=mask),
        "group": lambda t: functional.group_norm(t, 1, None, beta, mask=mask),
        "layer": lambda t: functional.layer_norm(t.mT, (2,), None, beta, mask=mask).mT,
    }
    want = torch.where(mask.unsqueeze(1), beta.view(2, 1), 0).expand(2, 2, 64)
    for name, norm in norms.items():
        assert torch.equal(norm(x), want), name
        assert torch.equal(norm(x[..., None].to(memory_format=torch.channels_last).squeeze(3)), want), name
        assert torch.equal(jvp(norm, (x,), (torch.ones_like(x),))[0], want), name
        assert torch.equal(vmap(norm)(x.expand(2, *x.shape))[1], want), name
    jagged = torch.nested.nested_tensor([x[0, :, :n].mT for n in (count, 1)], layout=torch.jagged)
    for found in (functional.instance_norm(jagged, bias=beta), functional.group_norm(jagged, 2, None, beta)):
        assert torch.equal(found.values(), beta.expand(count + 1, 2))


def test_a_constant_gives_beta_exactly_when_compiled_and_merged():
    norm, mask = anynorm.BatchNorm1d(2), anynorm.mask_of([49, 7], 64)
    compiled = torch.compile(norm, fullgraph=True)
    for value in (0.1, 1e30):
        assert not compiled(torch.full((2, 2, 64), value), mask=mask).any()
    outputs: list[Tensor] = []

    def loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
        outputs.append(model(batch).detach())
        return model.weight.sum()

    accumulate(norm, [torch.full((n, 2, 5), 0.1) for n in (1, 3, 7)], loss)
    assert outputs
    assert not any(y.any() for y in outputs[-3:])


# ---- padding alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_single", ["error", "running", "skip"])
@pytest.mark.parametrize(
    "kind", [anynorm.BatchNorm1d, anynorm.BatchNormAct1d, anynorm.BatchRenorm1d, anynorm.GhostBatchNorm1d]
)
def test_a_batch_of_one_sample_of_padding_gives_zeros(kind, on_single):
    options = {"ghost_size": 1} if kind is anynorm.GhostBatchNorm1d else {}
    norm = kind(4, on_single=on_single, **options)
    state = {name: t.clone() for name, t in norm.state_dict().items()}
    for shape in ((1, 4, 1), (1, 4, 2), (1, 4)):
        if kind is anynorm.GhostBatchNorm1d:
            shape = (2, *shape[1:])
        x = torch.full(shape, NAN, requires_grad=True)
        y = norm(x, mask=torch.zeros(shape[0], *shape[2:], dtype=torch.bool))
        assert not y.any()
        assert not torch.autograd.grad(y.sum(), x)[0].any()
    assert all(torch.equal(t, state[name]) for name, t in norm.state_dict().items())
    if on_single == "error" and not options:
        with pytest.raises(ValueError, match="statistics need more than 1"):
            norm(torch.randn(1, 4, 1), lengths=[1])


def test_one_step_gives_beta_as_one_step_padded_does():
    x, beta = torch.randn(3, 4, 1), torch.randn(4)
    for norm in (
        lambda t: functional.instance_norm(t, bias=beta, lengths=[1, 0, 1]),
        lambda t: functional.instance_norm(t, torch.zeros(4), torch.ones(4), bias=beta, lengths=[1, 0, 1]),
    ):
        one, padded = norm(x), norm(F.pad(x, (0, 1)))
        assert torch.equal(one, padded[..., :1])
        assert torch.equal(one, torch.stack([beta, torch.zeros(4), beta]).unsqueeze(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's group norm refuses one value, ours says that all is beta
        assert torch.equal(functional.group_norm(x[:1], 4, None, beta, lengths=[1])[0, :, 0], beta)


def test_ghosts_of_one_step_are_those_of_one_step_padded():
    """A last ghost of one real position joins the one before, whatever the padding."""
    x = torch.randn(5, 4, 1)
    norm = anynorm.GhostBatchNorm1d(4, ghost_size=2)
    one = norm(x, lengths=[1] * 5)
    assert torch.equal(one, norm(F.pad(x, (0, 3)), lengths=[1] * 5)[..., :1])
    assert norm.num_batches_tracked == 4


@pytest.mark.parametrize("form", ["jagged", "one empty", "packed"])
def test_ragged_batches_of_next_to_nothing(form):
    rows = {"jagged": [torch.randn(0, 4)] * 2, "one empty": [torch.randn(2, 4), torch.randn(0, 4)]}
    for norm in (
        anynorm.InstanceNorm1d(4, track_running_stats=True),
        anynorm.InstanceNormAct1d(4, activation="silu"),
        anynorm.GroupNorm(2, 4),
        anynorm.GroupNormAct(4, 4, activation="relu"),
    ):
        if form == "packed":
            y = norm(torch.nn.utils.rnn.pack_sequence([torch.randn(1, 4)])).data
            assert y.shape == (1, 4)
        else:
            y = norm(torch.nested.nested_tensor(rows[form], layout=torch.jagged)).values()
            assert y.shape == (sum(map(len, rows[form])), 4)
        assert not y.isnan().any()
