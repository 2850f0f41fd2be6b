"""recalibrate: population statistics of every batch norm, exactly, and nothing else of a model.

Each test says of which kind it is: equals the reference (float64, or the formula written out), equals torch, keeps an
invariant, or a known defect of others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

import anynorm
from anynorm.modules import batch as ours
from anynorm.statistics import Moments
from anynorm.surgery.recalibration.statistics import KEPT, Tally, merge_groups


def draw(*shape: int, seed: int = 0, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean).to(dtype)


def find_truth(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and n/(n-1) variance of each channel, float64."""
    rows = x.double().movedim(1, -1).reshape(-1, x.shape[1])
    return rows.mean(0), rows.var(0)


def hold(norm: Any, mean: Tensor, var: Tensor, k: float = 1e-6) -> None:
    """Running averages are these, to k of the mean and of the variance."""
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=k, atol=k * float(var.max().sqrt()))
    torch.testing.assert_close(norm.running_var.double(), var, rtol=k, atol=0)


def make_net(room: Any = nn, **options: Any) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        room.BatchNorm2d(6, **options),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        room.BatchNorm2d(4, **options),
    )


def photograph(model: nn.Module) -> list[Any]:
    """All that a user can see of a model."""
    seen: list[Any] = []
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        plain = {k: list(v) if isinstance(v, dict) else v for k, v in plain.items()}
        tensors = [(k, id(t), None if t is None else t.tolist()) for k, t in module._buffers.items()]
        seen.append((name, type(module), plain, tensors))
    return seen


IMAGES = [draw(n, 3, 8, 8, seed=n, mean=n) for n in (4, 4, 3)]


# ---- exactness -----------------------------------------------------------------------------------------------------

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


# ---- how a model is called -----------------------------------------------------------------------------------------


def test_tuples_lists_dicts_and_tensors_reach_the_model():
    """Invariant: the same data in any packing, the same bits."""
    x, answers = draw(6, 3, mean=2), []

    class Named(nn.BatchNorm1d):
        pass

    for batch in (x, (x, 1), [x, "label"], {"input": x}):
        norm = Named(3)
        anynorm.recalibrate(norm, [batch])
        answers.append(norm.running_var.tolist())
    norm = Named(3)
    anynorm.recalibrate(norm, [{"image": x}], forward_fn=lambda model, batch: model(batch["image"]))
    answers.append(norm.running_var.tolist())
    assert all(answer == answers[0] for answer in answers)


def test_a_data_loader_with_a_short_last_batch():
    """Equals the reference; a batch weighs what it holds."""
    x = draw(10, 3, mean=2)
    norm = nn.BatchNorm1d(3)
    anynorm.recalibrate(norm, DataLoader(TensorDataset(x, x), batch_size=4, shuffle=True))
    hold(norm, *find_truth(x))


def test_averaged_models():
    """Equals the reference on the averaged weights; the counter that averages weights stays."""
    model = make_net()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    report = anynorm.recalibrate(averaged, IMAGES)
    with torch.no_grad():
        hold(averaged.module[1], *find_truth(torch.cat([averaged.module[0](x) for x in IMAGES])))
    assert int(averaged.n_averaged) == 1
    assert [entry.name for entry in report.moved] == ["module.1", "module.4"]


def test_compiled_models_run_without_the_compiler():
    """Invariant: compiled before or not, whole or in part, the same bits."""
    plain, whole, part, itself = (make_net() for _ in range(4))
    anynorm.recalibrate(plain, IMAGES)
    part[3] = torch.compile(part[3], backend="eager")
    itself.compile(backend="eager")
    compiled = torch.compile(whole, backend="eager")
    for model in (compiled, part, itself):
        model(IMAGES[0])
        anynorm.recalibrate(model, IMAGES)
    for other in (whole, part, itself):
        assert torch.equal(other[4].running_var, plain[4].running_var)


def test_batches_stops_and_takes_no_more():
    taken = []

    def load() -> Iterator[Tensor]:
        for x in IMAGES:
            taken.append(x)
            yield x

    report = anynorm.recalibrate(make_net(), load(), batches=2)
    assert len(taken) == report.batches == 2 and report.moved[0].batches == 2


# ---- what stays ----------------------------------------------------------------------------------------------------


