"""Ghost batch norm: against the reference ghost by ghost, and against torch called on one ghost after the other."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import anynorm
from anynorm import reference
from anynorm.engine import paths
from specimens import LAYOUTS, assert_close, lay_out, wide

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = {"GhostBatchNorm1d": (9, 6), "GhostBatchNorm2d": (9, 6, 3, 2), "GhostBatchNorm3d": (9, 6, 2, 3, 2)}
GHOST = 4  # of 9: two full ones and one more sample, which in (9, 6) joins the second


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def make(kind: str = "GhostBatchNorm2d", ghost_size: int = GHOST, dtype=torch.float32, **options) -> nn.Module:
    norm = getattr(anynorm, kind)(6, ghost_size=ghost_size, dtype=dtype, **options)
    if norm.weight is not None:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return norm


def torchs(norm: nn.Module, **options) -> nn.Module:
    """torch's batch norm with the same state."""
    dims = type(norm).__name__[-2]
    twin = getattr(nn, f"BatchNorm{dims}d")(
        6, momentum=norm.momentum, affine=norm.affine, dtype=norm.running_mean.dtype, **options
    )
    twin.load_state_dict(norm.state_dict(), strict=True)
    return twin


def split(x: Tensor, size: int = GHOST) -> list[Tensor]:
    parts = list(x.split(size))
    if parts[-1][:, 0].numel() == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def step(norm, x: Tensor, g: Tensor) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y = norm(leaf)
    return [y, *torch.autograd.grad(y, [leaf, *norm.parameters()], g)]


