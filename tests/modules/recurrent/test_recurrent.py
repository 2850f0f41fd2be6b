"""Recurrent layers with norms: equal to torch's without one, to the formula with one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import anynorm
import recurrent_formula as formula
from recurrent_cases import FEATURES, HIDDEN, KINDS, LENGTHS, NORMS, STEPS, draw, every_kind, every_norm, make


def make_neutral(kind: str, theirs: nn.Module, **options) -> nn.Module:
    """Our own walk, with torch's weights and norms that change nothing."""
    layer = make(kind, "batch-per-step", **options)
    assert all("norm" in name for name in layer.load_state_dict(theirs.state_dict(), strict=False).missing_keys)
    for norm in layer.children():
        nn.init.ones_(norm.weight)
        norm.running_var.fill_(1 - norm.eps)
        if norm.bias is not None:
            nn.init.zeros_(norm.bias)
    return layer.eval()


def flatten(found) -> list[torch.Tensor]:
    """Output and states, one after the other."""
    if isinstance(found, PackedSequence):
        return [found.data, found.batch_sizes, *(t for t in (found.sorted_indices,) if t is not None)]
    return [found] if isinstance(found, torch.Tensor) else [t for part in found for t in flatten(part)]


def with_gradients(layer: nn.Module, x: torch.Tensor, hx, call, names: list[str]) -> list[torch.Tensor]:
    """What the call returns, and the gradients of input, first states and the named parameters."""
    leaf = x.clone().requires_grad_()
    first = None if hx is None else tuple(h.clone().requires_grad_() for h in hx)
    found = flatten(call(layer, leaf, first if first is None or len(first) > 1 else first[0]))
    known = dict(layer.named_parameters())
    wanted = [leaf, *(first or ()), *(known[name] for name in names)]
    total = sum((t * draw(*t.shape, seed=k)).sum() for k, t in enumerate(found) if t.requires_grad)
    return [*found, *torch.autograd.grad(total, wanted)]


CALLS = {
    "padded": lambda layer, x, hx: layer(x, hx),
    "packed": lambda layer, x, hx: layer(pack(x, layer, False), hx),
    "sorted": lambda layer, x, hx: layer(pack(x, layer, True), hx),
}


def pack(x: torch.Tensor, layer: nn.Module, enforce_sorted: bool) -> PackedSequence:
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    return pack_padded_sequence(x, lengths, layer.batch_first, enforce_sorted=enforce_sorted)


def run_with_lengths(layer: nn.Module, x: torch.Tensor, hx):
    """`lengths=` for ours, and what it stands for with torch's."""
    if isinstance(layer, anynorm.modules.recurrent.recurrence.Recurrent):
        return layer(x, hx, torch.tensor(LENGTHS))
    output, state = layer(pack(x, layer, False), hx)
    return pad_packed_sequence(output, layer.batch_first, total_length=STEPS)[0], state


CALLS["lengths"] = run_with_lengths
OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "batch_first": True},
    {"bidirectional": True, "bias": False, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "proj_size": 2},
]
CASES = [
    pytest.param(kind, options, id=f"{kind}-{','.join(options) or 'plain'}")
    for kind in KINDS
    for options in OPTIONS
    if kind == "LSTM" or "proj_size" not in options  # torch's GRU has no projections
]


