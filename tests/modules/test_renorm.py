"""Batch renormalization: against the formula written out in float64, and as batch norm where it must be."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import anynorm
from anynorm import functional
from specimens import assert_close, lay_out, wide

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = {"BatchRenorm1d": (7, 6, 5), "BatchRenorm2d": (5, 6, 3, 2), "BatchRenorm3d": (5, 6, 2, 3, 2)}
AT_ONCE = {"warmup": (0, 0, 0)}


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def make(kind: str = "BatchRenorm2d", trained: bool = True, dtype=torch.float32, **options) -> nn.Module:
    """A layer with random gamma and beta, and as `trained` with averages from elsewhere, some of them far away."""
    norm = getattr(anynorm, kind)(6, dtype=dtype, **{**AT_ONCE, **options})
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    if trained:
        state = norm.state_dict()
        state["running_mean"] = torch.tensor([3.0, 2.5, 3.5, 40.0, -40.0, 3.0]).to(dtype)
        state["running_var"] = torch.tensor([1.0, 0.5, 1.5, 2.0, 1.0, 90.0]).to(dtype)
        state["num_batches_tracked"] = torch.tensor(10_000)
        norm.load_state_dict(state)
    return norm


def write_out(norm: nn.Module, x: Tensor, leaves: list[Tensor], r_max=3.0, d_max=5.0, mask=None) -> Tensor:
    """Algorithm 1 in float64, by torch's operations."""
    (weight, bias), real = leaves, torch.ones_like(x[:, :1]) if mask is None else mask[:, None].to(x)
    axes, shape = (0, *range(2, x.dim())), (1, -1, *[1] * (x.dim() - 2))
    count = real.sum()
    mean = (x * real).sum(axes) / count
    var = ((x - mean.view(shape)).square() * real).sum(axes) / count
    sigma_batch, sigma = (var + norm.eps).sqrt(), (norm.running_var.double() + norm.eps).sqrt()
    with torch.no_grad():
        r = (sigma_batch / sigma).clamp(1 / r_max, r_max)
        d = ((mean - norm.running_mean.double()) / sigma).clamp(-d_max, d_max)
    xhat = (x - mean.view(shape)) / sigma_batch.view(shape)
    return ((xhat * r.view(shape) + d.view(shape)) * weight.view(shape) + bias.view(shape)) * real


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("kind", SHAPES)
def test_equals_the_formula_written_out(kind, layout, dtype):
    """y, dx, dgamma and dbeta against torch.autograd in float64, with r and d constant; some of both are clipped."""
    norm, x = make(kind, dtype=dtype), lay_out(SHAPES[kind], layout, dtype)
    g = torch.randn(x.shape).to(dtype)
    before = copy.deepcopy(norm)
    leaf = x.detach().requires_grad_()
    y = norm(leaf)
    found = [y, *torch.autograd.grad(y, [leaf, norm.weight, norm.bias], g)]
    leaves = [t.detach().double().requires_grad_() for t in (x, norm.weight, norm.bias)]
    want = write_out(before, leaves[0], leaves[1:])
    true = [want, *torch.autograd.grad(want, leaves, g.double())]
    factor = 16 if dtype == torch.float32 else 64
    for got, expected, name in zip(found, true, ("y", "dx", "dgamma", "dbeta"), strict=True):
        assert_close(got, wide(expected), factor, name, 30.0)
    assert y.dtype == dtype


def test_some_limits_clip_and_some_do_not():
    """The tests above see every branch."""
    norm, x = make(), lay_out(SHAPES["BatchRenorm2d"], "contiguous")
    moments = anynorm.engine.paths.find_moments(x, anynorm.FAMILY["renorm"].pool(x))
    averages = norm.running_mean, norm.running_var
    source = anynorm.sources.Renorm(*averages, 0.1, *averages, (3.0, 5.0))
    r, d = anynorm.sources.correct(moments, source, norm.eps)
    assert {float(r[5]), float(d[3]), float(d[4])} == {1 / 3, -5.0, 5.0}
    assert 0.3 < float(r[0]) < 3 and 0 < abs(float(d[0])) < 5


def test_where_nothing_is_clipped_training_is_evaluation():
    """Keeps the paper's invariant: y is what evaluation gives with the averages as they were."""
    norm = make(r_max=1e6, d_max=1e6)
    x = torch.randn(5, 6, 3, 2)
    want = copy.deepcopy(norm).eval()(x)
    torch.testing.assert_close(norm(x), want, rtol=1e-4, atol=1e-4)