def loop(norm: nn.Module):
    """torch's norm on one ghost after the other."""
    return lambda x: torch.cat([norm(part) for part in split(x)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", SHAPES)
def test_equals_the_reference_of_each_ghost(kind, layout, dtype):
    """Forward, dx, dgamma and dbeta; 4 or 64 eps of the largest value or term."""
    norm, x = make(kind, dtype=dtype), lay_out(SHAPES[kind], layout, dtype)
    g = torch.randn(x.shape).to(dtype)
    found = step(norm, x, g)
    axes = (0, *range(2, x.dim()))
    gamma, beta = (wide(p).reshape(1, -1, *[1] * (x.dim() - 2)) for p in (norm.weight, norm.bias))
    true = [[], [], 0.0, 0.0]
    for part, grad in zip(split(x), split(g), strict=True):
        true[0].append(torch.from_numpy(reference.forward(wide(part), axes, gamma, beta)))
        dx, dgamma, dbeta = reference.gradients(wide(grad), wide(part), axes, gamma)
        true[1].append(torch.from_numpy(dx))
        true[2], true[3] = true[2] + dgamma.reshape(-1), true[3] + dbeta.reshape(-1)
    factor, largest = 4 if dtype == torch.float32 else 64, 10 * float(g.double().abs().max())
    for got, want, name in zip(found, true, ("y", "dx", "dgamma", "dbeta"), strict=True):
        want = torch.cat(want).numpy() if isinstance(want, list) else want
        assert_close(got, want, factor, name, largest)
    assert found[0].is_contiguous() == (layout != "channels_last" or x.dim() < 4)
    assert found[0].dtype == dtype


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", SHAPES)
def test_equals_a_loop_of_torch_over_the_ghosts(kind, layout, momentum):
    """Outputs, gradients, running averages and the counter, over several batches; then evaluation."""
    norm = make(kind, momentum=momentum)
    theirs = torchs(norm)
    for seed in range(3):
        x, g = lay_out(SHAPES[kind], layout, seed=seed), torch.randn(SHAPES[kind])
        for mine, its in zip(step(norm, x, g), step_of_loop(theirs, x, g), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)
        for mine, its in zip(norm.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
    assert norm.num_batches_tracked == 3 * len(split(x))
    x = lay_out(SHAPES[kind], layout, seed=9)
    torch.testing.assert_close(norm.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def step_of_loop(norm: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y = loop(norm)(leaf)
    return [y, *torch.autograd.grad(y, [leaf, *norm.parameters()], g)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("positions", [(), (3,)])
def test_batches_that_the_size_does_not_divide(n, positions):
    """Equals torch (tabnet#243): short last ghosts, batches smaller than a ghost, one value per channel left over."""
    x = torch.randn(n, 6, *positions)
    norm = make("GhostBatchNorm1d", 3)
    theirs = torchs(norm)
    if x[:, 0].numel() == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm(x)
        return
    parts = split(x, 3) if n > 1 else [x]
    torch.testing.assert_close(norm(x), torch.cat([theirs(part) for part in parts]), rtol=1e-5, atol=1e-5)
    assert norm.num_batches_tracked == len(parts)


def test_evaluation_is_batch_norm():
    """keras#15790, tabnet#243: ghosts were cut at inference too, so that outputs depended on batch mates."""
    norm, x = make(), torch.randn(9, 6, 3, 2)
    norm(x), norm.eval()
    batch = anynorm.BatchNorm2d(6).eval()
    batch.load_state_dict(norm.state_dict(), strict=True)
    assert torch.equal(norm(x), batch(x))
    assert torch.equal(norm(x)[:1], norm(x[:1]))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_mask_is_each_ghosts_own(layout, momentum):
    """Equals our batch norm of one ghost after the other; a ghost of padding moves nothing."""
    norm = make(momentum=momentum)
    batch = anynorm.BatchNorm2d(6, momentum=momentum)
    batch.load_state_dict(norm.state_dict())
    x = lay_out((11, 6, 3, 2), layout)
    mask = torch.rand(11, 3, 2) < 0.6
    mask[:, 0, 0] = True
    mask[4:8] = False
    y = norm(x, mask=mask)
    want = torch.cat([batch(part, mask=m) for part, m in zip(x.split(GHOST), mask.split(GHOST), strict=True)])
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert not y.movedim(1, -1)[~mask].any()
    for mine, its in zip(norm.buffers(), batch.buffers(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-6)
    assert norm.num_batches_tracked == 2


def test_lengths_and_gradients_at_padding():
    """Keeps an invariant: padding, NaN included, neither enters nor receives a gradient."""
    norm, lengths = make("GhostBatchNorm1d"), torch.tensor([5, 2, 3, 1, 4, 2, 5])
    x = torch.randn(7, 6, 5)
    real = anynorm.mask_of(lengths, 5)
    holes = x.masked_fill(~real[:, None], float("nan")).requires_grad_()
    y = norm(holes, lengths=lengths)
    torch.testing.assert_close(y, copy.deepcopy(norm)(x, mask=real), rtol=0, atol=0)
    y.square().sum().backward()
    assert not holes.grad.mT[~real].any() and holes.grad.mT[real].any()


NORMS = {
    "batch": lambda: anynorm.BatchNorm1d(6),
    "ghost": lambda: anynorm.GhostBatchNorm1d(6, ghost_size=2),
    "renorm": lambda: anynorm.BatchRenorm1d(6, warmup=(0, 0, 0)),
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_batch_of_padding_moves_no_average(norm):
    """Keras moves them to 0 (tensorflow#30161 and after)."""
    layer = NORMS[norm]()
    layer(torch.randn(5, 6, 4))
    before = copy.deepcopy(list(layer.buffers()))
    y = layer(torch.full((5, 6, 4), float("inf")), lengths=[0, 0, 0, 0, 0])
    assert not y.any()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))


@pytest.mark.parametrize("on_single", ["running", "skip"])
def test_one_real_position_in_a_ghost(on_single):
    """Equals batch norm with the same choice, called on that ghost."""
    norm = make("GhostBatchNorm1d", 2, on_single=on_single)
    batch = anynorm.BatchNorm1d(6, on_single=on_single)
    batch.load_state_dict(norm.state_dict())
    x, lengths = torch.randn(5, 6, 3), torch.tensor([3, 2, 1, 0, 2])
    first = batch(x[2:4], lengths=lengths[2:4])  # by the averages before this batch
    y = norm(x, lengths=lengths)
    want = [batch(x[:2], lengths=lengths[:2]), first, batch(x[4:], lengths=lengths[4:])]
    torch.testing.assert_close(y, torch.cat(want), rtol=1e-5, atol=1e-5)
    for mine, its in zip(norm.buffers(), batch.buffers(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"more than 1 real position in a ghost.*got 1 in ghost 1.*on_single='running'"
    ):
        make("GhostBatchNorm1d", 2)(x, lengths=lengths)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x: make(ghost_size=0), ValueError, "GhostBatchNorm2d: ghost_size must be a whole number of 1 or more"),
        (lambda x: make(ghost_size=2.0), ValueError, "got 2.0; pass how many samples share statistics"),
        (lambda x: make("GhostBatchNorm1d", 1)(x[..., 0, 0]), ValueError, "more than 1 value per channel of a ghost"),
        (lambda x: make()(x[:, :5]), RuntimeError, "ghost_batch_norm: .* must have one element per channel"),
        (lambda x: make()(x[..., 0]), ValueError, "expected 4D input"),
        (lambda x: make()(x.long()), NotImplementedError, "ghost_batch_norm: input must be float16, bfloat16"),
        (lambda x: make(on_single="no"), ValueError, "on_single must be one of error, running, skip"),
    ],
)
def test_errors(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(torch.randn(9, 6, 3, 2))


def test_ragged_input_is_refused_in_training_only():
    norm = make("GhostBatchNorm1d")
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 6), torch.randn(2, 6)])
    with pytest.raises(ValueError, match="ghosts are cut from an axis of samples; got a jagged or packed input"):
        norm(packed)
    assert norm.eval()(packed).data.shape == (5, 6)


def test_a_refused_batch_changes_nothing():
    """on_nonfinite is about the whole batch, an error about every buffer."""
    norm = make(on_nonfinite="error")
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(9, 6, 3, 2)
    x[5] = float("inf")
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        norm(x)
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def test_update_once_counts_one_batch():
    norm, x = make(), torch.randn(9, 6, 3, 2)
    with anynorm.update_once():
        norm(x), norm(x)
    assert norm.num_batches_tracked == 3  # the ghosts of one batch


def test_it_is_torchs_batch_norm_in_state_and_class():
    norm = make()
    assert isinstance(norm, nn.BatchNorm2d)
    nn.BatchNorm2d(6).load_state_dict(norm.state_dict(), strict=True)
    norm.load_state_dict(nn.BatchNorm2d(6).state_dict(), strict=True)
    assert repr(norm) == repr(nn.BatchNorm2d(6)).replace("Batch", "GhostBatch")[:-1] + ", ghost_size=4)"
    parameters = inspect.signature(anynorm.GhostBatchNorm2d).parameters
    assert parameters["ghost_size"].default is inspect.Parameter.empty
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        x = torch.randn(9, 6, 3, 2)
        assert torch.equal(twin(x), copy.deepcopy(norm)(x))
    report = anynorm.sync(nn.Sequential(norm))
    assert [entry.reason for entry in report.left] == [
        "its statistics are its own, or a subclass may have code of its own"
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_with_half_input(dtype):
    norm, x = make(), torch.randn(9, 6, 3, 2)
    y = norm(x.to(dtype))
    assert y.dtype == dtype and norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(y.float(), make_like(norm)(x.to(dtype).float()), rtol=0.01, atol=0.01)


def make_like(norm: nn.Module) -> nn.Module:
    twin = make()
    twin.load_state_dict(norm.state_dict())
    return twin


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_follows(layout):
    """The fused twin equals norm, sum and activation, at padding too."""
    plain = make()
    fused = anynorm.GhostBatchNormAct2d(6, ghost_size=GHOST, activation="silu")
    fused.load_state_dict(plain.state_dict())
    x, residual = lay_out((9, 6, 3, 2), layout), torch.randn(9, 6, 3, 2)
    torch.testing.assert_close(fused(x, residual), nn.functional.silu(plain(x) + residual), rtol=1e-5, atol=1e-5)
    mask = torch.rand(9, 3, 2) < 0.8
    torch.testing.assert_close(
        fused(x, residual, mask=mask),
        nn.functional.silu(plain(x, mask=mask) + residual) * mask[:, None],
        rtol=1e-5,
        atol=1e-5,
    )
    assert list(fused.state_dict()) == list(nn.BatchNorm2d(6).state_dict())


def test_all_full_ghosts_are_one_call(monkeypatch):
    """Keeps an invariant: the number of calls does not grow with the number of ghosts."""
    calls = []
    original = paths.normalize
    monkeypatch.setattr(paths, "normalize", lambda *a, **k: calls.append(1) or original(*a, **k))
    for n in (8, 64):
        make(ghost_size=2)(torch.randn(n, 6, 3, 2))
        make(ghost_size=3)(torch.randn(n, 6, 3, 2))
    assert len(calls) == 2 * (1 + 2)
