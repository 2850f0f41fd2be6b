"""`anynorm.masked(mask, model=model)`: in evaluation a sample in a padded batch equals the sample alone; and what the
context says where it was not heard.

Of the three kinds of tests these keep an invariant: padding does not matter.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import module as hooks_of_all_modules
from torch.utils.checkpoint import checkpoint

import anynorm
from anynorm.padding import hooks

LENGTHS = [40, 18, 6]


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    assert anynorm.masked.opened == 0 == hooks.OPEN[0]
    assert not hooks_of_all_modules._global_forward_pre_hooks
    assert not hooks_of_all_modules._global_forward_hooks


def unsettle(net: nn.Module) -> nn.Module:
    """Biases and averages other than 0, behind which padding is not 0."""
    for layer in net.modules():
        if isinstance(getattr(layer, "running_mean", None), Tensor):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
        if isinstance(getattr(layer, "bias", None), nn.Parameter):
            nn.init.normal_(layer.bias)
    return net.eval()


def run(net: nn.Module, x: Tensor, lengths: list[int], **options: object) -> Tensor:
    with anynorm.masked(anynorm.mask_of(lengths, max(lengths)), model=net, **options):
        return net(x)


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


# ---- blocks of models -------------------------------------------------------------------------------------------


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


# ---- several masks ----------------------------------------------------------------------------------------------


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), anynorm.BatchNorm1d(3))
        self.decoder = nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), anynorm.BatchNorm1d(3))

    def forward(self, audio: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(audio), self.decoder(text)


AUDIO, TEXT = anynorm.mask_of([10, 9, 8, 7], 10), anynorm.mask_of([2, 3, 4, 10], 10)


def test_two_masks_of_one_length_are_refused():
    norm, x = anynorm.BatchNorm1d(3), torch.randn(4, 3, 10)
    with anynorm.masked(AUDIO, TEXT), pytest.raises(ValueError, match=r"several masks .* 10, 9, 8, 7 .* and .* 2, 3"):
        norm(x)
    with anynorm.masked(AUDIO, AUDIO.float()):
        assert torch.equal(norm(x), anynorm.BatchNorm1d(3)(x, mask=AUDIO))


@pytest.mark.parametrize("by", ["name", "module"])
def test_a_mask_for_each_part(by):
    net = Translator()
    parts = {"encoder": AUDIO, "decoder": TEXT}
    if by == "module":
        parts = {net.get_submodule(name): mask for name, mask in parts.items()}
    audio, text = torch.randn(4, 3, 10), torch.randn(4, 3, 10)
    alike = copy.deepcopy(net)
    with anynorm.masked(parts, model=net):
        first, second = net(audio, text)
    with anynorm.masked(AUDIO, model=alike):
        assert torch.equal(alike.encoder(audio), first)
    with anynorm.masked(TEXT, model=alike):
        assert torch.equal(alike.decoder(text), second)


def test_the_most_specific_part_counts_and_none_is_without_padding():
    net, x = Translator(), torch.randn(4, 3, 10)
    alike = copy.deepcopy(net)
    with anynorm.masked({"": AUDIO, "decoder": TEXT, "decoder.1": None}, model=net):
        first, second = net(x, x)
    with anynorm.masked(AUDIO, model=alike):
        assert torch.equal(alike.encoder(x), first)
    with anynorm.masked(TEXT, model=alike):
        before = alike.decoder[0](x)
    torch.testing.assert_close(second, alike.decoder[1](before), atol=1e-6, rtol=1e-6)


def test_masks_behind_two_ways_that_differ_are_refused():
    """Alone a sample of 7 positions comes back as 8; behind functions only shapes are known, and both are 10."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv1d(2, 2, 3, 2, 1), nn.ConvTranspose1d(2, 2, 2, 2)
            self.last = nn.Conv1d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.up(F.relu(self.down(x)))))

    with pytest.raises(ValueError, match=r"last = Conv1d\(2, 2.*several masks .* 10, 7 real .* 10, 8 real .*nn.ReLU"):
        run(Net(), torch.randn(2, 2, 10), [10, 7])
    run(Net(), torch.randn(2, 2, 10), [10, 6])


