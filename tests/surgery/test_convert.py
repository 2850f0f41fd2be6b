"""Norms become others with their gamma, beta and eps, start near the old function, or are left with the reason."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.utils.prune

import anynorm
from anynorm.surgery.conversion import find_group_count

X = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def network(norm=nn.BatchNorm2d, **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), norm(12, eps=1e-3, **options), nn.ReLU(), nn.Conv2d(12, 6, 3), norm(6), nn.Flatten(1)
    )
    for _ in range(30):
        model(X)
    for i in (1, 4):
        if model[i].weight is not None:
            model[i].weight.data.uniform_(-1.5, 1.5)
            model[i].bias.data.normal_()
    return model


EXPECTED = {
    "group": anynorm.GroupNorm,
    "layer": anynorm.GroupNorm,
    "rms": anynorm.AnyNorm,
    "instance": anynorm.InstanceNorm2d,
    "ghost": anynorm.GhostBatchNorm2d,
    "renorm": anynorm.BatchRenorm2d,
    "sync": anynorm.SyncBatchNorm,
    "identity": nn.Identity,
}


@pytest.mark.parametrize("to", EXPECTED)
def test_every_kind(to):
    model = network()
    weights = [model[i].weight for i in (1, 4)]
    old = copy.deepcopy(model)
    report = anynorm.convert(model, to, example=X)
    assert [entry.name for entry in report.changed] == ["1", "4"]
    assert not report.left
    assert type(model[1]) is EXPECTED[to]
    assert len(report.differences) == 1
    if to == "identity":
        return
    assert (model[1].eps, model[4].eps) == (1e-3, 1e-5)
    assert model[1].training
    if to in ("ghost", "renorm", "sync"):
        assert report.differences[0].relative < 1e-6
        assert torch.equal(model[1].running_var, old[1].running_var)
        assert model[1].momentum == 0.1
    assert [model[i].weight for i in (1, 4)] == weights or to == "rms"
    if to == "instance":
        assert torch.equal(model[1].weight, old[1].weight)


@pytest.mark.parametrize(("to", "groups"), [("group", 3), ("layer", 1), ("rms", 1)])
def test_it_computes_the_old_function_where_a_sample_is_average(to, groups):
    """A sample whose groups have just the mean and variance that the running averages say gives the same output."""
    channels, positions = 6, 4000
    rng = np.random.default_rng(0)
    norm = nn.BatchNorm1d(channels, eps=1e-2)
    mean, std = rng.normal(size=channels), rng.uniform(0.5, 2, size=channels)
    norm.running_mean = torch.tensor(mean, dtype=torch.float32)
    norm.running_var = torch.tensor(std**2, dtype=torch.float32)
    norm.weight.data = torch.tensor(rng.normal(size=channels), dtype=torch.float32)
    norm.bias.data = torch.tensor(rng.normal(size=channels), dtype=torch.float32)
    z = rng.normal(size=(channels, positions))
    z = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
    x = torch.tensor(z * std[:, None] + mean[:, None], dtype=torch.float32)[None]
    expected = norm.eval()(x)
    model = nn.Sequential(norm)
    report = anynorm.convert(model, to, example=x, **({"num_groups": groups} if to == "group" else {}))
    assert report.differences[0].relative < 1e-5
    assert torch.allclose(model(x), expected, atol=1e-4)


def test_it_starts_nearer_than_gamma_and_beta_alone():
    model = network().eval()
    bare = copy.deepcopy(model)
    for i in (1, 4):
        norm = bare[i]
        bare[i] = nn.GroupNorm(3, norm.num_features, norm.eps)
        bare[i].load_state_dict({"weight": norm.weight, "bias": norm.bias})
    expected = model(X)
    report = anynorm.convert(model, "group", num_groups=3, example=X)
    nearer = (model(X) - expected).square().mean()
    assert nearer < 0.8 * (bare(X) - expected).square().mean()
    assert report.differences[0].mean == pytest.approx(float((model(X) - expected).detach().abs().mean()), rel=1e-4)


def test_numbers_of_groups():
    assert [find_group_count(c, 32) for c in (1, 2, 3, 7, 8, 48, 64, 96, 512)] == [1, 1, 1, 1, 4, 24, 32, 32, 32]
    assert find_group_count(512, 8) == 8
    model = network()
    anynorm.convert(model, "group", num_groups=4)
    assert (model[1].num_groups, model[4].num_groups) == (4, 3)


def test_parameters_hooks_mode_and_sharing_stay():
    norm = nn.BatchNorm2d(4).eval()
    norm.bias.requires_grad_(False)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm, nn.ReLU())})
    calls = []
    handle = norm.register_forward_hook(lambda *_: calls.append(1))
    anynorm.convert(model, "group")
    assert model["a"] is model["b"][0]
    assert not model["a"].training
    assert [p.requires_grad for p in model["a"].parameters()] == [True, False]
    model["a"](torch.randn(2, 4, 3, 3))
    assert calls == [1]
    handle.remove()
    model["a"](torch.randn(2, 4, 3, 3))
    assert calls == [1]


def test_without_gamma_and_beta():
    norm = nn.BatchNorm2d(6, affine=False)
    norm.running_mean = torch.randn(6)
    norm.running_var = torch.rand(6) + 0.5
    x = torch.randn(4, 6, 5, 5)
    model = nn.Sequential(norm)
    report = anynorm.convert(model, "group", example=x)
    assert model[0].weight.requires_grad
    assert report.differences[0].relative < 1.0
    anynorm.convert(model, "identity")
    assert type(model[0]) is nn.Identity


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = network().to(dtype)
    report = anynorm.convert(model, "group", example=X.to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert report.differences[0].dtype is dtype


def test_fused_norms_keep_their_activation():
    x = torch.randn(4, 8, 5, 5)
    model = nn.Sequential(anynorm.BatchNormAct2d(8, activation="silu"), anynorm.LayerNormAct(5, activation="relu"))
    model(x)
    kinds = {"ghost": "GhostBatchNormAct2d", "renorm": "BatchRenormAct2d", "sync": "SyncBatchNormAct"}
    for to, name in {
        **kinds,
        "group": "GroupNormAct",
        "layer": "GroupNormAct",
        "instance": "InstanceNormAct2d",
    }.items():
        report = anynorm.convert(model, to, copy=True, example=x)
        assert type(report.model[0]).__name__ == name
        assert report.model[0].activation == "silu"
        if to in kinds:
            assert report.differences[0].relative < 1e-6
    report = anynorm.convert(model, "rms", copy=True)
    assert "it applies silu too" in report.left[0].reason
    assert "it applies silu too" in anynorm.convert(model, "identity", copy=True).left[0].reason


def test_norms_over_features():
    model = nn.Sequential(nn.LayerNorm(6), nn.RMSNorm(6), nn.LayerNorm(6, bias=False))
    model[2].weight.data.normal_()
    reasons = {e.name: e.reason for e in anynorm.convert(model, "group", copy=True).left}
    assert reasons["0"] == "its features are the last axes of its input; group norm is over channels at axis 1"
    report = anynorm.convert(model, "rms", copy=True)
    assert type(report.model[2]) is anynorm.RMSNorm
    assert torch.equal(report.model[2].weight, model[2].weight)
    assert {e.name: e.reason for e in report.left} == {
        "0": "RMS norm has no beta, and it has one",
        "1": "it is such a norm already",
    }
    report = anynorm.convert(model, "layer", copy=True)
    assert [e.name for e in report.changed] == ["1"]
    assert report.model[1].bias is None
    assert report.model[1].eps == torch.finfo(torch.float32).eps


def test_back_to_batch_norm():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())
    report = anynorm.convert(model, "batch")
    assert "pass an example" in report.left[0].reason
    report = anynorm.convert(model, "batch", example=X)
    assert type(model[1]) is anynorm.BatchNorm2d
    assert "anynorm.recalibrate(model, loader)" in report.note
    anynorm.recalibrate(model, [X])
    assert model[1].running_mean.abs().sum() > 0


def test_groups_of_one_element_are_refused():
    dense = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert "pass an example" in anynorm.convert(dense, "instance").left[0].reason
    x = torch.randn(5, 3)
    assert "groups of one element" in anynorm.convert(dense, "instance", example=x).left[0].reason
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    assert "groups of one element" in anynorm.convert(pooled, "instance", example=X).left[0].reason
    single = nn.Sequential(nn.BatchNorm1d(1))
    report = anynorm.convert(single, "group", example=torch.randn(5, 1))
    assert "groups of one element, whose output is always beta; got input (5, 1)" in report.left[0].reason
    assert len(anynorm.convert(dense, "group", example=x).changed) == 1


def test_what_is_left_and_why():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    tied = nn.BatchNorm2d(4)
    model = nn.ModuleDict(
        {
            "own": Own(4),
            "patched": nn.BatchNorm2d(4),
            "lazy": nn.LazyBatchNorm2d(),
            "parametrized": nn.BatchNorm2d(4),
            "tied": tied,
            "other": nn.GroupNorm(2, 4),
            "frozen": nn.BatchNorm2d(4),
        }
    )
    model["patched"].forward = lambda x: x
    nn.utils.parametrize.register_parametrization(model["parametrized"], "weight", nn.Softplus())
    model["other"].weight = tied.weight
    anynorm.freeze(model, where="frozen")
    report = anynorm.convert(model, "layer")
    reasons = {entry.name: entry.reason for entry in report.left}
    assert not report.changed
    assert "code of its own" in reasons["own"]
    assert "replaced on the object" in reasons["patched"]
    assert "has not seen an input" in reasons["lazy"]
    assert "parametrized" in reasons["parametrized"]
    assert reasons["tied"] == reasons["other"] == "its gamma or beta is shared with another module"
    assert "anynorm.unfreeze(model) comes first" in reasons["frozen"]
    alone = anynorm.convert(nn.BatchNorm2d(4), "group")
    assert "it is the model itself" in alone.left[0].reason


def test_what_cannot_be_asked():
    model = network()
    with pytest.raises(anynorm.UserError, match=r"to must be one of batch, ghost, .*; got 'groupnorm'"):
        anynorm.convert(model, "groupnorm")
    with pytest.raises(TypeError, match="convert: 'group' takes num_groups; got groups; leave it out"):
        anynorm.convert(model, "group", groups=4)
    with pytest.raises(anynorm.UserError, match="DataParallel; call it on the model inside"):
        anynorm.convert(nn.DataParallel(model), "group")


def test_strict_keeps_the_old_norms():
    model = network()
    norm, value = model[1], model[1].weight.detach().clone()
    with pytest.raises(anynorm.NotProved, match="the model is as it was"):
        anynorm.convert(model, "group", example=X, strict=True, tolerance=1e-3)
    assert model[1] is norm
    assert torch.equal(norm.weight, value)
    assert anynorm.convert(model, "group", example=X, strict=True, tolerance=5.0).differences


def test_where():
    model = network()
    anynorm.convert(model, "group", where="4")
    assert [type(model[i]).__name__ for i in (1, 4)] == ["BatchNorm2d", "GroupNorm"]


def test_norms_that_torch_reads_past_any_call_are_left():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    before = model(x)
    report = anynorm.convert(model, "identity")
    assert ["fast path" in entry.reason for entry in report.left] == [True, True]
    assert torch.equal(model(x), before)


def test_hooks_of_backward_are_called_as_before():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    seen = []
    model[1].register_full_backward_hook(lambda module, given, made: seen.append((type(module), given[0].shape)))
    anynorm.convert(model, "group")
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert seen == [(anynorm.GroupNorm, (2, 4, 2, 2))]


def test_gamma_that_a_hook_computes():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[0])
    nn.utils.prune.l1_unstructured(model[1], "weight", 1)
    report = anynorm.convert(model, "group")
    assert ["computed by a hook" in entry.reason for entry in report.left] == [True, True]
    assert model(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)


def test_averages_of_instance_norm_are_not_those_of_batch_norm():
    model = nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True))
    assert "anynorm.recalibrate(model, loader) finds them" in anynorm.convert(model, "batch").note


def test_averages_that_are_not_saved_are_not_saved_afterwards():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0]._non_persistent_buffers_set.add("running_mean")
    anynorm.convert(model, "ghost")
    assert "0.running_var" in model.state_dict()
    assert "0.running_mean" not in model.state_dict()
