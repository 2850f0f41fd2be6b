"""adapt: statistics of test batches against NumPy float64, and that a model is afterwards what it was."""

import numpy as np
import pytest
import torch
import torch.nn as nn

import anynorm
from anynorm import reference
from specimens import wide
from surgery.recalibration_cases import draw, photograph

quiet = pytest.mark.filterwarnings("ignore:adapt")  # the batches here are small
SHAPES = {"1d": (6, 3), "1d long": (6, 3, 5), "2d": (4, 3, 5, 2), "3d": (2, 3, 4, 2, 3)}


def make_norm(shape: tuple[int, ...], room=anynorm, kind: str = "BatchNorm", **options):
    """A norm in evaluation whose averages and gamma say something."""
    norm = getattr(room, f"{kind}{max(len(shape) - 2, 1)}d")(shape[1], **options).eval()
    with torch.no_grad():
        norm.running_mean.copy_(draw(shape[1], seed=1, mean=2))
        norm.running_var.copy_(draw(shape[1], seed=2).abs() + 0.5)
        norm.weight.copy_(draw(shape[1], seed=3))
        norm.bias.copy_(draw(shape[1], seed=4))
    return norm


def find_blended(norm, x: torch.Tensor, prior: float, mask: np.ndarray | None = None) -> np.ndarray:
    """Schneider et al. 2020: both moments weighed by N / (N + n) and n / (N + n), n samples; float64."""
    values, spread = wide(x), (1, -1) + (1,) * (x.dim() - 2)
    counted = np.ones(values.shape, bool) if mask is None else np.broadcast_to(mask, values.shape)
    n = int(counted.reshape(len(values), -1).any(1).sum())
    channels = [values[:, c][counted[:, c]] for c in range(values.shape[1])]
    pairs = (
        (wide(norm.running_mean), [c.mean() for c in channels]),
        (wide(norm.running_var), [c.var() for c in channels]),
    )
    mean, var = (prior / (prior + n) * old + n / (prior + n) * np.array(new) for old, new in pairs)
    gamma, beta = (wide(t).reshape(spread) for t in (norm.weight, norm.bias))
    axes = (0, *range(2, x.dim()))
    given = mean.reshape(spread), var.reshape(spread)
    y = reference.forward(values, axes, gamma, beta, eps=norm.eps, given=given)
    return np.where(counted, y, 0)


def hold(y: torch.Tensor, true: np.ndarray, factor: float = 8) -> None:
    """To factor * eps of the largest value."""
    eps = torch.finfo(y.dtype).eps
    assert np.abs(wide(y) - true).max() <= factor * eps * np.abs(true).max()


@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prior", [0, 1, 16, 0.5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("room", [nn, anynorm], ids=["torch", "ours"])
def test_equals_the_reference(room, shape, prior, dtype):
    norm = make_norm(shape, room, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    x = draw(*shape, mean=3, std=2).to(dtype)
    true = find_blended(norm, x, prior)
    with anynorm.adapt(norm, prior=prior), torch.no_grad():
        hold(norm(x), true)
    with torch.no_grad():
        outside = norm(x)
    assert np.abs(wide(outside) - true).max() > 0.1


@quiet
@pytest.mark.parametrize("kind", ["BatchNorm", "GhostBatchNorm", "BatchRenorm", "BatchNormAct"])
@pytest.mark.parametrize("prior", [0, 16])
@pytest.mark.parametrize("training", [False, True])
def test_other_batch_norms_adapt_as_one_batch(kind, prior, training):
    """Equals the reference; in training nothing is counted either."""
    options = {"ghost_size": 2} if kind == "GhostBatchNorm" else {}
    norm = make_norm(SHAPES["2d"], kind=kind, **options).train(training)
    if kind == "BatchNormAct":
        norm.activation = "identity"
    x, before = draw(*SHAPES["2d"], mean=3), photograph(norm)
    with anynorm.adapt(norm, prior=prior):
        hold(norm(x), find_blended(norm, x, prior))
    assert photograph(norm) == before


@quiet
@pytest.mark.parametrize("prior", [0, 4])
def test_masks_count_what_is_real(prior):
    """Equals the reference, and what padding holds changes no bit; a sample of padding alone is none."""
    norm = make_norm((4, 3, 5))
    x, lengths = draw(4, 3, 5, mean=3), torch.tensor([5, 2, 0, 3])
    mask = anynorm.mask_of(lengths, 5)
    true = find_blended(norm, x, prior, mask[:, None].numpy())
    with anynorm.adapt(norm, prior=prior) as adaptation:
        hold(norm(x, mask=mask), true)
        hold(norm(x, lengths=lengths), true)
        with anynorm.masked(mask):
            y = norm(x)
            other = norm(torch.where(mask[:, None], x, 77.0))
    assert torch.equal(y, other)
    hold(y, true)
    assert [entry.name for entry in adaptation.report.changed] == [""]


@quiet
def test_masks_reach_torchs_norms_too():
    """masked refuses torch's norms, which cannot take a mask; within adapt they are ours."""
    norm, mask = make_norm((4, 3, 5), nn), anynorm.mask_of([5, 2, 1, 3], 5)
    x = draw(4, 3, 5)
    with anynorm.adapt(norm, prior=4), anynorm.masked(mask):
        hold(norm(x), find_blended(norm, x, 4, mask[:, None].numpy()))


@quiet
def test_ragged_input_counts_sequences():
    """Equals the reference on the rows, with as many samples as sequences."""
    norm, rows = make_norm((7, 3)), draw(7, 3, mean=3)
    jagged = torch.nested.nested_tensor_from_jagged(rows, torch.tensor([0, 5, 7]))
    packed = nn.utils.rnn.pack_sequence([rows[:5], rows[5:]])
    weight, mean, var = 4 / 6, rows.double().mean(0), rows.double().var(0, unbiased=False)
    given = [
        wide(weight * old + (1 - weight) * new)
        for old, new in zip((norm.running_mean, norm.running_var), (mean, var), strict=True)
    ]
    true = reference.forward(wide(rows), (0,), wide(norm.weight), wide(norm.bias), eps=norm.eps, given=tuple(given))
    with anynorm.adapt(norm, prior=4):
        hold(norm(jagged).values(), true)
        y = nn.utils.rnn.unpack_sequence(norm(packed))
    hold(torch.cat(y), true)


@quiet
def test_memory_formats_are_kept():
    norm, x = make_norm((4, 3, 5, 2)), draw(4, 3, 5, 2).to(memory_format=torch.channels_last)
    for prior in (0, 16):
        with anynorm.adapt(norm, prior=prior):
            assert norm(x).is_contiguous(memory_format=torch.channels_last)


@quiet
def test_gradients_are_those_of_the_statistics_that_were_taken():
    """Equals float64 differences: through the batch without a prior, through constants with one."""
    norm = make_norm((5, 3), dtype=torch.float64)
    x = draw(5, 3, dtype=torch.float64).requires_grad_()
    with anynorm.adapt(norm):
        torch.autograd.gradcheck(norm, x)
    with anynorm.adapt(norm, prior=3):
        (found,) = torch.autograd.grad(norm(x).sum(), x)
        weight = 3 / 8
        var = weight * norm.running_var + (1 - weight) * x.var(0, unbiased=False)
        torch.testing.assert_close(found, (norm.weight / (var + norm.eps).sqrt()).expand(5, 3))