def test_a_function_that_changes_positions_is_named():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(2, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.convolution(F.pad(x, (2, 0)))

    net, x, mask = Net(), torch.randn(2, 2, 10), anynorm.mask_of([10, 7], 10)
    with pytest.raises(ValueError, match=r"convolution = Conv1d.*no mask .* \(2, 12\); got \(2, 10\); .*F.pad"):
        run(net, x, [10, 7])
    with anynorm.masked({"": mask, "convolution": F.pad(mask, (2, 0), value=True)}, model=net):
        y = net(x)
    torch.testing.assert_close(y[1:, :, :7], net(x[1:, :, :7]), atol=1e-6, rtol=1e-6)


# ---- who was not heard ------------------------------------------------------------------------------------------


class Own(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("net", [nn.BatchNorm1d(3), Own(3), nn.Identity()], ids=str)
def test_a_context_that_nothing_took(net):
    anynorm.accelerate(net) if isinstance(net, Own) else None
    with pytest.warns(UserWarning, match="no layer inside took a mask"):
        with anynorm.masked(AUDIO):
            net(torch.randn(4, 3, 10))


@pytest.mark.parametrize(
    ("norm", "repair"), [(nn.BatchNorm1d(3), "accelerate"), (nn.GroupNorm(1, 3), "accelerate")], ids=str
)
def test_norms_of_torch_that_count_padding_are_refused(norm, repair):
    net = nn.Sequential(anynorm.BatchNorm1d(3), nn.Sequential(norm))
    with pytest.raises(ValueError, match=rf"got 1\.0 \({type(norm).__name__}\); call anynorm\.{repair}\(model\)"):
        with anynorm.masked(AUDIO, model=net):
            net(torch.randn(4, 3, 10))


def test_norms_that_are_left_are_named():
    net = nn.Sequential(anynorm.BatchNorm1d(3), Own(3), nn.BatchNorm1d(3).eval())
    with pytest.warns(UserWarning, match=r"got 1 \(Own\), 2 \(BatchNorm1d\); anynorm.accelerate"):
        with anynorm.masked(AUDIO, model=net):
            net(torch.randn(4, 3, 10))


def test_torchs_layer_norm_sees_one_position_at_a_time():
    net = nn.Sequential(anynorm.RMSNorm(3), nn.LayerNorm(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(net, torch.randn(4, 10, 3), [10, 9, 8, 7])
    net = nn.Sequential(nn.LayerNorm(10))  # over positions
    with pytest.warns(UserWarning, match=r"got 0 \(LayerNorm\)"):
        run(net, torch.randn(4, 3, 10), [10, 9, 8, 7])


@pytest.mark.parametrize("norm", [None, "layer", "batch-sequence", "batch-per-step"])
@pytest.mark.parametrize("kind", [anynorm.LSTM, anynorm.GRU])
def test_our_recurrent_layers_take_lengths_from_the_mask(kind, norm):
    options = {"max_steps": 3} if norm == "batch-per-step" else {}
    layer = kind(3, 4, norm=norm, batch_first=True, **options)
    x, alike = torch.randn(4, 10, 3), copy.deepcopy(layer)
    with anynorm.masked(TEXT):
        y, _ = layer(x)
    z, _ = alike(x, lengths=[2, 3, 4, 10])
    assert torch.equal(y, z)
    with anynorm.masked(TEXT.flip(1)), pytest.raises(ValueError, match=f"{kind.__name__}: real positions must come"):
        layer(x)


# ---- around the context -----------------------------------------------------------------------------------------


def build() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 4, 3, 2, 1), anynorm.BatchNorm1d(4), nn.SiLU(), nn.Conv1d(4, 4, 3, padding=1))
    return unsettle(net)


def test_nothing_stays_on_the_model():
    net, x = build(), torch.randn(3, 4, 40)
    plain = net(x)
    with anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
        inside = net(x)
        twin, other = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
        torch.save(net, io.BytesIO())
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in (*net.modules(), *twin.modules()))
    assert not torch.equal(inside, plain)
    assert torch.equal(net(x), plain)
    assert torch.equal(twin(x), plain)
    assert torch.equal(other(x), plain)


def count_hooks() -> int:
    return len(hooks_of_all_modules._global_forward_pre_hooks) + len(hooks_of_all_modules._global_forward_hooks)


def test_hooks_go_with_the_context_and_with_the_graph_that_would_compute_layers_again():
    net, x = build(), torch.randn(3, 4, 40, requires_grad=True)
    with anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
        y = net(x)
        assert count_hooks() == 2
    assert count_hooks() == 0
    y.sum().backward()
    for use_reentrant in (True, False):
        with anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
            y = checkpoint(net, x, use_reentrant=use_reentrant)
        assert count_hooks() == 2
        with pytest.raises(RuntimeError, match="activation checkpointing"):
            y.sum().backward()
        assert count_hooks() == 0
        with anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
            y = checkpoint(net, x, use_reentrant=use_reentrant)
        del y
        assert count_hooks() == 0


def test_an_exception_closes_the_context():
    net, x = build(), torch.randn(3, 4, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError), anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
            raise KeyError
        with pytest.raises(RuntimeError), anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
            net(x[:, :3])
    assert anynorm.masked.opened == 0
    assert torch.equal(net(x), build()(x))


def test_entered_again_and_called_twice():
    net, x = build(), torch.randn(3, 4, 40)
    context = anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net)
    with context:
        first = net(x)
        with context:
            second = net(x)
        third = net(x)
    with context:
        fourth = net(x)
    assert all(torch.equal(first, other) for other in (second, third, fourth))


