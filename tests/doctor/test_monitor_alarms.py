"""What is warned of: each disease once, with the layer's name and the remedy; and nothing of healthy models."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anynorm
from anynorm.apps.studies.data import load_data
from anynorm.apps.zoo import ResidualBlock
from anynorm.doctor.monitor.alarms import PROBLEMS, lag
from anynorm.doctor.monitor.measure import Evidence
from doctor.monitored import X, make_net, train

pytestmark = pytest.mark.usefixtures("one_thread")


def watch(model, steps=6, every=1, x=X, **options):
    """The problems of each layer's last record, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with anynorm.Monitor(model, every=every) as monitor:
            train(model, steps, x, **options)
    messages = [str(each.message) for each in said]
    assert all(message.startswith("anynorm.Monitor: ") for message in messages)
    found = {name: record.warned for name, record in monitor.records.items() if record.warned}
    assert all(word in PROBLEMS for words in found.values() for word in words.split())
    return found, messages


def draw(steps, shape=(32, 4), shift=0.0):
    """Batches of one source."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) + shift for _ in range(steps)]


def follow(norm, batches, every=1):
    """The problem of averages, after a norm alone saw the batches."""
    model = nn.Sequential(norm)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with anynorm.Monitor(model, every=every) as monitor:
            for x in batches:
                model(x).sum().backward()
    return "not-following" in monitor.records["0"].warned.split(), [str(each.message) for each in said]


@pytest.fixture(scope="module")
def digits():
    data = load_data("mnist")
    return F.avg_pool2d(torch.from_numpy(data.train_x), 2), torch.from_numpy(data.train_y)


def learn(model, digits, steps, every, batch, seed):
    """Brief training, with every warning an error."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, labels = digits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with anynorm.Monitor(model, every=every) as monitor:
            for _ in range(steps):
                chosen = torch.randint(len(images), (batch,), generator=generator)
                loss = F.cross_entropy(model(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert float(loss) < 1.5, "it has learned something"
    return monitor


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_healthy_network_is_not_warned_of(digits, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3)),
        *(nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32), nn.BatchNorm1d(32), nn.ReLU()),
        nn.Linear(32, 10),
    )
    learn(model, digits, 150, 10, 32, seed)


