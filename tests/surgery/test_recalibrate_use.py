"""recalibrate: how it calls a model, and that nothing of the model but its averages changes."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import anynorm
from surgery.recalibration_cases import IMAGES, draw, find_truth, hold, make_net, photograph


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


@pytest.mark.parametrize("earlier", ["batch", "population"])
def test_norms_frozen_but_for_their_updates_are_recalibrated_as_others(earlier):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    data = [draw(32, 4, seed=seed) for seed in range(3)]
    twin = copy.deepcopy(model)
    anynorm.freeze(twin, updates=False)
    for each in (model, twin):
        anynorm.recalibrate(each, data, earlier=earlier)
    for name, value in model.state_dict().items():
        assert torch.allclose(twin.state_dict()[name].double(), value.double(), rtol=1e-5, atol=1e-6), name
    assert twin[1].frozen.training
