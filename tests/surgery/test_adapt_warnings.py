"""adapt: what is refused, and which batches are warned of."""

import warnings

import pytest
import torch
import torch.nn as nn

import anynorm
from anynorm.surgery.adaptation.norms import BORROWED
from surgery.recalibration_cases import draw

quiet = pytest.mark.filterwarnings("ignore:adapt")  # the batches here are small


@pytest.mark.parametrize(
    ("model", "options", "kind", "text"),
    [
        (3, {}, TypeError, "model must be a torch.nn.Module; got int"),
        (nn.LayerNorm(3), {}, anynorm.UserError, "must have a batch norm with running averages; got none; other"),
        (nn.BatchNorm1d(3, track_running_stats=False), {}, anynorm.UserError, "it keeps no running averages"),
        (nn.LazyBatchNorm1d(), {}, ValueError, "adapt: lazy modules must have seen an input"),
        (nn.BatchNorm1d(3), {"method": "bn"}, anynorm.UserError, "one of batch, adabn, tent; got 'bn'"),
        (nn.BatchNorm1d(3), {"prior": -1}, anynorm.UserError, "prior must be a number of 0 or more; got -1"),
        (nn.BatchNorm1d(3), {"prior": float("inf")}, anynorm.UserError, "got inf"),
        (nn.BatchNorm1d(3), {"method": "adabn"}, anynorm.UserError, "got no loader; pass loader="),
        (nn.BatchNorm1d(3), {"loader": []}, anynorm.UserError, "loader belongs to the method adabn"),
        (nn.BatchNorm1d(3), {"method": "tent", "prior": 16}, anynorm.UserError, "prior belongs to the method batch"),
        (nn.BatchNorm1d(3, affine=False), {"method": "tent"}, anynorm.UserError, "norms without parameters"),
    ],
)
def test_what_is_refused(model, options, kind, text):
    with pytest.raises(kind, match=text):
        anynorm.adapt(model, **options)


@pytest.mark.parametrize("prior", [0, 16])
def test_one_value_per_channel_is_refused_by_name(prior):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    with (
        anynorm.adapt(model, prior=prior),
        pytest.raises(anynorm.UserError, match=r"adapt: 1 .BatchNorm1d. must get more"),
    ):
        model(draw(1, 3))
    assert not BORROWED


def test_a_batch_that_is_noise_is_warned_of_once():
    """Of 4 samples that are not shifted the means are off by half a std: the number is in the text."""
    model = nn.Sequential(nn.BatchNorm1d(50)).eval()
    batches = [draw(4, 50, seed=seed) for seed in range(3)]
    text = r"a batch of 4 says too little: .* off by 0\.[45]\d std"
    with anynorm.adapt(model), pytest.warns(UserWarning, match=text) as seen:
        list(map(model, batches))
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize(
    ("prior", "samples", "mean"), [(16, 4, 0.0), (0, 100, 0.0), (0, 4, 2.0)], ids=["prior", "large", "shifted"]
)
def test_a_batch_that_says_enough_is_not_warned_of(prior, samples, mean):
    model = nn.Sequential(nn.BatchNorm1d(50)).eval()
    with anynorm.adapt(model, prior=prior), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(draw(samples, 50, mean=mean))


def test_positions_of_a_sample_that_resemble_each_other_count_as_few():
    """100 equal positions are worth one: the count of values would hide it."""
    model = nn.Sequential(nn.BatchNorm1d(50)).eval()
    with anynorm.adapt(model), pytest.warns(UserWarning, match="a batch of 4 says too little"):
        model(draw(4, 50, 1).expand(4, 50, 100))
    with anynorm.adapt(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(draw(4, 50, 100))


def test_a_batch_of_one_class_is_warned_of():
    """Adapted predictions are spread over the classes; those of the running averages tell."""
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    x = draw(64, 4)
    one_class = x + torch.tensor([0.0, 9.0, 0.0, 0.0])
    with anynorm.adapt(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(x).argmax(1).unique().numel() == 4
    with (
        anynorm.adapt(model),
        pytest.warns(UserWarning, match="without adaptation class 1 is predicted for 100% of 64"),
    ):
        assert model(one_class).argmax(1).unique().numel() == 4


def test_the_look_without_adaptation_is_rare_and_leaves_no_trace():
    """On calls 1, 2, 4, 8; torch's random numbers and the averages stay."""
    calls = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return self.norm(x) + torch.rand(())

    model, x = Net().eval(), draw(64, 4)
    torch.manual_seed(0)
    with anynorm.adapt(model):
        for _ in range(8):
            last = model(x)
    assert len(calls) == 8 + 4
    torch.manual_seed(0)
    with anynorm.adapt(model.norm):
        for _ in range(8):
            again = model(x)
    assert torch.equal(last, again)
