"""recalibrate: population statistics of every batch norm, exactly, also under masks and for what others get wrong.

Each test says of which kind it is: equals the reference (float64, or the formula written out), equals torch, keeps an
invariant, or a known defect of others.
"""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.optim.swa_utils import update_bn

import anynorm
from surgery.recalibration_cases import IMAGES, draw, find_truth, hold, make_net, photograph

CLASSES: list[tuple[Callable[[int], nn.Module], tuple[int, ...]]] = [
    (nn.BatchNorm1d, ()),
    (nn.BatchNorm1d, (7,)),
    (nn.BatchNorm2d, (5, 3)),
    (nn.BatchNorm3d, (2, 3, 2)),
    (nn.SyncBatchNorm, (5, 3)),
    (anynorm.BatchNorm1d, (7,)),
    (anynorm.BatchNorm2d, (5, 3)),
    (anynorm.BatchNorm3d, (2, 3, 2)),
    (anynorm.SyncBatchNorm, (5, 3)),
    (anynorm.BatchNormAct1d, (7,)),
    (anynorm.BatchNormAct2d, (5, 3)),
    (anynorm.BatchNormAct3d, (2, 3, 2)),
    (anynorm.SyncBatchNormAct, (5, 3)),
    (anynorm.GhostBatchNormAct2d, (5, 3)),
    (anynorm.BatchRenorm1d, (7,)),
]
SIZES = {anynorm.GhostBatchNormAct2d: {"ghost_size": 2}}