def test_contexts_in_each_other():
    net, other, x = build(), build(), torch.randn(3, 4, 40)
    alone = run(net, x, LENGTHS), run(net, x, [40, 40, 3])
    with anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
        with anynorm.masked(anynorm.mask_of([40, 40, 3], 40), model=other):
            assert torch.equal(other(x), alone[1])
        assert torch.equal(net(x), alone[0])


def test_threads_have_their_own():
    net, x, found = build(), torch.randn(3, 4, 40), {}
    barrier = threading.Barrier(3)

    def call(name: str, lengths: list[int] | None) -> None:
        if lengths is None:
            barrier.wait()
            found[name] = net(x)
            barrier.wait()
            return
        with anynorm.masked(anynorm.mask_of(lengths, 40), model=net):
            barrier.wait()
            found[name] = net(x)
            barrier.wait()

    cases = {"plain": None, "one": LENGTHS, "other": [40, 40, 3]}
    threads = [threading.Thread(target=call, args=case) for case in cases.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found["plain"], net(x))
    assert torch.equal(found["one"], run(net, x, LENGTHS))
    assert torch.equal(found["other"], run(net, x, [40, 40, 3]))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("with_norm", [True, False], ids=["norm", "convolutions"])
def test_checkpointing(with_norm, use_reentrant):
    net = build() if with_norm else nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1))
    x, mask = torch.randn(3, 4, 40, requires_grad=True), anynorm.mask_of(LENGTHS, 40)
    with anynorm.masked(mask, model=net):
        y = checkpoint(net, x, use_reentrant=use_reentrant)
        (true,) = torch.autograd.grad(net(x).sum(), x)
        y.sum().backward()
        torch.testing.assert_close(x.grad, true)
        y = checkpoint(net, x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="activation checkpointing computes this"):
        y.sum().backward()
    net(x).sum().backward()


def test_compiled_models():
    torch._dynamo.reset()
    net, x = build(), torch.randn(3, 4, 40)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    plain, inside = compiled(x), run(net, x, LENGTHS)
    torch.testing.assert_close(run(compiled, x, LENGTHS), inside)
    torch.testing.assert_close(run(net, x, LENGTHS), inside)
    torch.testing.assert_close(compiled(x), plain)
    torch._dynamo.reset()
    with anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
        torch.testing.assert_close(torch.compile(net, backend="aot_eager")(x), inside)
    torch.testing.assert_close(compiled(x), plain)


def test_compiled_for_the_first_time_inside():
    """In a process of its own: here torch's compiler has been loaded before."""
    code = """
import sys, torch, anynorm
net = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 3, padding=1), torch.nn.Conv1d(2, 2, 3, padding=1))
x, mask = torch.randn(2, 2, 9), anynorm.mask_of([9, 4], 9)
assert "torch._dynamo" not in sys.modules
with anynorm.masked(mask, model=net):
    y = net(x)
    assert torch.allclose(torch.compile(net, backend="eager")(x), y)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_a_context_inside_compiled_code():
    torch._dynamo.reset()
    net = build()

    @torch.compile(backend="eager")
    def call(x: Tensor) -> Tensor:
        with anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
            return net(x)

    with pytest.raises(RuntimeError, match=r"must be entered outside; got a function from torch\.compile"):
        call(torch.randn(3, 4, 40))


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "model", "error", "sentence"),
    [
        ((AUDIO,), "model", TypeError, "model must be a torch.nn.Module; got str"),
        (({"encoder": AUDIO},), None, TypeError, "masks for each part need the model"),
        (({"coder": AUDIO},), Translator(), ValueError, "parts must be submodules of the model; got 'coder'"),
        (({nn.Linear(1, 1): AUDIO},), Translator(), ValueError, "got Linear"),
        (({"encoder": [3, 4]},), Translator(), TypeError, "masks are needed; got int, int"),
        ((torch.full((2, 3), -torch.inf),), None, ValueError, "masked: mask must be True or 1 .* got -inf"),
    ],
)
def test_masks_and_models(masks, model, error, sentence):
    with pytest.raises(error, match=sentence):
        anynorm.masked(*masks, model=model)


def test_layers_that_no_mask_follows():
    with pytest.raises(ValueError, match=r"0 = MaxPool1d.*no mask can be followed through this layer"):
        run(nn.Sequential(nn.MaxPool1d(2, return_indices=True)), torch.randn(2, 2, 10), [10, 7])
    net = nn.Sequential(nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect"))
    mask = anynorm.mask_of([10, 7], 10).flip(1)
    with pytest.raises(ValueError, match=r"0 = Conv1d.*real positions must come first"):
        with anynorm.masked(mask, model=net):
            net(torch.randn(2, 2, 10))


def test_the_input_by_name():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.convolution(input=x)

    with pytest.raises(TypeError, match=r"convolution = Conv1d.*must be its first argument"):
        run(Net(), torch.randn(2, 2, 10), [10, 7])


class PaddedByHand(nn.Module):
    """What the layer takes away at the ends a function gives back, so that the mask of the input fits again."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 2, 2)
        self.pool, self.last = nn.MaxPool1d(2), nn.Conv1d(8, 4, 3, padding=1)

    def forward(self, x):
        x = nn.functional.pad(self.narrow(x), (1, 1))
        up = self.wide(self.pool(x))
        return self.last(torch.cat([x, nn.functional.pad(up, (0, x.shape[2] - up.shape[2]))], 1))