def test_without_corrections_it_is_batch_norm():
    """Equals torch: outputs, gradients and buffers with r_max=1 and d_max=0, and within the warm-up."""
    for options in ({"r_max": 1.0, "d_max": 0.0}, {"warmup": (50, 90, 90)}, {"warmup": (2, 90, 90), "r_max": 1.0}):
        norm, theirs = make(trained=False, **options), nn.BatchNorm2d(6)
        theirs.load_state_dict(norm.state_dict(), strict=True)
        for _ in range(3):
            x = torch.randn(5, 6, 3, 2)
            torch.testing.assert_close(norm(x), theirs(x), rtol=1e-5, atol=1e-5)
        for mine, its in zip(norm.state_dict().values(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def test_evaluation_is_batch_norm():
    norm, x = make().eval(), torch.randn(5, 6, 3, 2)
    batch = anynorm.BatchNorm2d(6).eval()
    batch.load_state_dict(norm.state_dict(), strict=True)
    assert torch.equal(norm(x), batch(x))


@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
def test_the_start_of_the_averages_is_no_history(momentum):
    """r and d are those of the averages of what was seen, without mean 0 and variance 1, to the rounding of float32."""
    norm = make(trained=False, momentum=momentum, r_max=1e6, d_max=1e6)
    batches = [torch.randn(64, 6, 3, 2) * 5 + 100 for _ in range(4)]
    first = norm(batches[0])  # no history at all: batch norm
    torch.testing.assert_close(first.mean((0, 2, 3)), norm.bias, rtol=1e-4, atol=1e-4)
    for x in batches[1:-1]:
        norm(x)
    weights = torch.ones(3) if momentum is None else (1 - momentum) ** torch.tensor([2.0, 1.0, 0.0])
    weights = (weights / weights.sum()).double().view(-1, 1)
    seen = [torch.stack([f(x.double().transpose(0, 1).flatten(1)) for x in batches[:-1]]) for f in (mean_of, var_of)]
    mean, var = ((weights * values).sum(0) for values in seen)
    want = nn.functional.batch_norm(batches[-1].double(), mean, var, norm.weight.double(), norm.bias.double())
    torch.testing.assert_close(norm(batches[-1]).double(), want, rtol=2e-3, atol=2e-3)


def mean_of(t: Tensor) -> Tensor:
    return t.mean(1)


def var_of(t: Tensor) -> Tensor:
    return t.var(1)


def test_the_schedule():
    norm = anynorm.BatchRenorm1d(6)
    for batches, r_max, d_max in (
        (0, 1, 0),
        (5_000, 1, 0),
        (25_000, 1 + 2 * 20 / 35, 5),
        (40_000, 3, 5),
        (10**6, 3, 5),
    ):
        norm.batches.fill_(batches)
        assert [float(limit) for limit in norm.find_limits()] == pytest.approx([r_max, d_max])
    own = anynorm.BatchRenorm1d(6, warmup=lambda batches: (1 + batches, 2 * batches))
    own(torch.randn(4, 6)), own(torch.randn(4, 6))
    assert [float(limit) for limit in own.find_limits()] == [3, 4]


def test_state_dict_is_torchs_and_the_rest_is_saved_apart():
    net = nn.Sequential(nn.Linear(6, 6), make("BatchRenorm1d", trained=False, momentum=0.2))
    for _ in range(3):
        net(torch.randn(4, 6))
    norm = net[1]
    assert list(norm.state_dict()) == list(nn.BatchNorm1d(6).state_dict())
    nn.BatchNorm1d(6).load_state_dict(norm.state_dict(), strict=True)
    state = json.loads(json.dumps(anynorm.extra_state(net)))
    assert state == {"1": {"batches": 3, "start_share": pytest.approx(0.8**3)}}
    twin = nn.Sequential(nn.Linear(6, 6), make("BatchRenorm1d", trained=False, momentum=0.2))
    twin.load_state_dict(net.state_dict(), strict=True)
    assert anynorm.extra_state(twin) == {"1": pytest.approx(state["1"])}  # found from the counter
    norm.num_batches_tracked.zero_()  # as some tools do
    twin.load_state_dict(net.state_dict())
    assert anynorm.extra_state(twin)["1"] == {"batches": 0, "start_share": 0.0}
    anynorm.load_extra_state(twin, state)
    x = torch.randn(4, 6)
    assert torch.equal(twin(x), net(x))
    with pytest.raises(RuntimeError, match=r"got unknown \['0'\], missing \['1'\]"):
        anynorm.load_extra_state(twin, {"0": state["1"]})
    with pytest.raises(RuntimeError, match="extra state holds batches and start_share; got \\['step'\\]"):
        norm.load_extra_state({"step": 1})


@pytest.mark.parametrize(
    ("counter", "mean", "share"), [(0, 0.0, 1.0), (0, 2.0, 0.0), (1, 2.0, 0.9), (100_000, 2.0, 0.0)]
)
def test_a_batch_norms_checkpoint_is_history_in_full(counter, mean, share):
    """A trained one is not corrected, also where its counter says 0, as in checkpoints from Keras."""
    theirs = nn.BatchNorm2d(6)
    theirs.running_mean.fill_(mean)
    theirs.num_batches_tracked.fill_(counter)
    norm = make(trained=False)
    norm.load_state_dict(theirs.state_dict())
    assert norm.extra_state() == {"batches": counter, "start_share": pytest.approx(share)}
    bad = {**theirs.state_dict(), "running_var": -torch.ones(6)}
    with pytest.raises(RuntimeError, match="running_var must not be negative"):
        norm.load_state_dict(bad)
    assert norm.extra_state()["start_share"] == pytest.approx(share)
    norm.reset_running_stats()
    assert norm.extra_state() == {"batches": 0, "start_share": 1.0}


@pytest.mark.parametrize("form", ["mask", "lengths", "packed"])
def test_padding_does_not_count(form):
    """Equals the formula on the real positions."""
    norm, lengths = make("BatchRenorm1d"), torch.tensor([5, 4, 3, 2, 1])
    before, x = copy.deepcopy(norm), torch.randn(5, 6, 5) + 3
    mask = anynorm.mask_of(lengths, 5)
    want = write_out(before, x.double(), [norm.weight.double(), norm.bias.double()], mask=mask)
    if form == "packed":
        packed = nn.utils.rnn.pack_padded_sequence(x.mT, lengths, batch_first=True)
        y = nn.utils.rnn.pad_packed_sequence(norm(packed), batch_first=True)[0].mT
    else:
        y = norm(x, **{form: {"mask": mask, "lengths": lengths}[form]})
    torch.testing.assert_close(y.double(), want.detach(), rtol=1e-5, atol=1e-4)
    batch = anynorm.BatchNorm1d(6)
    batch.load_state_dict(before.state_dict())
    batch(x, mask=mask)
    torch.testing.assert_close(norm.running_var, batch.running_var)
    assert norm.num_batches_tracked == 10_001


def test_what_does_not_count_does_not_move_the_schedule():
    """Repeats within update_once, and batches that are refused."""
    norm, x = make(trained=False, on_nonfinite="skip"), torch.randn(5, 6, 3, 2)
    with anynorm.update_once():
        norm(x), norm(x)
    assert norm.extra_state() == {"batches": 1, "start_share": pytest.approx(0.9)}
    with pytest.warns(UserWarning, match="NaN or Inf"):
        norm(x / 0)
    assert norm.extra_state()["batches"] == 1 and norm.running_mean.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x: make(track_running_stats=False), ValueError, "BatchRenorm2d: r and d need running averages"),
        (lambda x: make(r_max=0.5), ValueError, "BatchRenorm2d: r_max must be 1 or more; got 0.5"),
        (lambda x: make(d_max=-1), ValueError, "d_max must be 0 or more"),
        (lambda x: make(warmup=(1, 2)), ValueError, "warmup must be .*got \\(1, 2\\); the paper's is"),
        (lambda x: functional.batch_renorm(x, None, None, training=True), RuntimeError, "training needs running stat"),
        (lambda x: make()(x[:, :5]), RuntimeError, "batch_renorm: .* must have one element per channel"),
        (lambda x: make()(x[:1, :, :1, :1]), ValueError, "more than 1 value per channel"),
        (lambda x: make()(x.long()), NotImplementedError, "batch_renorm: input must be float16"),
    ],
)
def test_errors(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(torch.randn(5, 6, 3, 2))


def test_one_value_per_channel_by_the_running_averages():
    norm, x = make(on_single="running"), torch.randn(1, 6, 1, 1)
    assert torch.equal(norm(x), copy.deepcopy(norm).eval()(x))


def test_it_is_torchs_batch_norm_in_class_and_signature():
    norm = make()
    assert isinstance(norm, nn.BatchNorm2d)
    names = list(inspect.signature(anynorm.BatchRenorm2d).parameters)
    assert names[-5:] == ["r_max", "d_max", "warmup", "on_single", "on_nonfinite"]
    assert "r_max=3.0, d_max=5.0, warmup=(0, 0, 0)" in repr(norm)
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    x = torch.randn(5, 6, 3, 2)
    twins = (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), torch.load(file, weights_only=False))
    want = copy.deepcopy(norm)(x)
    assert all(torch.equal(twin(x), want) for twin in twins)


