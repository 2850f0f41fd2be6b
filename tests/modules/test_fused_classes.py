"""Fused norms as classes: constructors, state, errors, and what torch's tools do to them."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.fx.experimental.optimization as optimization
import torch.nn as nn

import anynorm
from anynorm import FAMILY, activations
from anynorm.activations import ACTIVATIONS
from anynorm.modules.fused import Fused
from anynorm.torch_private import TORCH
from fused_specimens import fuse, ids
from specimens import ARGUMENTS, SIZES, SPECIMENS, TRACKING

# Classes, constructors and state


@pytest.mark.parametrize("scheme", FAMILY.values(), ids=FAMILY)
def test_every_class_has_a_fused_twin_that_is_no_norm_of_torchs(scheme):
    theirs = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    for plain, name in zip(scheme.classes, scheme.fused, strict=True):
        kind = getattr(anynorm, name)
        assert name in anynorm.__all__
        assert name.replace("Act", "") == plain
        assert kind.plain is getattr(anynorm, plain)
        assert issubclass(kind, Fused)
        assert not issubclass(kind, theirs)
    rows = (Path(__file__).parents[2] / "docs/fused.md").read_text().splitlines()
    assert f"| {scheme.name} | {', '.join(scheme.fused)} |" in rows


@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_constructor_is_torchs_and_activation(specimen):
    theirs, kind = getattr(nn, specimen.kind), type(fuse(specimen))
    *first, last = inspect.signature(kind).parameters.values()
    assert [p for p in first if p.name not in ("on_single", "on_nonfinite")] == list(
        inspect.signature(theirs).parameters.values()
    )
    assert (last.name, last.default, last.kind) == ("activation", "relu", last.KEYWORD_ONLY)
    assert kind._version == theirs._version
    assert list(inspect.signature(kind.forward).parameters) == ["self", "input", "residual", "mask", "lengths"]


@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_state_attributes_and_repr_are_the_plain_norms(specimen):
    options = {"track_running_stats": True} if specimen in TRACKING else {}
    fused, theirs = fuse(specimen, "gelu", **options), specimen.make(nn, **options)
    assert list(fused.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(fused.state_dict(), strict=True)
    assert vars(fused).keys() - vars(theirs).keys() == {"activation"}
    assert repr(fused) == repr(theirs).replace("Norm", "NormAct")[:-1] + ", activation='gelu')"
    fused.reset_parameters()
    theirs.reset_parameters()
    for mine, its in zip(fused.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"affine": False}, {"affine": True, "device": "meta"}, {"eps": 0.5, "dtype": torch.float64}],
    ids=str,
)
@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_constructors_build_what_torchs_build(specimen, options):
    theirs_kind = getattr(nn, specimen.kind)
    known = inspect.signature(theirs_kind).parameters
    options = {("elementwise_affine" if k == "affine" and k not in known else k): v for k, v in options.items()}
    options = {k: v for k, v in options.items() if k in known}
    arguments = ARGUMENTS.get(specimen.kind, (SIZES["c"][0],))
    theirs = theirs_kind(*arguments, **options)
    fused = getattr(anynorm, specimen.kind.replace("Norm", "NormAct"))(*arguments, **options)
    mine = {k: v for k, v in vars(fused).items() if k != "activation"}
    assert list(mine) == list(vars(theirs))
    for name in ("_parameters", "_buffers"):
        assert list(mine[name]) == list(vars(theirs)[name])
        for ours, its in zip(mine.pop(name).values(), vars(theirs)[name].values(), strict=True):
            assert (ours is None) == (its is None)
            if its is not None:
                assert (ours.shape, ours.dtype, ours.device) == (its.shape, its.dtype, its.device)
                assert its.is_meta or torch.equal(ours, its)
    assert all(vars(theirs)[name] == value for name, value in mine.items())


def test_what_torch_refuses_is_refused_in_its_words():
    texts = []
    for kind in (nn.GroupNorm, anynorm.GroupNormAct):
        with pytest.raises(ValueError) as refused:
            kind(3, 4)
        texts.append(str(refused.value))
    if TORCH < (2, 10):  # which names no numbers
        texts = [re.sub(r" \(\d+\)", "", text) for text in texts]
    assert texts[0] == texts[1]
    texts = []
    for kind in (nn.InstanceNorm1d, anynorm.InstanceNormAct1d):
        old = nn.InstanceNorm1d(3, track_running_stats=True).state_dict()
        old._metadata[""]["version"] = None
        with pytest.raises(RuntimeError) as refused:
            kind(3).load_state_dict(old)
        texts.append(str(refused.value).replace("Act", ""))
    assert texts[0] == texts[1]


def test_old_checkpoints_load_and_bad_ones_do_not():
    state = nn.BatchNorm1d(3).state_dict()
    state._metadata[""]["version"] = 1
    del state["num_batches_tracked"]
    assert anynorm.BatchNormAct1d(3).load_state_dict(state).missing_keys == []
    assert type(anynorm.BatchNormAct1d(3)).__name__ == "BatchNormAct1d"
    old = nn.InstanceNorm1d(3, track_running_stats=True).state_dict()
    old._metadata[""]["version"] = None
    with pytest.raises(RuntimeError, match="Unexpected running stats buffer"):
        anynorm.InstanceNormAct1d(3).load_state_dict(old)
    bad = {**nn.BatchNorm1d(3).state_dict(), "running_var": torch.tensor([1.0, -8.0, 1.0])}
    with pytest.raises(RuntimeError, match="running_var must not be negative; got -8"):
        anynorm.BatchNormAct1d(3).load_state_dict(bad)


@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_pickle_deepcopy_half_and_to_empty(specimen):
    fused, x = fuse(specimen, "leaky_relu(0.2)").eval(), specimen.draw()
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    twins = (pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused), torch.load(file, weights_only=False))
    for twin in twins:
        assert (type(twin), twin.activation) == (type(fused), "leaky_relu(0.2)")
        assert torch.equal(twin(x, x), fused(x, x))
    half = copy.deepcopy(fused).half()
    assert half(x.half(), x.half()).dtype == torch.float16
    empty = fuse(specimen).to("meta").to_empty(device="cpu")
    empty.load_state_dict(fused.state_dict())
    empty.activation = "leaky_relu(0.2)"
    assert torch.equal(empty.eval()(x, x), fused(x, x))


def test_a_subclass_may_have_a_constructor_of_its_own():
    class Own(anynorm.BatchNormAct1d):
        def __init__(self):
            super().__init__(3, activation="silu")

    assert Own()(torch.randn(4, 3)).shape == (4, 3)


# What torch's tools do to it


class Subclass(nn.BatchNorm2d):
    """What the fused classes must not be."""

    def forward(self, input):
        return super().forward(input).relu()


def make_pair(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm)


def test_convert_sync_batchnorm_leaves_it_alone():
    x = torch.randn(2, 3, 5, 5)
    model = make_pair(anynorm.BatchNormAct2d(4)).eval()
    before = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[1]) is anynorm.BatchNormAct2d
    assert torch.equal(converted(x), before)
    lost = nn.SyncBatchNorm.convert_sync_batchnorm(make_pair(Subclass(4)))
    assert type(lost[1]) is nn.SyncBatchNorm  # and with it the ReLU is gone


def fold(model: nn.Sequential) -> nn.Module:
    """As tools do it that look for torch's norms."""
    conv, norm = model
    if not isinstance(norm, nn.modules.batchnorm._NormBase):
        return model
    return nn.utils.fusion.fuse_conv_bn_eval(conv, norm)