def test_a_healthy_residual_network_is_not_warned_of(digits):
    """`python -m benchmarks.monitor --healthy` does it with ResNet-18 and three seeds, which takes minutes."""
    torch.manual_seed(0)
    blocks = [ResidualBlock(8, 16, 2), ResidualBlock(16, 32, 2), ResidualBlock(32, 32, 1)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    assert len(learn(model, digits, 100, 5, 16, 0).records) == 8


def test_nan_in_the_data_is_said_of_the_first_layer_and_names_the_others():
    x = X.clone()
    x[0, 0, 0, 0] = torch.nan
    found, messages = watch(make_net(), x=x)
    said = [message for message in messages if "NaN or infinity reached it" in message]
    assert len(said) == 1
    assert said[0].startswith("anynorm.Monitor: step 0, 1 (torch.nn.BatchNorm2d): ")
    assert said[0].endswith("The same of 5")
    assert "on_nonfinite='skip'" in said[0]
    assert "nonfinite-input" in found["1"] and "nonfinite-input" in found["5"]


def test_averages_that_one_batch_poisoned_are_found_later():
    """pytorch#90342, #115500: no measured step need see the batch that did it."""
    model = make_net()
    model[1].running_var[2] = torch.inf
    found, messages = watch(model)
    assert "nonfinite-averages" in found["1"]
    (message,) = messages
    assert "1 (torch.nn.BatchNorm2d): its running averages are NaN or infinite" in message
    assert "anynorm.recalibrate" in message


def test_gamma_that_is_nan():
    model = make_net()
    with torch.no_grad():
        model[5].weight[0] = torch.nan
    found, messages = watch(model, steps=1)
    assert "nonfinite-gamma" in found["5"]
    assert any("5 (torch.nn.GroupNorm): gamma is NaN" in message for message in messages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_averages_in_half_precision(dtype):
    """Model-Optimizer#738: they stall."""
    model = nn.Sequential(nn.BatchNorm1d(4).to(dtype))
    found, messages = watch(model, x=draw(1)[0].to(dtype))
    assert ("half-averages" in found.get("0", "")) == (dtype == torch.bfloat16)
    assert len([message for message in messages if "bfloat16" in message]) == (dtype == torch.bfloat16)
    model.float()  # the remedy that is named
    assert "half-averages" not in watch(model, x=draw(1)[0].to(dtype))[0].get("0", "")


@pytest.mark.parametrize("momentum", [0.0, 0.001])
def test_averages_that_do_not_follow(momentum):
    """keras#7265: fine in training, useless in evaluation."""
    found, messages = follow(nn.BatchNorm1d(4, momentum=momentum), draw(320, shift=2.0), 20)
    assert found
    (message,) = messages
    assert f"momentum is {momentum}" in message and "anynorm.recalibrate" in message


def test_a_variance_that_does_not_follow_though_the_mean_does():
    found, _ = follow(nn.BatchNorm1d(4, momentum=0.0), [3 * x for x in draw(320)], 20)
    assert found


@pytest.mark.parametrize("every", [1, 5, 20])
def test_averages_that_follow_are_no_alarm(every):
    assert follow(nn.BatchNorm1d(4), draw(200, shift=5.0), every) == (False, [])
    drifting = [x + 0.02 * step for step, x in enumerate(draw(200))]
    assert follow(nn.BatchNorm1d(4), drifting, every) == (False, [])


def test_small_batches_are_noise_and_no_lag():
    found, messages = follow(nn.BatchNorm1d(4), draw(320, (3, 4)), 5)
    assert not found
    (message,) = messages
    assert "the mean of a batch is noisy" in message and "anynorm.accumulate" in message


def test_frozen_averages_are_meant_to_stand_still():
    frozen = nn.BatchNorm1d(4).eval()
    model = nn.Sequential(frozen, nn.Linear(4, 4))
    frozen.train = lambda mode=True: frozen
    with anynorm.Monitor(model, every=10) as monitor:
        for x in draw(300, shift=2.0):
            model(x).sum().backward()
    assert monitor.records["0"].gap > 1.5
    assert not monitor.records["0"].warned
    frozen = anynorm.freeze(nn.Sequential(nn.BatchNorm1d(4, momentum=0.0), nn.Linear(4, 4)), affine=False).model
    with anynorm.Monitor(frozen, every=10):
        for x in draw(300, shift=2.0):
            frozen(x).sum().backward()


@pytest.mark.parametrize(("size", "sick"), [(4, True), (6, False)])
def test_noise(size, sick):
    found, messages = watch(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), x=draw(1, (size, 4))[0], rate=0.0)
    assert ("noise" in found.get("1", "")) == sick
    assert bool(messages) == sick


def test_one_small_batch_is_no_alarm():
    model = nn.Sequential(nn.BatchNorm1d(4))
    batches = draw(6)
    batches[3] = batches[3][:2]
    with anynorm.Monitor(model, every=1):
        for x in batches:
            model(x).sum().backward()


@pytest.mark.parametrize("scale", [0.0, 1e-5, 1.0])
def test_channels_that_hardly_vary(scale):
    x = draw(1)[0]
    x[:, 2] = 7 + scale * x[:, 2]
    found, messages = watch(nn.Sequential(nn.BatchNorm1d(4)), x=x)
    assert ("constant" in found.get("0", "")) == (scale < 1)
    if scale < 1:
        (message,) = messages
        assert "0 (torch.nn.BatchNorm1d): 1 of 4 channels hardly vary" in message


def test_a_layer_without_gradient():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.side, self.main = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.main(x + 1) + 0 * self.side(x)

    x = draw(1)[0]
    found, messages = watch(Net(), 4, x=x)
    assert found == {"side": "no-gradient"}
    (message,) = messages
    assert "step 2, side (torch.nn.BatchNorm1d): hardly any gradient reaches gamma" in message
    assert not watch(Net(), 2, x=x)[0]


def test_gammas_that_start_at_zero_are_no_alarm():
    """The last norm of a residual block often does, and those before it get no gradient in the first step."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4), nn.BatchNorm1d(4))
    nn.init.zeros_(model[3].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (x,) = draw(1)
    with anynorm.Monitor(model, every=1) as monitor:
        for step in range(6):
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
            assert (monitor.records["1"].gradient == 0) == (step == 0)


def test_infinite_gradients_are_recorded_and_not_said():
    """A gradient scaler makes them on purpose."""
    model = nn.Sequential(nn.BatchNorm1d(4))
    with anynorm.Monitor(model, every=1) as monitor:
        (model(draw(1)[0]).square().sum() * torch.inf).backward()
    assert monitor.records["0"].nonfinite == "gradient"
    assert not monitor.records["0"].warned


def test_records_say_what_nobody_is_told_of():
    model = nn.Sequential(nn.BatchNorm1d(4))
    with anynorm.Monitor(model, every=1, warn=False) as monitor:
        model(draw(1)[0] * torch.inf)
    assert "nonfinite-input" in monitor.records["0"].warned


@pytest.mark.parametrize(
    ("before", "now", "error", "lags"),
    [(0.3, 0.3, 0.01, True), (0.3, 0.3, 0.1, False), (-0.3, 0.3, 0.01, False), (0.2, 0.2, 0.01, False)],
)
def test_lag_is_large_beyond_chance_and_always_the_same(before, now, error, lags):
    def make(size, place):
        parts = [torch.zeros(8), torch.zeros(8), torch.full((8,), error)]
        parts[place] = torch.full((8,), size)
        return Evidence(*parts)

    for place in (0, 1):
        assert lag(make(before, place), make(now, place)) == lags


def test_averages_have_time_to_forget_their_first_values():
    assert follow(nn.BatchNorm1d(4, momentum=0.01), draw(60, shift=5.0), 10) == (False, [])
