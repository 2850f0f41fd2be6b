"""Recurrent layers with norms: what they refuse, copies, compilers, dtypes."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn as nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import anynorm
from anynorm import UserError
from anynorm.modules.recurrent.packing import find_flip
from anynorm.torch_private import TORCH
from recurrent_cases import FEATURES, HIDDEN, LENGTHS, draw, every_kind, every_norm, make

X, PACKED = torch.zeros(5, 2, 3), pack_padded_sequence(torch.zeros(5, 2, 3), [5, 2])
FAULTS = {
    "LSTM: norm must be one of 'layer', 'batch-per-step', 'batch-sequence' or None; got 'batch'; choose one of them":
        (UserError, lambda: anynorm.LSTM(3, 4, norm="batch")),
    "GRU: norm='batch-per-step' needs max_steps, how many steps have statistics of their own; got None; "
    "try the length of most sequences, max_steps=100":
        (UserError, lambda: anynorm.GRU(3, 4, norm="batch-per-step")),
    "LSTM: max_steps is for norm='batch-per-step'; got norm='layer'; leave max_steps out":
        (UserError, lambda: anynorm.LSTM(3, 4, norm="layer", max_steps=3)),
    "LSTM: max_steps must be a whole number of 1 or more; got 0; try 100":
        (UserError, lambda: anynorm.LSTM(3, 4, norm="batch-per-step", max_steps=0)),
    "LSTM: on_single must be 'running' or 'error'; got 'skip'; the default is 'running'":
        (UserError, lambda: anynorm.LSTM(3, 4, norm="batch-per-step", max_steps=3, on_single="skip")),
    "LSTM: eps must be positive; got 0.0; the default is 1e-5":
        (UserError, lambda: anynorm.LSTM(3, 4, norm="layer", eps=0.0)),
    "LSTM: lengths belong to a padded batch, a 3D input; got 2D input; leave lengths out":
        (ValueError, lambda: anynorm.LSTM(3, 4)(X[0], lengths=[2])),
    "LSTM: lengths belong to a padded batch, a 3D input; got PackedSequence; leave lengths out":
        (ValueError, lambda: anynorm.LSTM(3, 4)(PACKED, lengths=[5, 2])),
    "LSTM: lengths must be whole numbers; got torch.float32; count the steps of each sequence":
        (RuntimeError, lambda: anynorm.LSTM(3, 4)(X, lengths=torch.ones(2))),
    "LSTM: lengths must have one number per sequence; got shape (3,), batch=2; pass 2 numbers":
        (RuntimeError, lambda: anynorm.LSTM(3, 4)(X, lengths=[1, 2, 3])),
    "LSTM: lengths must be from 1 to the number of steps; got 6 where the input has 5 steps; "
    "leave empty sequences out of the batch":
        (RuntimeError, lambda: anynorm.LSTM(3, 4)(X, lengths=[1, 6])),
    "LSTM: lengths must be from 1 to the number of steps; got 0 where the input has 5 steps; "
    "leave empty sequences out of the batch":
        (RuntimeError, lambda: anynorm.LSTM(3, 4)(X, lengths=[0, 5])),
    "GRU: input must be 2D (steps, features) or a 3D batch; got 4D input of shape (1, 5, 2, 3); add or join axes":
        (ValueError, lambda: anynorm.GRU(3, 4, norm="layer")(X[None])),
    "GRU: input must have at least 1 step and 1 sequence; got shape (0, 2, 3); leave empty batches out":
        (RuntimeError, lambda: anynorm.GRU(3, 4, norm="layer")(X[:0])),
    "LSTM.norm_ih_l0: statistics need more than 1 sequence in training, or every output is beta; got a batch of 1; "
    "use a larger batch, drop a last batch of one with DataLoader(drop_last=True), or call eval()":
        (ValueError, lambda: make("LSTM", "batch-per-step")(X[:, :1].double())),
    "LSTM.norm_ih_l0: on_single='error' needs more than 1 sequence at each step in training; got 1 of 2 sequences at "
    "step 2; cut sequences to similar lengths, or take on_single='running'":
        (ValueError, lambda: make("LSTM", "batch-per-step", on_single="error")(X.double(), lengths=[2, 5])),
    "GRU.norm_ih_l0: statistics need more than 1 valid step in training; got 1 sequence of 1 step; "
    "use a larger batch or call eval()":
        (ValueError, lambda: make("GRU", "batch-sequence")(X[:1, :1].double())),
}  # fmt: skip


@pytest.mark.parametrize("text", FAULTS)
def test_text(text):
    kind, call = FAULTS[text]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text


@pytest.mark.parametrize(
    "call",
    [
        lambda layer: layer(torch.zeros(5, 2, 4)),
        lambda layer: layer(torch.zeros(5, 2, 3, dtype=torch.float64)),
        lambda layer: layer(X, (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))),
        lambda layer: layer(X, (torch.zeros(1, 2, 4), torch.zeros(1, 2, 5))),
        lambda layer: layer(X[:, 0], (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))),
        lambda layer: layer(X[:0]),
        lambda layer: layer(X[None]),
        lambda layer: type(layer)(0, 4),
        lambda layer: type(layer)(3, 4, dropout=2.0),
        lambda layer: type(layer)(3, 4, bias=1),
    ],
)
def test_faults_have_torchs_type(call):
    try:
        call(nn.LSTM(3, 4))
    except Exception as error:
        theirs = type(error)
    else:
        assert TORCH < (2, 13)
        pytest.skip("older torch, as 2.8 and 2.10, raises nothing here")
    with pytest.raises(theirs):
        call(anynorm.LSTM(3, 4, norm="layer"))


@pytest.mark.parametrize("norm", [None, "layer"])
def test_states_of_too_many_sequences_are_refused(norm):
    """torch takes those of the first sequences in silence where the input is packed."""
    h = torch.zeros(1, 3, 4)
    nn.GRU(3, 4)(pack_padded_sequence(X, [2, 5], enforce_sorted=False), h)
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 2, 4\), got \[1, 3, 4\]"):
        anynorm.GRU(3, 4, norm=norm)(X, h, [2, 5])


def test_a_refused_batch_changes_nothing():
    for layer in (make("LSTM", "batch-per-step", on_single="error", num_layers=2), make("GRU", "batch-sequence")):
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError):
            layer(draw(1, 1, FEATURES))
        assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
        assert layer.eval()(draw(1, 1, FEATURES))[0].shape == (1, 1, HIDDEN)


@every_norm
@every_kind
def test_pickle_copy_repr_and_checkpoint(kind, norm):
    layer = make(kind, norm, bidirectional=True)
    layer(draw(5, 3, FEATURES))
    twin = make(kind, norm, seed=1, bidirectional=True)
    twin.load_state_dict(layer.state_dict(), strict=True)
    x = draw(5, 2, FEATURES, seed=1)
    for other in (twin, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.eval()(x)[0], copy.deepcopy(layer).eval()(x)[0])
    assert f"{kind}(\n  3, 4, bidirectional=True, norm='{norm}', eps=1e-05" in repr(layer)
    assert ("max_steps=4, on_single='running'" in repr(layer)) == (norm == "batch-per-step")


def test_a_negative_variance_in_a_checkpoint_is_refused():
    layer = make("LSTM", "batch-per-step")
    state = layer.state_dict()
    state["norm_hh_l0.running_var"] = -state["norm_hh_l0.running_var"]
    with pytest.raises(RuntimeError, match=r"norm_hh_l0\.running_var must not be negative; got -1"):
        layer.load_state_dict(state)


class Reader(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, _ = self.layer(x * 2)
        return output.tanh()


@pytest.mark.parametrize("norm", ["layer", "batch-per-step"])
def test_compiled_and_traced_equal_eager(norm):
    """torch.compile leaves torch's recurrent classes to eager code; FX records the layer's call."""
    torch.compiler.reset()
    net = Reader(make("LSTM", norm))
    twins = [copy.deepcopy(net) for _ in range(2)]
    x = draw(3, 3, FEATURES)
    expected = net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(twins[0], backend="eager")(x)
    traced = torch.fx.symbolic_trace(twins[1])
    assert [node.op for node in traced.graph.nodes].count("call_module") == 1
    for found, twin in ((compiled, twins[0]), (traced(x), traced)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(twin.buffers(), net.buffers(), strict=True):
            torch.testing.assert_close(a, b)


@every_norm
@every_kind
def test_autocast_no_grad_and_meta(kind, norm):
    layer = make(kind, norm, dtype=torch.float32)
    x = draw(5, 3, FEATURES, dtype=torch.float32)
    expected = copy.deepcopy(layer)(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = copy.deepcopy(layer)(x)
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.1)
    with torch.inference_mode():
        torch.testing.assert_close(copy.deepcopy(layer)(x)[0], expected)
    assert copy.deepcopy(layer).to("meta")(x.to("meta"), lengths=[5, 2, 2])[0].shape == (5, 3, HIDDEN)


def test_two_forwards_before_a_backward():
    """pytorch#175024: nothing saved for backward aliases a running average."""
    layer = make("LSTM", "batch-per-step")
    first, second = (layer(draw(5, 3, FEATURES, seed=s), lengths=[5, 3, 2])[0] for s in (0, 1))
    (first.sum() + second.sum()).backward()
    assert torch.isfinite(layer.weight_hh_l0.grad).all()


def test_flip_is_its_own_way_back_and_turns_each_sequence():
    packed = pack_padded_sequence(torch.arange(28).reshape(7, 4), LENGTHS, enforce_sorted=False)
    flip = find_flip(packed.batch_sizes)
    assert torch.equal(flip[flip], torch.arange(len(flip)))
    turned, _ = pad_packed_sequence(packed._replace(data=packed.data[flip]))
    for i, length in enumerate(LENGTHS):
        assert turned[:length, i].tolist() == [4 * t + i for t in reversed(range(length))]
