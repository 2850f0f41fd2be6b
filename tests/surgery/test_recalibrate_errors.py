"""recalibrate: what it refuses, in which words, and what it survives."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import anynorm
from surgery.recalibration_cases import IMAGES, draw, find_truth, hold, make_net, photograph


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
