"""Opacus and captum look classes up by exact type: they are told of ours, whichever is imported first.

Tested with the real packages (opacus#319, opacus#472); `make test` installs them.
"""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

import anynorm
from anynorm.surgery.exact_types import BATCH_NORMS, INSTANCE_NORMS
from anynorm.surgery.import_hook import register
from anynorm.surgery.report import FUSED

opacus = pytest.importorskip("opacus", reason="looks at what Opacus does with our classes")
from opacus import GradSampleModule  # noqa: E402
from opacus.validators import ModuleValidator  # noqa: E402
from opacus.validators.errors import UnsupportedModuleError  # noqa: E402

# Theirs: Opacus' hooks look at what came out, captum sets requires_grad and hooks itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients"),
    pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients"),
    pytest.mark.filterwarnings("ignore:Setting forward, backward hooks and attributes"),
]


def make(kind: type[nn.Module], **options) -> nn.Module:
    """A norm of four channels with gamma and beta."""
    name = kind.__name__
    arguments = () if name.startswith("Lazy") else (2, 4) if name.startswith("GroupNorm") else (4,)
    if name.startswith("Ghost"):
        options["ghost_size"] = 2
    if name.startswith("Domain"):
        options["domains"] = ("day", "night")
    return kind(*arguments, **options, **({"affine": True} if "Instance" in name else {}))


@pytest.mark.parametrize("kind", [*BATCH_NORMS, *FUSED.values()], ids=lambda kind: kind.__name__)
def test_what_mixes_samples_or_hides_an_activation_is_refused(kind):
    model = nn.Sequential(nn.Linear(4, 4), make(kind))
    assert not ModuleValidator.is_valid(model)
    with pytest.raises(UnsupportedModuleError, match=r"BatchNorm cannot support|is norm, sum and activation in one"):
        ModuleValidator.validate(model, strict=True)


def test_accelerate_hides_no_batch_norm():
    """opacus#319: a batch norm that the validator does not see is trained, and the guarantee is gone."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU())
    plain = copy.deepcopy(model)
    anynorm.accelerate(model)
    assert not ModuleValidator.is_valid(model)
    fixed = ModuleValidator.fix(model)
    assert [type(module) for module in fixed] == [type(module) for module in ModuleValidator.fix(plain)]
    assert ModuleValidator.is_valid(fixed)
    anynorm.accelerate(model, fuse=True)
    with pytest.raises(UnsupportedModuleError, match="undo=True"):
        ModuleValidator.fix_and_validate(model)


@pytest.mark.parametrize(
    "kind", [kind for kind in BATCH_NORMS if "Lazy" not in kind.__name__], ids=lambda k: k.__name__
)
def test_fix_gives_group_norm(kind):
    fixed = ModuleValidator.fix(nn.Sequential(make(kind)))
    assert type(fixed[0]) is nn.GroupNorm
    assert fixed[0].num_channels == 4


@pytest.mark.parametrize("kind", INSTANCE_NORMS, ids=lambda kind: kind.__name__)
def test_running_averages_of_instance_norm_are_refused(kind):
    assert ModuleValidator.is_valid(nn.Sequential(make(kind, track_running_stats=False)))
    assert not ModuleValidator.is_valid(nn.Sequential(make(kind, track_running_stats=True)))


@pytest.mark.parametrize(
    ("pattern", "valid"),
    [("n c s -> c", False), ("(b m) c s -> b c", False), ("n c s -> n c", True), ("x c -> x", True)],
)
def test_a_pattern_says_whether_samples_mix(pattern, valid):
    sizes = {"c": 4, **({"m": 2} if "m" in pattern else {})}
    assert ModuleValidator.is_valid(nn.Sequential(anynorm.AnyNorm(pattern, affine="c", **sizes))) == valid


@pytest.mark.parametrize("kind", [anynorm.LSTM, anynorm.GRU])
def test_recurrent_layers_are_refused(kind):
    assert not ModuleValidator.is_valid(nn.Sequential(kind(4, 4)))


def find_samples(norm: nn.Module, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of the parameters, sample by sample, as Opacus finds them."""
    model = GradSampleModule(copy.deepcopy(norm), loss_reduction="sum")
    (model(x) * g).sum().backward()
    return [parameter.grad_sample for parameter in model.parameters()]


SHAPES = {"LayerNorm": (5, 3, 4), "RMSNorm": (5, 3, 4), "GroupNorm": (5, 4, 6, 6)}
SHAPES |= {f"InstanceNorm{n}d": (5, 4, *[3 + n] * n) for n in (1, 2, 3)}


