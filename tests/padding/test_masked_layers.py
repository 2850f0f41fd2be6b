"""`anynorm.masked(mask, model=model)`: in evaluation a sample in a padded batch equals the sample alone.

Of the three kinds of tests these keep an invariant: padding does not matter.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import anynorm
from padding.masked_models import LENGTHS, run, unsettle


def assert_as_alone(net: nn.Module, x: Tensor, lengths: list[int], axis: int = -1) -> None:
    """Each sample of the batch equals the sample alone to 1e-5, whatever is in the padding."""
    for sample, length in zip(x, lengths, strict=True):
        sample.narrow(axis, length, sample.shape[axis] - length).add_(7)
    batched = run(net, x, lengths)
    for i, length in enumerate(lengths):
        alone = net(x[i : i + 1].narrow(axis, 0, length))
        got = batched[(slice(i, i + 1), *(slice(0, size) for size in alone.shape[1:]))]
        assert got.shape == alone.shape
        torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)


class Conformer(nn.Module):
    """Two strided convolutions over time and frequency, then the block of Gulati et al. 2020 without its attention."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.subsample = nn.Sequential(nn.Conv2d(1, d, 3, 2), nn.ReLU(), nn.Conv2d(d, d, 3, 2), nn.ReLU())
        self.project = nn.Linear(d * 4, d)
        self.feed = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.SiLU(), nn.Linear(4 * d, d))
        self.norm, self.point = nn.LayerNorm(d), nn.Conv1d(d, 2 * d, 1)
        self.depth, self.batch = nn.Conv1d(d, d, 5, padding=2, groups=d), nn.BatchNorm1d(d)
        self.last, self.end = nn.Conv1d(d, d, 1), nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.subsample(x.unsqueeze(1))
        x = self.project(x.transpose(1, 2).flatten(2))
        x = x + 0.5 * self.feed(x)
        y = F.glu(self.point(self.norm(x).transpose(1, 2)), 1)
        y = self.last(F.silu(self.batch(self.depth(y))))
        return self.end(x + y.transpose(1, 2))


class Temporal(nn.Module):
    """A dilated block of Bai et al. 2018: padded at both ends, and cut at the last."""

    def __init__(self, c: int, dilation: int) -> None:
        super().__init__()
        convolution = nn.Conv1d(c, c, 3, padding=2 * dilation, dilation=dilation)
        self.convolution = nn.utils.parametrizations.weight_norm(convolution)
        self.norm, self.cut = nn.BatchNorm1d(c), 2 * dilation

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.convolution(x)[..., : -self.cut]))


class Residual(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.first, self.one = nn.Conv1d(a, b, 3, stride, 1), nn.BatchNorm1d(b)
        self.second, self.two = nn.Conv1d(b, b, 3, 1, 1), nn.BatchNorm1d(b)
        self.shortcut = nn.Sequential(nn.Conv1d(a, b, 1, stride), nn.BatchNorm1d(b))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.one(self.first(x)))
        return F.relu(self.two(self.second(y)) + self.shortcut(x))


class Skip(nn.Module):
    """Down, up again, and both joined."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.one = nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.further, self.two = nn.Conv1d(8, 16, 4, 2, 1), nn.BatchNorm1d(16)
        self.up, self.three = nn.ConvTranspose1d(16, 8, 4, 2, 1), nn.BatchNorm1d(8)
        self.out = nn.Conv1d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.one(self.down(x)))
        b = F.relu(self.two(self.further(a)))
        return self.out(torch.cat([a, F.relu(self.three(self.up(b)))], 1))


class Causal(nn.Conv1d):
    """Pads by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


def sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