@pytest.mark.parametrize("earlier", ["batch", "population"])
@pytest.mark.parametrize(("kind", "positions"), CLASSES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_every_batch_norm_equals_the_reference(kind, positions, earlier):
    batches = [draw(n, 4, *positions, seed=n, mean=3 * n) for n in (8, 8, 3)]
    norm = kind(4, **SIZES.get(kind, {}))
    report = anynorm.recalibrate(norm, batches, earlier=earlier)
    if kind is anynorm.BatchRenorm1d:  # Whose averages are no longer debiased, and whose schedule has not moved.
        assert norm.extra_state() == {"batches": 0, "start_share": 0.0}
    everything = torch.cat(batches)
    hold(norm, *find_truth(everything))
    assert int(norm.num_batches_tracked) == 3
    assert report.moved[0].count == everything.numel() // 4
    assert type(norm) is kind and norm.training and "find_ranks" not in vars(norm)


@pytest.mark.parametrize("mean", [1e4, 1e6])
@pytest.mark.parametrize("room", [nn, anynorm])
def test_far_from_zero_equals_the_reference(room, mean):
    batches = [draw(n, 2, 9, seed=n, mean=mean) for n in (64, 64, 5)]
    norm = room.BatchNorm1d(2)
    anynorm.recalibrate(norm, batches)
    hold(norm, *find_truth(torch.cat(batches)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_equal_the_reference(dtype):
    batches = [draw(n, 2, 9, seed=n, mean=5, dtype=dtype) for n in (16, 3)]
    norm = anynorm.BatchNorm1d(2, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    anynorm.recalibrate(norm, batches)
    hold(norm, *find_truth(torch.cat(batches)), k=1e-12 if dtype is torch.float64 else 1e-6)


def run_by_hand(model: nn.Module, batches: list[Tensor], earlier: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The definition, in float64 and layer by layer; for a Sequential."""
    xs, found = [x.double() for x in batches], {}
    for name, layer in copy.deepcopy(model).double().named_children():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            xs = [layer(x) for x in xs]
            continue
        mean, var = found[name] = find_truth(torch.cat(xs))
        if earlier == "batch":
            xs = [nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True, 0, layer.eps) for x in xs]
        else:
            xs = [nn.functional.batch_norm(x, mean, var, layer.weight, layer.bias, False, 0, layer.eps) for x in xs]
    return found


@pytest.mark.parametrize("room", [nn, anynorm])
@pytest.mark.parametrize("earlier", ["batch", "population"])
def test_both_meanings_equal_the_definition_in_float64(room, earlier):
    model = make_net(room)
    with torch.no_grad():
        truth = run_by_hand(model, IMAGES, earlier)
    report = anynorm.recalibrate(model, IMAGES, earlier=earlier)
    for name, (mean, var) in truth.items():
        hold(model.get_submodule(name), mean, var, k=2e-6)  # the convolutions between are float32
    assert report.passes == (1 if earlier == "batch" else 3)
    assert report.unsettled <= 1e-6


def test_meanings_differ_and_population_is_what_evaluation_sees():
    """Invariant: in evaluation a norm then puts out mean beta and variance gamma^2 over all the data."""
    model = make_net()
    anynorm.recalibrate(model, IMAGES)
    by_batch = model[4].running_var.clone()
    anynorm.recalibrate(model, IMAGES, earlier="population")
    assert float((model[4].running_var / by_batch - 1).abs().max()) > 0.02
    with torch.no_grad():
        mean, var = find_truth(torch.cat([model.eval()(x) for x in IMAGES]))
    assert float(mean.abs().max()) < 1e-5 and float((var - 1).abs().max()) < 1e-3


class Diamond(nn.Module):
    """Two norms side by side, then one behind both."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.left, self.right = (nn.BatchNorm1d(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.left(x).relu() + self.right(x * x))


def test_norms_side_by_side_share_a_pass():
    """Invariant: passes follow how many norms stand behind one another, here two, and one that confirms."""
    model = Diamond()
    xs = [draw(6, 3, seed=s, mean=s) for s in range(3)]
    report = anynorm.recalibrate(model, xs, earlier="population")
    assert report.passes == 3
    x = torch.cat(xs)
    hold(model.left, *find_truth(x))
    hold(model.right, *find_truth(x * x))
    with torch.no_grad():
        hold(model.last, *find_truth(model.left.eval()(x).relu() + model.right.eval()(x * x)))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = anynorm.BatchNorm1d(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(x), self.norm(2 * x[:3])


@pytest.mark.parametrize("earlier", ["batch", "population"])
def test_calls_of_a_reused_layer_are_pooled(earlier):
    """Equals the reference; a batch counts once."""
    xs = [draw(6, 3, seed=s, mean=1) for s in range(3)]
    model = Reused()
    report = anynorm.recalibrate(model, xs, earlier=earlier)
    hold(model.norm, *find_truth(torch.cat([part for x in xs for part in (x, 2 * x[:3])])))
    assert report.moved[0].batches == 3 == int(model.norm.num_batches_tracked)


# ---- masks ---------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm = anynorm.BatchNormAct1d(4) if how == "fused" else anynorm.BatchNorm1d(4)
        self.how = how

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if self.how == "lengths":
            return self.norm(x, lengths=lengths)
        if self.how == "fused":
            return self.norm(x, x, anynorm.mask_of(lengths, x.shape[2]))
        if self.how == "context":
            return self.norm(x)
        return self.norm(x, anynorm.mask_of(lengths, x.shape[2]))


@pytest.mark.parametrize("earlier", ["batch", "population"])
@pytest.mark.parametrize("how", ["mask", "lengths", "fused", "context"])
def test_padding_counts_nowhere(how, earlier):
    """Equals the reference of the real positions; padding is NaN."""
    batches, real = [], []
    for seed, lengths in enumerate(([5, 2, 4], [1, 5], [0, 0])):
        sequences = [draw(1, 4, n, seed=10 * seed + n, mean=seed) for n in lengths]
        real += sequences
        padded = [nn.functional.pad(s, (0, 6 - s.shape[2]), value=float("nan")) for s in sequences]
        batches.append({"x": torch.cat(padded), "lengths": torch.tensor(lengths)})
    model = Masked(how)

    def call(model: nn.Module, batch: dict[str, Tensor]) -> None:
        with anynorm.masked(anynorm.mask_of(batch["lengths"], 6)):
            model(**batch)

    anynorm.recalibrate(model, batches, earlier=earlier, forward_fn=call if how == "context" else None)
    hold(model.norm, *find_truth(torch.cat(real, 2)))
    assert int(model.norm.num_batches_tracked) == 2  # the third batch is all padding


def test_jagged_and_packed_input_equal_their_rows():
    """Equals the reference."""
    pieces = [draw(n, 3, seed=n, mean=n) for n in (2, 5, 1)]
    for batch in (pack_sequence(pieces, enforce_sorted=False), torch.nested.nested_tensor(pieces, layout=torch.jagged)):
        norm = anynorm.BatchNorm1d(3)
        anynorm.recalibrate(norm, [batch, batch])
        hold(norm, *find_truth(torch.cat(pieces + pieces)))


def test_defect_update_bn_averages_variances_of_batches():
    """torch.optim.swa_utils.update_bn: no between-batch term, and a short last batch weighs as much as a full one."""
    x = torch.cat([draw(32, 2, mean=0), draw(32, 2, seed=1, mean=4), draw(2, 2, seed=2, mean=20)])
    theirs, mine = (nn.Sequential(nn.BatchNorm1d(2)) for _ in range(2))
    update_bn(x.split(32), theirs)
    anynorm.recalibrate(mine, x.split(32))
    mean, var = find_truth(x)
    assert float((theirs[0].running_var / var).max()) < 0.2
    assert float((theirs[0].running_mean - mean).abs().min()) > 3
    hold(mine[0], mean, var)


def test_defect_update_bn_is_not_exception_safe():
    """It leaves momentum None, training mode, and averages reset where its loader fails."""

    def load() -> Iterator[Tensor]:
        yield draw(8, 2)
        raise OSError

    theirs, mine = (nn.Sequential(nn.BatchNorm1d(2, momentum=0.25)).eval() for _ in range(2))
    before = photograph(mine)
    with pytest.raises(OSError):
        update_bn(load(), theirs)
    with pytest.raises(OSError):
        anynorm.recalibrate(mine, load())
    assert theirs[0].momentum is None and theirs.training
    assert photograph(mine) == before


def test_defect_fvcore_variance_by_difference_of_squares():
    """fvcore's update_bn_stats (precise_bn.py): it turns each batch's n/(n-1) running_var back into the population's,
    adds mean^2 for E[x^2], averages both over batches, weighted by size, and takes E[x^2] - E[x]^2, all in float32."""
    batches = [draw(64, 1, 5, seed=s, mean=1e4) for s in range(4)]
    sums = {"mean": torch.zeros(1), "square": torch.zeros(1), "n": 0}
    for x in batches:
        norm = nn.BatchNorm1d(1, momentum=1.0)
        norm(x)
        n = x.numel()
        mean, var = norm.running_mean, norm.running_var * (n - 1) / n
        sums["n"] += n
        sums["mean"] += (mean - sums["mean"]) * (n / sums["n"])
        sums["square"] += (var + mean.square() - sums["square"]) * (n / sums["n"])
    theirs = sums["square"] - sums["mean"].square()
    norm = nn.BatchNorm1d(1)
    anynorm.recalibrate(norm, batches)
    mean, var = find_truth(torch.cat(batches))
    assert abs(float(theirs) - float(var)) > 1  # multiples of 8, the distance of floats at 1e8; -8.0 was reported
    hold(norm, mean, var)