def test_functions_that_pad_read_zeros_behind_a_sample():
    net, lengths = unsettle(PaddedByHand()), [41, 18, 7]
    x = torch.randn(3, 4, 41)
    out = run(net, x, lengths)
    for sample, length in enumerate(lengths):
        alone = net(x[sample : sample + 1, :, :length])
        torch.testing.assert_close(out[sample : sample + 1, :, :length], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weigh", [nn.Softmax(-1), nn.LogSoftmax(2), nn.Softmin(-1), nn.Softmax(1)], ids=str)
def test_softmax_over_positions(weigh):
    net = unsettle(nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), weigh, nn.Conv1d(4, 4, 3, padding=1)))
    x = torch.randn(3, 4, 40, requires_grad=True)
    out = run(net, x, LENGTHS)
    for sample, length in enumerate(LENGTHS):
        alone = net(x[sample : sample + 1, :, :length])
        torch.testing.assert_close(out[sample : sample + 1, :, :length], alone, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(run(net, x, [40, 18, 0]).square().sum(), x)
    assert gradient.isfinite().all()
    assert not gradient[1, :, 18:].any()


class MeanPool(nn.Module):
    def forward(self, x):
        return x.mean(-1)


class Attends(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.first, self.batch_first = nn.Conv1d(4, 8, 3, padding=1), batch_first
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)

    def forward(self, x, padding=None):
        steps = self.first(x).transpose(1, 2)
        steps = steps if self.batch_first else steps.transpose(0, 1)
        return self.attention(steps, src_key_padding_mask=padding)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_attention_that_was_not_told_is_named(batch_first, training):
    net, x, mask = Attends(batch_first).train(training), torch.randn(3, 4, 40), anynorm.mask_of(LENGTHS, 40)
    with pytest.warns(UserWarning, match=r"layers inside took no mask .*attention \(TransformerEncoderLayer\)") as told:
        with anynorm.masked(mask, model=net):
            net(x)
    assert "LayerNorm" not in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with anynorm.masked(mask, model=net):
            net(x, ~mask)
        with anynorm.masked(torch.ones_like(mask), model=net):
            net(x)


def test_pooling_of_the_users_own_is_named():
    net, x = nn.Sequential(nn.Conv1d(4, 4, 3), MeanPool()), torch.randn(3, 4, 40)
    with pytest.warns(UserWarning, match=r"layers inside took no mask .*got 1 \(MeanPool\)"):
        with anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
            net(x)


@pytest.mark.parametrize("kind", [nn.LayerNorm, anynorm.LayerNorm])
@pytest.mark.parametrize("shape", [(4, 40), 40])
def test_layer_norm_over_positions_is_named_or_refused(kind, shape):
    net, x = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), kind(shape)), torch.randn(3, 4, 40)
    if kind is anynorm.LayerNorm and shape == 40:
        with pytest.raises(ValueError, match=r"no mask of anynorm\.masked fits"):
            run(net, x, LENGTHS)
        return
    with pytest.warns(UserWarning, match=r"layers inside took no mask .*got 1 \(LayerNorm\)"):
        run(net, x, LENGTHS)


def test_empty_sequences_before_a_recurrent_layer():
    net = nn.LSTM(4, 4, batch_first=True)
    with pytest.raises(ValueError, match=r"LSTM.*at least one real step, as in torch; got lengths \[40, 0, 6\]"):
        run(net, torch.randn(3, 40, 4), [40, 0, 6])