def test_what_follows():
    """The fused twin has the schedule, too."""
    plain = make()
    fused = anynorm.BatchRenormAct2d(6, activation="gelu", **AT_ONCE)
    fused.load_state_dict(plain.state_dict())
    assert fused.extra_state() == plain.extra_state()
    x, residual = torch.randn(2, 5, 6, 3, 2)
    torch.testing.assert_close(fused(x, residual), nn.functional.gelu(plain(x) + residual), rtol=1e-5, atol=1e-5)
    assert fused.extra_state() == plain.extra_state()
    fused.reset_running_stats()
    assert fused.extra_state() == {"batches": 0, "start_share": 1.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_parameters_are_rounded_once(dtype):
    """Those through r and through d cancel: two roundings were many units in the last place."""
    x, g = torch.randn(64, 512).to(dtype), torch.randn(64, 512).to(dtype)
    found = []
    for kind in (dtype, torch.float32):
        weight, bias = (torch.full((512,), v, dtype=kind).requires_grad_() for v in (1.0, 0.5))
        averages = torch.full((512,), 0.5, dtype=kind), torch.ones(512, dtype=kind)
        y = functional.batch_renorm(x.to(kind), *averages, weight, bias, True)
        found.append(torch.autograd.grad(y, (weight, bias), g.to(kind)))
    for half, full in zip(*found, strict=True):
        assert ((half - full).abs() <= 1.01 * torch.finfo(dtype).eps * full.abs() + 1e-4).all()