@pytest.mark.parametrize("name", SHAPES)
def test_per_sample_gradients_are_those_of_each_sample_alone(name):
    ours = make(getattr(anynorm, name))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    x, g = torch.randn(2, *SHAPES[name])
    found = find_samples(ours, x, g)
    assert len(found) == len(list(ours.parameters()))
    for i in range(len(x)):
        grads = torch.autograd.grad((ours(x[i : i + 1]) * g[i : i + 1]).sum(), list(ours.parameters()))
        for all_samples, one in zip(found, grads, strict=True):
            torch.testing.assert_close(all_samples[i], one, rtol=1e-4, atol=1e-5)


def test_a_fused_norm_has_no_per_sample_gradients_instead_of_wrong_ones():
    """Opacus keeps the first argument of a call only: the residual would be left out."""
    norm = GradSampleModule(anynorm.GroupNormAct(2, 4))
    with pytest.raises(NotImplementedError, match=r"anynorm\.GroupNormAct is norm, sum and activation"):
        norm(torch.randn(3, 4, 5)).sum().backward()


@pytest.mark.parametrize("functorch", [False, True])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm1d"])
def test_masked_calls_have_no_per_sample_gradients_instead_of_wrong_ones(name, functorch):
    """Opacus keeps the positional arguments of a call and reads the first: those of padding would be counted."""
    norm = make(getattr(anynorm, name))
    model = GradSampleModule(nn.Sequential(norm), force_functorch=functorch)
    x = torch.randn(2, 4, 4)
    mask = anynorm.mask_of([4, 2], 4)
    for options in ({"mask": mask}, {"lengths": [4, 2]}):
        with pytest.raises(NotImplementedError, match=f"{name}: Opacus' per-sample gradients know no mask"):
            norm(x, **options)
    with pytest.raises(NotImplementedError, match="leave the mask out"), anynorm.masked(mask):
        model(x)
    model(x).sum().backward()
    assert norm.weight.grad_sample.shape == (2, 4)
    model.remove_hooks()
    norm.register_forward_hook(lambda *_: None)
    norm(x, mask=mask)


def test_a_residual_has_no_per_sample_gradients_by_functorch_either():
    norm = anynorm.GroupNormAct(2, 4)
    GradSampleModule(norm, force_functorch=True)
    with pytest.raises(NotImplementedError, match="know no residual"):
        norm(torch.randn(2, 4, 5), torch.randn(2, 4, 5))


BEHIND = "; from opacus.validators import ModuleValidator as V; assert not V.is_valid(m)"
MAKE = "from torch import nn; import anynorm; m = nn.Sequential(anynorm.BatchNorm1d(4))"


@pytest.mark.parametrize("order", [f"{MAKE}; import opacus{BEHIND}", f"import opacus; {MAKE}{BEHIND}"])
def test_the_order_of_imports_does_not_matter(order):
    """Also where the norm was made before Opacus was imported; and neither package imports the other."""
    subprocess.run([sys.executable, "-c", order], check=True)


def test_importing_anynorm_imports_neither():
    code = "import anynorm, sys; assert not {'opacus', 'captum', 'anynorm.surgery.exact_types'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_changed_tables_are_said_aloud():
    module = type(sys)("opacus.validators")
    with pytest.warns(UserWarning, match=r"opacus\.validators could not be told of anynorm's classes"):
        register(module)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 6))
    model(torch.randn(16, 3, 8, 8) + 1)
    return model.eval()


@pytest.mark.parametrize("method", ["DeepLift", "LRP", "IntegratedGradients"])
def test_captum_attributes_as_with_torchs_norms(method):
    attr = pytest.importorskip("captum.attr", reason="looks at what captum does with our classes")
    model, x = network(), torch.randn(2, 3, 8, 8)
    fast = copy.deepcopy(model)
    anynorm.accelerate(fast)
    want = getattr(attr, method)(model).attribute(x, target=(1, 0, 0))
    torch.testing.assert_close(getattr(attr, method)(fast).attribute(x, target=(1, 0, 0)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["DeepLift", "LRP"])
def test_captum_refuses_fused_norms(method):
    attr = pytest.importorskip("captum.attr", reason="looks at what captum does with our classes")
    model = network()
    anynorm.accelerate(model, fuse=True)
    with pytest.raises((NotImplementedError, TypeError), match="BatchNormAct2d"):
        getattr(attr, method)(model).attribute(torch.randn(2, 3, 8, 8), target=(1, 0, 0))


def test_the_report_says_which_tools_want_torchs_classes():
    report = anynorm.accelerate(network())
    assert "torch.fx.experimental.optimization.fuse" in str(report)
    assert "undo=True" in str(report)