def test_folding_leaves_it_alone():
    x = torch.randn(2, 3, 5, 5)
    model = make_pair(anynorm.BatchNormAct2d(4)).eval()
    before = model(x)
    assert (before >= 0).all()
    assert torch.equal(fold(model)(x), before)
    assert torch.equal(optimization.fuse(model)(x), before)
    assert (fold(make_pair(Subclass(4)).eval())(x) < 0).any()  # what the test would notice


# Errors, one sentence each


X = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
TEXTS = {
    "batch_norm: residual must have the shape and dtype of the input; got residual (4, 3, 1) torch.float32, "
    "input (4, 3, 5) torch.float32; convert it, or add it to the output":
        (RuntimeError, lambda norm: norm(X, X[..., :1])),
    "batch_norm: residual must have the shape and dtype of the input; got residual (4, 3, 5) torch.float64, "
    "input (4, 3, 5) torch.float32; convert it, or add it to the output":
        (RuntimeError, lambda norm: norm(X, X.double())),
    "BatchNormAct1d: activation must be one of relu, leaky_relu, silu, gelu, relu6, "
    "hardswish, elu, tanh, sigmoid, mish, gelu_tanh, identity or None, as 'leaky_relu(0.2)' and 'elu(0.5)' "
    "with a number; got 'softplus'; leave it out and apply yours to the output":
        (ValueError, lambda norm: anynorm.BatchNormAct1d(3, activation="softplus")),
    "group_norm: activation must be one of relu, leaky_relu, silu, gelu, relu6, "
    "hardswish, elu, tanh, sigmoid, mish, gelu_tanh, identity or None, as 'leaky_relu(0.2)' and 'elu(0.5)' "
    "with a number; got 'ReLU'; leave it out and apply yours to the output":
        (ValueError, lambda norm: anynorm.functional.group_norm(X, 1, activation="ReLU")),
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_error_text_and_nothing_moves(text):
    kind, call = TEXTS[text]
    norm = anynorm.BatchNormAct1d(3)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(kind) as caught:
        call(norm)
    assert str(caught.value) == text
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("name", anynorm.functional.__all__)
def test_every_function_checks_what_follows(name):
    arguments = {"layer_norm": ((5,),), "rms_norm": ((5,),), "group_norm": (3,)}.get(name, ())
    batch = {"running_mean": None, "running_var": None, "training": True}
    options = {
        "batch_norm": batch,
        "ghost_batch_norm": {**batch, "ghost_size": 2},
        "batch_renorm": {**batch, "running_mean": torch.zeros(X.shape[1]), "running_var": torch.ones(X.shape[1])},
    }.get(name, {})
    options |= {"momentum": 0.0} if name == "batch_renorm" else {}  # r and d are the same at each call
    function = getattr(anynorm.functional, name)
    y = function(X, *arguments, **options, activation="relu", residual=X)
    torch.testing.assert_close(y, (function(X, *arguments, **options) + X).relu(), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=f"{name}: residual must have"):
        function(X, *arguments, **options, residual=X[:1])
    with pytest.raises(ValueError, match=f"{name}: activation must be one of"):
        function(X, *arguments, **options, activation="softplus")


def test_a_number_has_one_spelling():
    for text, name in {"elu(.50)": "elu(0.5)", "elu(1)": "elu", "leaky_relu(1e-2)": "leaky_relu"}.items():
        assert anynorm.LayerNormAct(5, activation=text).activation == name
    bad = ("elu(nan)", "elu(inf)", "elu()", "elu(0.5", "elu(0.5))", "elu(alpha=0.5)", "relu(0.5)", "gelu(tanh)", "(1)")
    for text in (*bad, 0.5, nn.ELU(0.5)):
        with pytest.raises(ValueError, match=r"LayerNormAct: activation must be one of"):
            anynorm.LayerNormAct(5, activation=text)


def test_there_is_one_list_of_names():
    """Whoever needs the names reads the table: no other file of the library spells two of them.

    The applications are not looked at: their networks are drawn by `torch.nn.init`, which has names of its own.
    """
    library = Path(anynorm.__file__).parent
    for path in library.rglob("*.py"):
        if path.is_relative_to(library / "apps"):
            continue
        text = re.sub(r'activation="\w+"', "", path.read_text())
        spelled = [name for name in ACTIVATIONS if f'"{name}"' in text]
        assert len(spelled) <= (len(ACTIVATIONS) if path == Path(activations.__file__) else 1), (path, spelled)