def make_rich_net() -> nn.Sequential:
    """Norms of several kinds, hooks, modes, momenta; what moves in training besides; a frozen layer."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6, momentum=None),
        nn.Dropout(0.5),
        anynorm.BatchNorm2d(6, on_nonfinite="skip"),
        nn.InstanceNorm2d(6, track_running_stats=True),
        anynorm.BatchNormAct2d(6, momentum=0.3),
        nn.SyncBatchNorm(6, process_group=None),
        anynorm.SyncBatchNorm(6),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 2, 3)),
    ).train()
    model[1].eval()
    model[3].register_forward_hook(lambda *_: None)
    model[5].register_forward_pre_hook(lambda *_: None)
    for index in (1, 3, 5, 6, 7):
        model[index].running_mean.copy_(draw(6, seed=index))
        model[index].num_batches_tracked.fill_(index)
    return model


def test_only_averages_and_counters_change():
    """Invariant: modes, momenta, hooks, classes, other buffers, identities, gradients and random numbers stay."""
    model = make_rich_net()
    before = photograph(model)
    generator = torch.get_rng_state()
    report = anynorm.recalibrate(model, IMAGES)
    assert torch.equal(torch.get_rng_state(), generator)
    moved = {entry.name for entry in report.moved}
    assert moved == {"1", "3", "5", "6", "7"}
    assert {entry.name: entry.reason for entry in report.left} == {
        "4": "its running averages are not those of a batch norm over (N, C, *)",
        "8": "it keeps no running averages",
    }
    for old, new in zip(before, photograph(model), strict=True):
        assert old[:3] == new[:3]
        assert [t[:2] for t in old[3]] == [t[:2] for t in new[3]]
        assert (old[3] == new[3]) == (old[0] not in moved)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("earlier", ["batch", "population"])
@pytest.mark.parametrize("where", ["loader", "model"])
def test_whatever_is_raised_changes_nothing(error, earlier, where):
    """Invariant: all or nothing."""
    model = make_rich_net()
    if where == "model":
        calls = []

        def stop(*_: Any) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise error

        model[9].register_forward_hook(stop)

    class Failing:
        def __iter__(self) -> Iterator[Tensor]:
            yield from IMAGES[:2]
            if where == "loader":
                raise error

    before, generator = photograph(model), torch.get_rng_state()
    with pytest.raises(error):
        anynorm.recalibrate(model, Failing(), earlier=earlier)
    assert photograph(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.is_grad_enabled()


def test_an_error_while_the_results_are_written_changes_nothing(monkeypatch):
    """Invariant: all or nothing, to the last line."""
    model = make_net()
    before, copied = photograph(model), []
    copy_ = Tensor.copy_

    def stop(self: Tensor, source: Tensor) -> Tensor:
        copied.append(self)
        if len(copied) == 4:
            raise KeyboardInterrupt
        return copy_(self, source)

    plain = anynorm.surgery.recalibration.recalibrate.write

    def write(*given: Any) -> None:
        monkeypatch.setattr(Tensor, "copy_", stop)
        plain(*given)

    monkeypatch.setattr("anynorm.surgery.recalibration.recalibrate.write", write)
    with pytest.raises(KeyboardInterrupt):
        anynorm.recalibrate(model, IMAGES)
    assert len(copied) > 4 and photograph(model) == before


def test_dropout_is_as_the_caller_has_it():
    """Invariant: in training mode it drops, in evaluation not; random numbers are the same in every pass."""
    x = draw(50, 3, mean=4)
    dropping, not_dropping = (nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)) for _ in range(2))
    report = anynorm.recalibrate(dropping, [x], earlier="population")
    anynorm.recalibrate(not_dropping.eval(), [x])
    assert report.unsettled == 0
    hold(not_dropping[1], *find_truth(x))
    assert float(dropping[1].running_var.min()) > 5 * float(not_dropping[1].running_var.max())
    assert not not_dropping[1].training


# ---- errors and precision ------------------------------------------------------------------------------------------


def test_error_is_the_spread_between_batches():
    """Equals the formula, written out on numbers that can be followed; the same in groups as without."""
    tally = Tally()
    for mean, m2 in ((1.0, 2.0), (3.0, 2.0)):
        tally.add(Moments(2, torch.tensor([mean], dtype=torch.float64), torch.tensor([m2], dtype=torch.float64)))
    found = merge_groups(tally.groups, tally.batches)
    assert found is not None
    # mean 2, var (2 + 2 + 4) / 4 = 2; offsets -1 and 1, each of weight 1/4, times 2
    assert float(found.mean_error) == pytest.approx((2 * (1 / 4 + 1 / 4)) ** 0.5 / 2**0.5)
    assert float(found.var_error) == 0  # both groups have the mean square 2 about 2
    assert float(found.var) == pytest.approx(8 / 3)


def test_error_tells_how_far_a_sample_is_from_the_truth():
    """Invariant: over 40 sets of data the true error, in units of the estimated one, has mean square near 1."""
    mean_ratios, var_ratios = [], []
    for seed in range(40):
        norm = nn.BatchNorm1d(24)
        report = anynorm.recalibrate(norm, list(draw(480, 24, seed=seed).split(8))).moved[0]
        mean_ratios.append(norm.running_mean.double() / report.mean_error)
        var_ratios.append((norm.running_var.double() - 1) / report.var_error)
    for ratios in (mean_ratios, var_ratios):
        assert 0.8 < float(torch.stack(ratios).square().mean()) < 1.25


def test_groups_keep_memory_bounded_and_the_total_exact():
    """Equals the reference; at most KEPT groups whatever comes."""
    tally, xs = Tally(), draw(4 * KEPT + 5, 3, 2, seed=1, mean=50, dtype=torch.float64)
    for number, x in enumerate(xs, 1):
        tally.add(Moments(3, x.mean(0), (x - x.mean(0)).square().sum(0)))
        assert len(tally.groups) <= KEPT and sum(g.count for g in tally.groups) == 3 * number
    found = merge_groups(tally.groups, tally.batches)
    assert found is not None and tally.total is not None
    torch.testing.assert_close(found.var, xs.flatten(0, 1).var(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(found.mean, tally.total.mean, rtol=1e-14, atol=0)


def test_rtol_ends_the_pass_when_the_error_is_small_enough():
    """Invariant: fewer batches for a looser demand; what was asked for is reached."""
    xs = list(draw(64 * 200, 4).split(64))
    taken = {}
    for rtol in (0.05, 0.02, 1e-9):
        report = anynorm.recalibrate(nn.BatchNorm1d(4), xs, rtol=rtol)
        taken[rtol] = report.batches
        assert report.moved[0].error <= rtol or report.batches == 200
    assert 8 <= taken[0.05] < taken[0.02] < taken[1e-9] == 200


def test_report_prints_a_line_for_each_norm():
    model = make_net()
    report = anynorm.recalibrate(model, IMAGES)
    lines = str(report).splitlines()
    assert lines[0] == "2 batch norms recalibrated, 0 left; earlier='batch', 1 pass of 3 batches"
    assert [line.split()[0] for line in lines[3:]] == ["1", "4"]
    assert max(map(len, lines)) <= 100
    entry = anynorm.recalibrate(model, IMAGES).moved[0]
    assert float(entry.shift.abs().max()) < 1e-6 and float((entry.ratio - 1).abs().max()) < 1e-6
    one = anynorm.recalibrate(model, IMAGES[:1])
    assert one.moved[0].error == float("inf") and "unknown" in str(one)


def test_shift_is_in_old_std_and_ratio_of_variances():
    """Equals the reference."""
    x, norm = draw(100, 2, mean=3, std=2), nn.BatchNorm1d(2)
    norm.running_var.fill_(16)
    entry = anynorm.recalibrate(norm, [x]).moved[0]
    mean, var = find_truth(x)
    torch.testing.assert_close(entry.shift, mean / (16 + 1e-5) ** 0.5)
    torch.testing.assert_close(entry.ratio, (var + 1e-5) / (16 + 1e-5))


def test_progress_is_drawn_where_it_is_asked_for(capsys):
    anynorm.recalibrate(make_net(), IMAGES)
    assert capsys.readouterr().out == ""
    anynorm.recalibrate(make_net(), IMAGES, progress=True)  # no terminal: rich draws its last state or nothing
    anynorm.recalibrate(make_net(), iter(IMAGES), progress=True)


# ---- what is left --------------------------------------------------------------------------------------------------


class Scaled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input)


class Activated(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(super().forward(x))


class Later(ours._Batch, nn.BatchNorm2d):
    """A subclass without a forward of its own."""

    _axes = (4,)


def test_norms_with_code_of_their_own_are_left_and_said():
    """Invariant: left as they are; `trust` takes them in."""
    model = nn.Sequential(nn.BatchNorm2d(3), Scaled(3), Activated(3), nn.BatchNorm2d(3), Later(3))
    model[3].forward = model[3].forward
    report = anynorm.recalibrate(model, IMAGES)
    assert [entry.name for entry in report.moved] == ["0", "4"]
    assert [entry.name for entry in report.left] == ["1", "2", "3"]
    assert int(model[1].num_batches_tracked) == 0 and float(model[1].running_mean.abs().max()) == 0
    assert "left 1 (" in str(report) and "name it in trust=" in str(report)
    report = anynorm.recalibrate(model, IMAGES, trust=(Activated,))
    assert [entry.name for entry in report.moved] == ["0", "2", "4"]


def test_recurrent_any_and_scripted_norms_are_left_and_said():
    """Invariant: nothing of them moves."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.lstm = anynorm.LSTM(3, 4, norm="batch-sequence")
            self.pattern = anynorm.AnyNorm("n c -> c", affine="c", track_running_stats=True, c=4)
            self.scripted = torch.jit.script(nn.BatchNorm1d(4))
            self.never = nn.BatchNorm1d(9)

        def forward(self, x: Tensor) -> Tensor:
            return self.scripted(self.pattern(self.lstm(self.norm(x)[None])[0][0]))

    model = Mixed()
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("norm.")}
    report = anynorm.recalibrate(model, [draw(6, 3), draw(6, 3, seed=1)])
    assert [entry.name for entry in report.moved] == ["norm"]
    left = {entry.name.split(".")[0]: entry.reason for entry in report.left}
    assert set(left) == {"lstm", "pattern", "scripted", "never"}
    assert left["never"] == "the model did not call it" and "jit.script" in left["scripted"]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())