@pytest.mark.parametrize("neutral", [False, True], ids=["no norm", "neutral norm"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_equals_torch(kind, options, call, neutral):
    """Outputs, states and all gradients, with first states; once through our own walk, with norms of no effect."""
    theirs = getattr(nn, kind)(FEATURES, HIDDEN, dtype=torch.float64, **options)
    ours = make_neutral(kind, theirs, **options) if neutral else make(kind, **options)
    if not neutral:
        assert str(ours.load_state_dict(theirs.state_dict(), strict=True)) == "<All keys matched successfully>"
        theirs.load_state_dict(ours.state_dict(), strict=True)
    shape = (len(LENGTHS), STEPS) if "batch_first" in options else (STEPS, len(LENGTHS))
    count = options.get("num_layers", 1) * (1 + ("bidirectional" in options))
    hx = draw(count, len(LENGTHS), options.get("proj_size", HIDDEN), seed=1), draw(count, len(LENGTHS), HIDDEN, seed=2)
    names = list(theirs.state_dict())
    for first in (None, hx if kind == "LSTM" else hx[:1]):
        x = draw(*shape, FEATURES)
        mine, its = (with_gradients(layer, x, first, CALLS[call], names) for layer in (ours, theirs))
        for a, b in zip(mine, its, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch_first", [False, True])
@every_kind
def test_unbatched_equals_torch(kind, batch_first):
    theirs = getattr(nn, kind)(FEATURES, HIDDEN, 2, batch_first=batch_first, dtype=torch.float64)
    x, h = draw(STEPS, FEATURES), draw(2, HIDDEN, seed=1)
    for hx in (None, h if kind == "GRU" else (h, h + 1)):
        for ours in (make(kind, num_layers=2, batch_first=batch_first), make_neutral(kind, theirs, num_layers=2)):
            ours.load_state_dict(theirs.state_dict(), strict=False)
            for a, b in zip(flatten(ours(x, hx)), flatten(theirs(x, hx)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@every_kind
def test_same_seed_same_weights_and_same_class(kind):
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(3, 4, 2, bidirectional=True)
    for norm in (None, *NORMS):
        torch.manual_seed(0)
        ours = getattr(anynorm, kind)(3, 4, 2, bidirectional=True, norm=norm, **NORMS.get(norm, {}))
        assert isinstance(ours, getattr(nn, kind))
        for name, parameter in theirs.named_parameters():
            expected = torch.zeros_like(parameter) if norm and "bias" in name else parameter
            assert torch.equal(getattr(ours, name), expected), name
        for norm_inside in ours.children():
            assert bool((norm_inside.weight == (0.1 if norm == "batch-per-step" else 1)).all())
    ours = make(kind, "batch-per-step")
    ours(draw(3, 2, 3))
    ours.reset_parameters()
    assert bool((ours.norm_ih_l0.weight == 0.1).all()) and not ours.norm_ih_l0.num_batches_per_step.any()
    assert not ours.bias_hh_l0.any() and not ours.norm_ih_l0.running_mean.any()


def run_formula(layer: nn.Module, net: formula.Net, x: torch.Tensor, lengths: list[int], hx: tuple) -> None:
    """Compare one call with the formula; atol = rtol = 1e-12, some thousands of float64's eps."""
    output, state = layer(x, hx if len(hx) > 1 else hx[0], lengths)
    sequences = [x[: lengths[i], i].numpy() for i in range(len(lengths))]
    true, ends = formula.run(net, sequences, tuple(h.numpy() for h in hx))
    for i, rows in enumerate(true):
        np.testing.assert_allclose(output[: lengths[i], i].detach().numpy(), rows, rtol=1e-12, atol=1e-12)
        assert not output[lengths[i] :, i].any()
    for mine, its in zip(state if len(hx) > 1 else [state], ends, strict=True):
        np.testing.assert_allclose(mine.detach().numpy(), its, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@every_norm
@every_kind
def test_equals_the_formula(kind, norm, bias):
    """Ragged batches in training, with a tail of one sequence, running averages, then evaluation on more steps."""
    layer = make(kind, norm, num_layers=2, bidirectional=True, bias=bias)
    state = {name: value.double().numpy().copy() for name, value in layer.state_dict().items()}
    net = formula.Net(kind, norm, state, HIDDEN, 2, 2, layer.max_steps or 0)
    before = copy.deepcopy(state)
    hx = tuple(draw(4, 4, HIDDEN, seed=seed) for seed in ((1, 2) if kind == "LSTM" else (1,)))
    for seed, lengths in enumerate(([3, 2, 3, 1], LENGTHS, [6, 6, 6, 6])):
        run_formula(layer, net, draw(max(lengths) + seed, 4, FEATURES, seed=seed), lengths, hx)
    for name, value in layer.state_dict().items():
        np.testing.assert_allclose(value.numpy(), state[name], rtol=1e-12, atol=1e-12, err_msg=name)
        assert np.array_equal(before[name], state[name]) != any(k in name for k in ("running", "num_")), name
    layer.eval()
    net.training = False
    run_formula(layer, net, draw(9, 4, FEATURES, seed=9), [9, 1, 5, 2], hx)
    for name, value in layer.state_dict().items():
        np.testing.assert_allclose(value.numpy(), state[name], rtol=1e-12, atol=1e-12, err_msg=name)


@every_kind
def test_steps_never_seen_take_the_last_that_was(kind):
    layer = make(kind, "batch-per-step")
    layer(draw(2, 3, FEATURES))  # two of four steps
    assert layer.norm_hh_l0.num_batches_per_step.tolist() == [1, 1, 0, 0]
    state = {name: value.double().numpy().copy() for name, value in layer.state_dict().items()}
    net = formula.Net(kind, "batch-per-step", state, HIDDEN, 1, 1, 4, training=False)
    hx = tuple(torch.zeros(1, 3, HIDDEN, dtype=torch.float64) for _ in range(1 + (kind == "LSTM")))
    run_formula(layer.eval(), net, draw(6, 3, FEATURES, seed=1), [6, 4, 1], hx)
    norm = layer.norm_hh_l0
    assert torch.equal(norm.find_running(5)[0], norm.running_mean[1])
    assert torch.equal(norm.find_running(0)[0], norm.running_mean[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_norm
@every_kind
def test_narrow_types_stay_near_float64(kind, norm, dtype):
    """30 eps of the type: seven steps, each rounding some values of size 1 a few times."""
    exact = make(kind, norm, bidirectional=True)
    layer = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(layer.state_dict())
    x = draw(STEPS, len(LENGTHS), FEATURES).to(dtype)
    found, true = layer(x, lengths=LENGTHS)[0], exact(x.double(), lengths=LENGTHS)[0]
    assert found.dtype == dtype
    tolerance = 30 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), true, rtol=0, atol=tolerance if norm == "layer" else 4 * tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [None, *NORMS])
@every_kind
def test_padding_changes_no_bit(kind, norm, training):
    """pytorch#7032, cooijmans#2: padding ruins late steps. Here it may be any length and hold NaN."""
    layer = make(kind, norm, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float32).train(training)
    twin = copy.deepcopy(layer)
    short = draw(4, STEPS, FEATURES, dtype=torch.float32)
    long = torch.full((4, STEPS + 6, FEATURES), float("nan"))
    for i, length in enumerate(LENGTHS):
        long[i, :length] = short[i, :length]
    results = []
    for net, x in ((layer, short), (twin, long)):
        leaf = x.clone().requires_grad_()
        output, state = net(leaf, lengths=LENGTHS)
        (output[:, :STEPS] * draw(4, STEPS, 2 * HIDDEN, seed=5)).sum().backward()
        assert not output[:, STEPS:].any() and not leaf.grad[:, STEPS:].any()
        assert not any(leaf.grad[i, n:].any() or output[i, n:].any() for i, n in enumerate(LENGTHS))
        gradients = [leaf.grad[:, :STEPS], *(p.grad for p in net.parameters())]
        results.append([output[:, :STEPS], *flatten([state]), *gradients, *net.buffers()])
    assert all(torch.isfinite(t).all() for t in results[0])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@every_kind
def test_batch_mates_do_not_matter_to_layer_norm_and_evaluation(kind):
    for norm in NORMS:
        layer = make(kind, norm, bidirectional=True).train(norm == "layer")
        x = draw(STEPS, 4, FEATURES)
        together = layer(x, lengths=LENGTHS)[0]
        for i, length in enumerate(LENGTHS):
            alone = layer(x[:length, i])[0]
            torch.testing.assert_close(together[:length, i], alone, rtol=1e-12, atol=1e-12)


@every_norm
@every_kind
def test_padded_packed_and_lengths_agree(kind, norm):
    layer = make(kind, norm, num_layers=2, bidirectional=True)
    x = draw(STEPS, 4, FEATURES)
    output, state = copy.deepcopy(layer)(x, lengths=LENGTHS)
    packed, packed_state = copy.deepcopy(layer)(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
    assert torch.equal(output, pad_packed_sequence(packed)[0])
    assert all(map(torch.equal, flatten([state]), flatten([packed_state])))
    torch.testing.assert_close(copy.deepcopy(layer)(x)[0], copy.deepcopy(layer)(x, lengths=[STEPS] * 4)[0])


@every_norm
@every_kind
def test_gradients(kind, norm):
    """Against differences in float64. The tail of one sequence takes running averages, which momentum=0 holds still."""
    layer = make(kind, norm, bidirectional=True, momentum=0.0)
    names, parameters = zip(*layer.named_parameters())

    def call(x, *values):
        output, state = torch.func.functional_call(layer, dict(zip(names, values)), (x, None, [3, 2, 1]))
        return output, *flatten([state])

    for training in (True, False):
        layer.train(training)
        assert torch.autograd.gradcheck(call, (draw(3, 3, FEATURES).requires_grad_(), *parameters), fast_mode=True)


@pytest.mark.parametrize(("kind", "norm"), [("LSTM", "layer"), ("GRU", "batch-sequence"), ("LSTM", "batch-per-step")])
def test_second_derivatives(kind, norm):
    layer = make(kind, norm, momentum=0.0)
    weight = layer.weight_hh_l0

    def call(x, weight):
        return torch.func.functional_call(layer, {"weight_hh_l0": weight}, (x, None, [3, 2]))[0]

    assert torch.autograd.gradgradcheck(call, (draw(3, 2, FEATURES).requires_grad_(), weight), fast_mode=True)


def test_a_step_of_one_sequence_takes_the_running_averages_and_leaves_them():
    layer = make("LSTM", "batch-per-step")
    layer(draw(4, 3, FEATURES))
    before = copy.deepcopy(layer.state_dict())
    layer(draw(4, 3, FEATURES, seed=1), lengths=[4, 2, 2])
    for name, value in layer.state_dict().items():
        if "running" in name or "num_" in name:
            assert torch.equal(value[2:], before[name][2:]) and not torch.equal(value[:2], before[name][:2])


def test_later_steps_share_the_last_averages():
    layer = make("GRU", "batch-per-step")
    layer(draw(6, 3, FEATURES))
    assert layer.norm_ih_l0.num_batches_per_step.tolist() == [1, 1, 1, 3]


def test_cumulative_average():
    layer = make("LSTM", "batch-per-step", momentum=None)
    seen = []
    for seed in range(3):
        x = draw(3, 5, FEATURES, seed=seed)
        layer(x)
        seen.append((x[2] @ layer.weight_ih_l0.T).mean(0))
    torch.testing.assert_close(layer.norm_ih_l0.running_mean[2], sum(seen) / 3)


def test_dropout_between_layers_in_training_only():
    layer = make("GRU", "layer", num_layers=2, dropout=1.0)
    a, b = draw(3, 2, FEATURES), draw(3, 2, FEATURES, seed=1)
    assert torch.equal(layer(a)[0], layer(b)[0])
    assert not torch.equal(layer.eval()(a)[0], layer(b)[0])