SERIES = {
    "dilated": lambda: sequential(Temporal(4, 1), Temporal(4, 2), Temporal(4, 4)),
    "residual": lambda: sequential(
        nn.Conv1d(4, 8, 7, 2, 3),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.MaxPool1d(3, 2, 1),
        Residual(8, 8, 1),
        Residual(8, 12, 2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ),
    "separable": lambda: sequential(
        nn.Conv1d(4, 4, 5, padding=2, groups=4),
        nn.Conv1d(4, 8, 1),
        nn.BatchNorm1d(8),
        nn.ReLU6(),
        nn.Conv1d(8, 8, 3, padding=4, dilation=4, groups=2),
        nn.GroupNorm(2, 8),
        nn.Conv1d(8, 8, 3, padding=1),
        nn.InstanceNorm1d(8, affine=True),
        nn.Conv1d(8, 4, 3),
    ),
    "transposed": lambda: sequential(
        nn.Conv1d(4, 8, 3, 2, 1),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.ConvTranspose1d(8, 8, 4, 2, 1, groups=4),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.ConvTranspose1d(8, 4, 3, 3, output_padding=1),
        nn.Conv1d(4, 4, 3, padding=1),
    ),
    "skip": Skip,
    "causal by hand": lambda: sequential(Causal(4, 4, 3, dilation=2), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3, padding=1)),
    "padded by layers": lambda: sequential(
        nn.ConstantPad1d((4, 0), 0.5), nn.Conv1d(4, 4, 3, dilation=2), nn.ZeroPad1d(1), nn.Conv1d(4, 4, 3)
    ),
    "not padded by zeros": lambda: sequential(
        nn.Conv1d(4, 4, 5, padding=2, padding_mode="reflect"),
        nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.ReplicationPad1d(2),
        nn.Conv1d(4, 4, 3, padding="same", padding_mode="replicate"),
        nn.ReflectionPad1d((1, 2)),
    ),
    "average pooling": lambda: sequential(
        nn.Conv1d(4, 4, 3, padding=1),
        nn.AvgPool1d(3, 1, 1),
        nn.AvgPool1d(3, 2, 1, count_include_pad=False),
        nn.Conv1d(4, 4, 3, padding=1),
        nn.AvgPool1d(2, ceil_mode=True),
        nn.LPPool1d(2, 2, ceil_mode=True),
    ),
    "max pooling": lambda: sequential(
        nn.Conv1d(4, 4, 1), nn.MaxPool1d(3, 2, 1), nn.MaxPool1d(2, 1, ceil_mode=True), nn.Conv1d(4, 4, 3, padding=1)
    ),
    "adaptive pooling": lambda: sequential(nn.Conv1d(4, 4, 3, padding=1), nn.AdaptiveMaxPool1d(5), nn.Flatten()),
    "upsampling": lambda: sequential(
        nn.Conv1d(4, 4, 3, padding=1), nn.Upsample(scale_factor=2, mode="linear"), nn.Conv1d(4, 4, 3, padding=1)
    ),
    "even kernels": lambda: sequential(
        nn.Conv1d(4, 4, 4, padding="same", dilation=2), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 2, padding="same")
    ),
}
MAPS = {
    "spectrogram": lambda: sequential(
        nn.Conv2d(1, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, (2, 1), 1, groups=8),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 4, 3, padding=1, dilation=1),
    ),
    "pooled": lambda: sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((3, 2)), nn.Conv2d(4, 4, 3, padding=1)
    ),
    "transposed": lambda: sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2, 2), nn.Conv2d(2, 1, 3, padding=1)
    ),
}


@pytest.mark.parametrize("fuse", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("name", SERIES)
def test_series(name, fuse):
    net = unsettle(SERIES[name]())
    assert_as_alone(anynorm.accelerate(net, fuse=fuse).model, torch.randn(3, 4, 40), LENGTHS)


@pytest.mark.parametrize("axis", [-1, -2], ids=["time last", "frequency last"])
@pytest.mark.parametrize("name", MAPS)
def test_maps_of_time_and_frequency(name, axis):
    net = unsettle(MAPS[name]())
    anynorm.accelerate(net)
    x = torch.randn(3, 1, 17, 40)
    assert_as_alone(net, x if axis == -1 else x.mT.contiguous(), LENGTHS, axis)


def test_a_conformer_block():
    """torchaudio#4205: its depthwise convolution reads GLU(bias) behind each sample."""
    net = unsettle(Conformer())
    anynorm.accelerate(net)
    assert_as_alone(net, torch.randn(3, 47, 19), [47, 20, 9], -2)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, anynorm.LSTM, anynorm.GRU])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers_read_up_to_each_end(kind, batch_first):
    net = nn.ModuleDict({"rnn": kind(4, 5, 2, batch_first=batch_first, bidirectional=True)})
    x = torch.randn(3, 40, 4)
    with anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
        y, state = net["rnn"](x if batch_first else x.transpose(0, 1))
    y = y if batch_first else y.transpose(0, 1)
    for i, length in enumerate(LENGTHS):
        alone = x[i : i + 1, :length]
        z, last = net["rnn"](alone if batch_first else alone.transpose(0, 1))
        torch.testing.assert_close(y[i, :length], z.flatten(0, 1), atol=1e-6, rtol=1e-6)
        for got, true in zip(*((s if isinstance(s, tuple) else (s,)) for s in (state, last)), strict=True):
            torch.testing.assert_close(got[:, i], true[:, 0], atol=1e-6, rtol=1e-6)


def test_training_statistics_are_those_of_real_positions():
    torch.manual_seed(0)
    convolution, norm = nn.Conv1d(4, 8, 3, 2, 1), anynorm.BatchNorm1d(8)
    net = nn.Sequential(convolution, norm, nn.Conv1d(8, 2, 3, padding=1))
    x = torch.randn(3, 4, 40, requires_grad=True)
    y = run(net, x, LENGTHS)
    rows = torch.cat([convolution(x[i : i + 1, :, :n])[0] for i, n in enumerate(LENGTHS)], 1).T
    torch.testing.assert_close(norm.running_mean, 0.1 * rows.mean(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * rows.var(0), atol=1e-6, rtol=1e-6)
    real = anynorm.shorten(anynorm.mask_of(LENGTHS, 40), convolution)
    (dx,) = torch.autograd.grad((y * real.unsqueeze(1)).sin().sum(), x)
    assert not dx[1, :, 18:].any()
    assert bool(dx[1, :, :18].any())


def test_no_padding_is_as_without_a_context():
    net = anynorm.accelerate(unsettle(SERIES["not padded by zeros"]())).model
    x = torch.randn(2, 4, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(net, x, [40, 40]), net(x))


def test_an_empty_sample():
    net = anynorm.accelerate(unsettle(SERIES["average pooling"]())).model
    x = torch.randn(2, 4, 40)
    y = run(net, x, [40, 0])
    torch.testing.assert_close(y[:1], net(x[:1]), atol=1e-6, rtol=1e-6)