# ---- errors --------------------------------------------------------------------------------------------------------


def poisoned() -> list[Tensor]:
    bad = IMAGES[2].clone()
    bad[0, 0, 0, 0] = float("inf")
    return [IMAGES[0], bad]


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no module": (lambda: anynorm.recalibrate(len, IMAGES), TypeError, "model must be a torch.nn.Module; got builtin"),
    "no loader": (
        lambda: anynorm.recalibrate(make_net(), 3),
        TypeError,
        "loader must give batches one by one; got int",
    ),
    "no norm": (
        lambda: anynorm.recalibrate(nn.Sequential(nn.Linear(2, 2)), IMAGES),
        ValueError,
        "the model must have a batch norm with running averages; got none; other norms need no",
    ),
    "only left": (
        lambda: anynorm.recalibrate(nn.BatchNorm2d(3, track_running_stats=False), IMAGES),
        ValueError,
        r"got none \(the model was left: it keeps no running averages\)",
    ),
    "empty": (
        lambda: anynorm.recalibrate(make_net(), []),
        ValueError,
        "at least 1 batch .* got 0 batches; is the loader",
    ),
    "iterator": (
        lambda: anynorm.recalibrate(make_net(), iter(IMAGES), earlier="population"),
        ValueError,
        "goes over the data more than once; got list_iterator, an iterator that gives it once; pass a DataLoader",
    ),
    "earlier": (
        lambda: anynorm.recalibrate(make_net(), [], earlier="x"),
        ValueError,
        "one of batch, population; got 'x'",
    ),
    "batches": (lambda: anynorm.recalibrate(make_net(), [], batches=0), ValueError, "whole number of 1 or more; got 0"),
    "rtol": (lambda: anynorm.recalibrate(make_net(), [], rtol=-1), ValueError, "rtol must be positive; got -1"),
    "one value": (
        lambda: anynorm.recalibrate(nn.Sequential(nn.BatchNorm1d(3)), [torch.ones(1, 3)], earlier="population"),
        ValueError,
        r"more than 1 value per channel; got 1 in 0 \(BatchNorm1d\); give more data; nothing was changed",
    ),
    "batch of one": (
        lambda: anynorm.recalibrate(nn.Sequential(nn.BatchNorm1d(3)), [draw(4, 3), torch.ones(1, 3)]),
        ValueError,
        r"a batch must have more than 1 value per channel, .* got 1 in 0 \(BatchNorm1d\); use a larger batch",
    ),
    "lazy": (
        lambda: anynorm.recalibrate(nn.Sequential(nn.LazyBatchNorm2d()), IMAGES),
        ValueError,
        "got 0 .*has not; run",
    ),
    "half": (
        lambda: anynorm.recalibrate(nn.BatchNorm1d(2).half(), [draw(9, 2, std=1e4).half()], earlier="population"),
        FloatingPointError,
        r"finite in the buffers' dtype; got values beyond torch.float16 in the model \(BatchNorm1d\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_rule_cause_and_repair(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=f"recalibrate: .*{message}"):
        call()


@pytest.mark.parametrize("earlier", ["batch", "population"])
def test_nan_and_inf_name_the_layer_and_change_nothing(earlier):
    """Invariant (pytorch#90342: one Inf poisons running statistics for ever)."""
    model = make_net()
    before = photograph(model)
    with pytest.raises(FloatingPointError, match=r"NaN or Inf in the input of 1 \(BatchNorm2d\); .*nothing was"):
        anynorm.recalibrate(model, poisoned(), earlier=earlier)
    assert photograph(model) == before


def test_poisoned_averages_are_healed():
    """Equals the reference: what is in the averages before plays no part."""
    model, twin = make_net(), make_net()
    model[1].running_var.fill_(float("nan"))
    for each in (model, twin):
        anynorm.recalibrate(each, IMAGES, earlier="population")
    assert torch.equal(model[4].running_var, twin[4].running_var) and model[1].running_var.isfinite().all()


@pytest.mark.parametrize("kind", ["BatchRenorm2d", "BatchRenormAct2d"])
def test_batch_renormalization_equals_batch_norm(kind):
    """Equals the same model of batch norm, whatever is in the averages before, also NaN; and all else is as before."""
    torch.manual_seed(1)
    options: dict[str, Any] = {"activation": "relu"} if "Act" in kind else {}
    twin_kind = getattr(anynorm, kind.replace("Renorm", "Norm"))
    renorm, twin = (
        nn.Sequential(norm(3, **options, **more), nn.Conv2d(3, 4, 3), norm(4, **options, **more))
        for norm, more in ((getattr(anynorm, kind), {"warmup": (0, 0, 0)}), (twin_kind, {}))
    )
    renorm(draw(8, 3, 4, 4, mean=5, std=3))
    twin.load_state_dict(renorm.state_dict())
    renorm[0].running_mean.fill_(float("nan"))
    before = vars(renorm[0]).keys()
    for each in (renorm, twin):
        anynorm.recalibrate(each, IMAGES)
    for name, t in twin.state_dict().items():
        assert torch.equal(renorm.state_dict()[name], t), name
    assert vars(renorm[0]).keys() == before and not renorm[0]._is_warming_up()


def test_a_loader_that_gives_less_in_the_second_pass_is_an_error():
    class Once:
        def __init__(self) -> None:
            self.left = list(IMAGES)

        def __iter__(self) -> Iterator[Tensor]:
            while self.left:
                yield self.left.pop()

    model = make_net()
    before = photograph(model)
    with pytest.raises(ValueError, match=r"got 0 batches in pass 2, 3 in the one before; pass a loader that begins"):
        anynorm.recalibrate(model, Once(), earlier="population")
    assert photograph(model) == before


def test_population_takes_batches_of_one():
    """Equals the reference: nothing is normalized by a single value."""
    x = draw(20, 3, mean=7)
    norm = nn.BatchNorm1d(3)
    anynorm.recalibrate(norm, list(x.split(1)), earlier="population")
    hold(norm, *find_truth(x))


def test_a_norm_behind_itself_is_warned_of_or_settles():
    """Invariant: it either has settled, or says that it has not."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x) * 3)

    with pytest.warns(UserWarning, match="the last of 2 passes still moved a statistic by"):
        report = anynorm.recalibrate(Twice(), [draw(9, 3, mean=5)], earlier="population")
    assert report.unsettled > 1e-6


# ---- known defects of others ---------------------------------------------------------------------------------------


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
