"""Norms of other packages: what is taken is proved first, what differs is left, and all else of the module stays."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import anynorm
from anynorm.modules.adapted import Adapted
from anynorm.surgery import adapters


@pytest.fixture(autouse=True)
def forget_what_a_test_registers(monkeypatch):
    monkeypatch.setattr(adapters, "KNOWN", list(adapters.KNOWN))


class Llama(nn.Module):
    def __init__(self, size=8, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

    def forward(self, hidden_states):
        kind = hidden_states.dtype
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(kind)


class Gemma(nn.Module):
    def __init__(self, size=8, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), eps

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class BatchAct(nn.BatchNorm2d):
    def __init__(self, *arguments, act=None, drop=None, **options):
        super().__init__(*arguments, **options)
        self.drop, self.act = drop or nn.Identity(), act or nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Frozen(nn.Module):
    def __init__(self, size=8):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((size,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class Trivial(nn.BatchNorm1d):
    """Nothing of its own."""


CASES = {
    "llama": (Llama, {"norm": "rms", "eps": "variance_epsilon"}, (2, 3, 8)),
    "gemma": (Gemma, {"norm": "rms", "weight_offset": 1}, (2, 3, 8)),
    "channels": (lambda: ChannelsFirst(8), {"norm": "layer", "channel_axis": 1}, (2, 8, 3, 4)),
    "batch": (lambda: BatchAct(8), {"norm": "batch", "then": ("drop", "act")}, (2, 8, 3, 4)),
    "frozen": (Frozen, {"norm": "frozen", "eps": 1e-5}, (2, 8, 3, 4)),
    "group": (lambda: type("Own", (nn.GroupNorm,), {})(2, 8), {"norm": "group"}, (2, 8, 3, 4)),
    "trivial": (lambda: Trivial(8), None, (4, 8)),
}


def make(name, told="register"):
    build, options, shape = CASES[name]
    torch.manual_seed(0)
    model = nn.Sequential(build())
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape) + 0.5)
    if options is not None and told == "register":
        anynorm.register(type(model[0]), **options)
    return model, torch.randn(shape)


def run(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *[p.grad for p in model.parameters()], *[b.clone() for b in model.buffers()]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("told", ["register", "trust"])
@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_and_a_way_back(name, told, training):
    model, x = make(name, told)
    theirs = copy.deepcopy(model).train(training)
    kind, ids = type(model[0]), [id(t) for t in (model[0], *model.parameters(), *model.buffers())]
    report = anynorm.accelerate(model.train(training), trust=(kind,) if told == "trust" else ())
    assert len(report.changed) == 1, report
    assert isinstance(model[0], kind)
    assert isinstance(model[0], Adapted)
    assert [id(t) for t in (model[0], *model.parameters(), *model.buffers())] == ids
    for one, other in zip(run(model, x), run(theirs, x), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-5)
    assert anynorm.accelerate(model).changed == []
    anynorm.accelerate(model, undo=True)
    assert type(model[0]) is kind
    assert vars(model[0]).keys() == vars(theirs[0]).keys()


@pytest.mark.parametrize("name", CASES)
def test_copies_files_and_checkpoints(name):
    model, x = make(name)
    state = copy.deepcopy(model.state_dict())
    anynorm.accelerate(model)
    assert type(copy.deepcopy(model)[0]) is type(model[0])
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    if "<locals>" in type(model[0]).__qualname__ or name == "group":
        return  # a class that was made in a function cannot be pickled by anybody
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin.eval()(x), model.eval()(x))


class Twice(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, hidden_states, gate=None):
        return Llama.forward(self, hidden_states if gate is None else hidden_states * gate)


class Counting(nn.BatchNorm2d):
    def forward(self, x):
        y = super().forward(x)
        self.num_batches_tracked.add_(1)
        return y


class Broken(nn.LayerNorm):
    def forward(self, x):
        raise RuntimeError("never works")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Twice(8), "it computes something else: its output in training differs"),
        (Gated(), "takes more than its input (gate)"),
        (Counting(8), "its num_batches_tracked in training differs"),
        (Broken(8), "it could not be compared: never works"),
        (Twice(8, device="meta"), "on the meta device"),
    ],
)
def test_what_differs_is_left_with_the_reason(module, reason):
    kind, random_state = type(module), torch.get_rng_state()
    before = copy.deepcopy(module.state_dict())
    report = anynorm.accelerate(module, trust=(kind,))
    assert report.changed == []
    assert reason in report.left[0].reason
    assert type(module) is kind
    if not module.weight.is_meta:
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_unknown_class_is_left_and_named():
    (left,) = anynorm.accelerate(nn.Sequential(type("OwnNorm", (Llama,), {})())).left
    assert "anynorm.register(OwnNorm, ...)" in left.reason


def test_where_a_class_rounds_otherwise_it_is_said():
    model, _ = make("llama")
    assert "rounded once, theirs more often" in str(anynorm.accelerate(model))
    model, _ = make("gemma")
    assert "rounded" not in str(anynorm.accelerate(model))


def test_mixed_dtypes_are_left_to_their_own_forward():
    model, x = make("llama")
    theirs = copy.deepcopy(model)
    anynorm.accelerate(model)
    assert model(x.bfloat16()).dtype == theirs(x.bfloat16()).dtype == torch.float32
    assert torch.equal(model(x.bfloat16()), theirs(x.bfloat16()))
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_hooks_names_and_keywords_go_on():
    model, x = make("llama")
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    anynorm.accelerate(model)
    assert torch.equal(model[0](hidden_states=x), model(x))
    assert calls == [1, 1]
    with pytest.raises(TypeError, match="takes one input; got 2"):
        model[0](x, x)


def test_masks_recalibration_and_ranks_know_them():
    model, x = make("batch")
    plain = copy.deepcopy(model)
    anynorm.recalibrate(plain, [x])
    anynorm.accelerate(model)
    anynorm.recalibrate(model, [x])
    assert torch.equal(model[0].running_var, plain[0].running_var)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, :, 2:] = False
    y = model.train()[0](x, mask=mask)
    assert not y[1, :, :, 2:].any()
    assert torch.equal(y, model[0](x.masked_fill(~mask[:, None], 7.0), mask=mask))
    kind = type(model[0])
    for ranks in (model, make("batch")[0]):
        before, expected = type(ranks[0]), copy.deepcopy(ranks).eval()(x)
        assert len(anynorm.sync(ranks).changed) == 1
        assert isinstance(ranks[0], anynorm.modules.sync._Synchronized)
        assert isinstance(ranks[0], BatchAct)
        torch.testing.assert_close(ranks.eval()(x), expected)
        anynorm.sync(ranks, undo=True)
        assert type(ranks[0]) is before
    assert type(model[0]) is kind


@pytest.mark.parametrize("drop", [None, nn.Dropout(0.5)])
def test_an_activation_that_a_norm_holds_is_fused(drop):
    model = nn.Sequential(BatchAct(8, act=nn.SiLU(), drop=drop))
    anynorm.register(BatchAct, "batch", then=("drop", "act"))
    x = torch.randn(2, 8, 3, 4)
    expected = copy.deepcopy(model)(x) if drop is None else None
    report = anynorm.accelerate(model, fuse=True)
    assert [entry.then for entry in report.fused] == (["silu"] if drop is None else [])
    if drop is None:
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        assert model[0].fused_activation == "silu"
    anynorm.accelerate(model, undo=True)
    assert "fused_activation" not in vars(model[0])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((3, "rms"), TypeError, "kind must be a class of modules"),
        ((Llama, "rsm"), ValueError, "norm must be one of batch"),
    ],
)
def test_what_cannot_be_registered(arguments, error, text):
    with pytest.raises(error, match=text):
        anynorm.register(*arguments)
    with pytest.raises(ValueError, match="channel_axis must be -1 or 1; got 2"):
        anynorm.register(Llama, "rms", channel_axis=2)


class Shifted(nn.BatchNorm2d):
    """Takes any number of axes, and has an attribute that ours would use for something else."""

    def _check_input_dim(self, input):
        pass


class Absolute(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.abs(), self.bias, self.eps)


class Gain(nn.LayerNorm):
    """What it computes depends on a tensor that is no buffer."""

    def __init__(self, gain):
        super().__init__(8)
        self.gain = torch.tensor(gain)

    def forward(self, x):
        return super().forward(x) * self.gain


def test_methods_of_theirs_that_ours_override_count():
    model, x = nn.Sequential(Shifted(8)), torch.randn(4, 8, 5)
    expected = copy.deepcopy(model)(x)
    assert len(anynorm.accelerate(model).changed) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_attributes_of_theirs_that_ours_would_take_are_a_reason():
    model = nn.Sequential(Trivial(8))
    model[0].label = "mine"
    (left,) = anynorm.accelerate(model).left
    assert "attributes that ours need for something else (label)" in left.reason
    assert model[0].label == "mine"


def test_what_positive_weights_would_hide_is_seen():
    assert "computes something else" in anynorm.accelerate(Absolute(8), trust=(Absolute,)).left[0].reason


def test_a_proof_is_not_taken_for_a_module_that_holds_other_tensors():
    model = nn.Sequential(Gain(1.0), Gain(2.0))
    report = anynorm.accelerate(model, trust=(Gain,))
    assert [entry.name for entry in report.changed] == ["0"]
    assert [entry.name for entry in report.left] == ["1"]


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_what_is_in_force_around_the_call_does_not_count(around):
    model, _ = make("batch")
    with around():
        assert len(anynorm.accelerate(model).changed) == 1


def test_hooks_of_what_a_norm_holds_do_not_see_the_proof():
    model, x = make("batch")
    calls = []
    model[0].act.register_forward_hook(lambda *_: calls.append(1))
    assert len(anynorm.accelerate(model, fuse=True).changed) == 1
    assert calls == []
    model(x)
    assert calls == [1]  # not fused: the hook would see nothing


def test_masks_where_the_features_are_on_axis_1():
    model, x = make("channels")
    anynorm.accelerate(model)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, :, 2:] = False
    y = model[0](x, mask=mask)
    assert not y[1, :, :, 2:].any()
    torch.testing.assert_close(y[0], model[0](x)[0])


def test_synchronized_norms_are_undone_by_sync_first():
    model, _ = make("batch")
    anynorm.accelerate(model)
    report = anynorm.sync(model)
    assert "anynorm, batch norm, then drop and act" in str(report)
    (left,) = anynorm.accelerate(model, undo=True).left
    assert "anynorm.sync(model, undo=True) comes first" in left.reason


def test_fusing_twice_reports_once_and_nothing_behind_is_nothing_to_fuse():
    model, _ = make("batch")
    assert len(anynorm.accelerate(model, fuse=True).fused) == 1
    assert anynorm.accelerate(model, fuse=True).fused == []
    model, _ = make("batch")
    del model[0].act, model[0].drop
    type(model[0]).forward, forward = nn.BatchNorm2d.forward, type(model[0]).forward
    try:
        assert anynorm.accelerate(model, fuse=True).fused == []
    finally:
        BatchAct.forward = forward
