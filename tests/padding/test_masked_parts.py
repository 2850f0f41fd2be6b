"""`anynorm.masked(mask, model=model)`: masks for parts of a model, layers that take none, and what is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import anynorm
from padding.masked_models import LENGTHS, run, unsettle

# ---- several masks ----------------------------------------------------------------------------------------------


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), anynorm.BatchNorm1d(3))
        self.decoder = nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), anynorm.BatchNorm1d(3))

    def forward(self, audio: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(audio), self.decoder(text)


AUDIO, TEXT = anynorm.mask_of([10, 9, 8, 7], 10), anynorm.mask_of([2, 3, 4, 10], 10)


@pytest.mark.filterwarnings("ignore:masked. no layer inside took a mask")
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


# ---- layers that take no mask --------------------------------------------------------------------------------------


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
    with pytest.warns(
        UserWarning, match=r"layers inside took no mask .*attention \(TransformerEncoderLayer\)"
    ) as warned:
        with anynorm.masked(mask, model=net):
            net(x)
    assert "LayerNorm" not in str(warned[0].message)
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
