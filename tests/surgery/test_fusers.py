"""torch.ao.quantization's fusers do with ours what they do with torch's norms, or say the remedy (pytorch#112579)."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx

import anynorm
from anynorm.surgery.exact_types import VARIANTS
from anynorm.surgery.import_hook import register
from anynorm.surgery.report import FUSED

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of deprecated functions and of observers

BEFORE = {
    "BatchNorm1d": (nn.Conv1d(3, 4, 2), (5, 3, 9)),
    "BatchNorm2d": (nn.Conv2d(3, 4, 2), (5, 3, 5, 6)),
    "BatchNorm3d": (nn.Conv3d(3, 4, 2), (5, 3, 4, 4, 3)),
}
each_dimension = pytest.mark.parametrize("name", BEFORE)


def make_pair(name: str = "BatchNorm2d", *layers: nn.Module) -> tuple[nn.Sequential, nn.Sequential, torch.Tensor]:
    """Convolution, norm and what follows, in evaluation: with torch's norm, and with ours."""
    torch.manual_seed(0)
    before, shape = BEFORE[name]
    theirs = nn.Sequential(copy.deepcopy(before), getattr(nn, name)(4), *layers)
    with torch.no_grad():
        theirs[1].weight.copy_(torch.tensor([-1.0, 2.0, 0.5, 3.0]))
    theirs(torch.randn(shape) + 1)
    ours = copy.deepcopy(theirs)
    anynorm.accelerate(ours)
    return theirs.eval(), ours.eval(), torch.randn(shape)


def list_kinds(model: nn.Module) -> list[tuple[str, type[nn.Module]]]:
    return [
        (name, type(module)) for name, module in model.named_modules() if not isinstance(module, torch.fx.GraphModule)
    ]


@each_dimension
@pytest.mark.parametrize("then", [(), (nn.ReLU(),)], ids=["", "relu"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_fuse_modules_does_what_it_does_with_torchs(name, then, training):
    theirs, ours, x = make_pair(name, *then)
    places = [str(i) for i in range(len(ours))]
    fuse = quantization.fuse_modules_qat if training else quantization.fuse_modules
    want, found = fuse(theirs.train(training), places), fuse(ours.train(training), places)
    assert list_kinds(found) == list_kinds(want)
    torch.testing.assert_close(found(x), want(x), rtol=1e-5, atol=1e-5)
    assert type(ours[1]) is getattr(anynorm, name)


def test_linear_and_transposed_convolution_and_norm_before_relu():
    for first, norm, shape in (
        (nn.Linear(3, 4), anynorm.BatchNorm1d(4), (5, 3)),
        (nn.ConvTranspose2d(3, 4, 2), anynorm.BatchNorm2d(4), (5, 3, 4, 4)),
    ):
        model, x = nn.Sequential(first, norm).eval(), torch.randn(shape)
        fused = quantization.fuse_modules(model, ["0", "1"])
        assert type(fused[1]) is nn.Identity
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
    fused = quantization.fuse_modules(nn.Sequential(anynorm.BatchNorm3d(4), nn.ReLU()).eval(), ["0", "1"])
    assert type(fused[0]) is torch.ao.nn.intrinsic.BNReLU3d


@each_dimension
def test_fuse_fx_leaves_no_norm_and_the_model_as_it_was(name):
    theirs, ours, x = make_pair(name, nn.ReLU())
    want, found = quantize_fx.fuse_fx(theirs), quantize_fx.fuse_fx(ours)
    assert list_kinds(found) == list_kinds(want)
    torch.testing.assert_close(found(x), want(x), rtol=1e-5, atol=1e-5)
    assert type(ours[1]) is getattr(anynorm, name)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_prepare_fx_and_convert_fx_do_what_they_do_with_torchs(training):
    theirs, ours, x = make_pair("BatchNorm2d", nn.ReLU(), nn.Flatten(), nn.Linear(80, 6), nn.LayerNorm(6))
    prepare = quantize_fx.prepare_qat_fx if training else quantize_fx.prepare_fx
    mapping = quantization.get_default_qat_qconfig_mapping() if training else quantization.get_default_qconfig_mapping()
    found = []
    for model in (theirs, ours):
        prepared = prepare(model.train(training), mapping, (x,))
        prepared(x)
        quantized = quantize_fx.convert_fx(prepared.eval())
        found.append((list_kinds(prepared), list_kinds(quantized), quantized(x)))
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[1][2], found[0][2], rtol=0, atol=0)


def test_a_norm_that_is_called_twice_stays_one():
    norm = anynorm.BatchNorm2d(4)
    fused = quantize_fx.fuse_fx(nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 4, 1), norm).eval())
    assert type(norm) is anynorm.BatchNorm2d
    assert not any(isinstance(module, anynorm.BatchNorm2d) for module in fused.modules())


def make(kind: type[nn.Module]) -> nn.Module:
    """A norm of four channels."""
    arguments = (2, 4) if kind.__name__.startswith("GroupNorm") else (4,)
    ghost = {"ghost_size": 2} if kind.__name__.startswith("Ghost") else {}
    domains = {"domains": ("day", "night")} if kind.__name__.startswith("Domain") else {}
    return kind(*arguments, **ghost, **domains)


@pytest.mark.parametrize("kind", [*VARIANTS, *FUSED.values()], ids=lambda kind: kind.__name__)
def test_what_no_fuser_knows_is_refused_with_the_remedy(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), make(kind), nn.Identity()).eval()
    match = rf"torch\.ao\.quantization: anynorm\.{kind.__name__} is n.*accelerate\(model, undo=True\)"
    with pytest.raises(NotImplementedError, match=match):
        quantization.fuse_modules(model, ["0", "1", "2"])
    with pytest.raises(NotImplementedError, match=match):
        quantize_fx.fuse_fx(model)


def test_the_remedies_work():
    _, model, x = make_pair("BatchNorm2d", nn.ReLU())
    want = model(x)
    anynorm.accelerate(model, fuse=True)
    anynorm.accelerate(model, undo=True)
    torch.testing.assert_close(quantization.fuse_modules(model, ["0", "1", "2"])(x), want, rtol=1e-5, atol=1e-5)
    anynorm.convert(model, to="ghost")
    anynorm.convert(model, to="batch")
    anynorm.accelerate(model, undo=True)
    torch.testing.assert_close(quantize_fx.fuse_fx(model)(x), want, rtol=1e-5, atol=1e-5)


def test_a_method_of_the_users_comes_first():
    kinds = (nn.Conv2d, anynorm.BatchNormAct2d)
    given = {"additional_fuser_method_mapping": {kinds: lambda is_qat, first, norm: nn.Sequential(first, norm)}}
    model = nn.Sequential(nn.Conv2d(3, 4, 1), anynorm.BatchNormAct2d(4)).eval()
    fused = quantization.fuse_modules(model, ["0", "1"], fuse_custom_config_dict=given)
    assert type(fused[0][1]) is anynorm.BatchNormAct2d


def test_what_is_told_twice_or_before_its_import_fuses_the_same():
    for name in ("fuse_modules", "quantize_fx"):
        module = sys.modules[f"torch.ao.quantization.{name}"]
        before = dict(vars(module))
        register(module)
        assert dict(vars(module)) == before
    code = (
        "import anynorm; from torch import nn; "
        "from torch.ao.quantization.quantize_fx import fuse_fx; "
        "m = fuse_fx(nn.Sequential(nn.Conv2d(3, 4, 1), anynorm.BatchNorm2d(4)).eval()); "
        "assert len([x for x in m.modules() if 'Norm' in type(x).__name__]) == 0, m"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
