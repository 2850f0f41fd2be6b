"""Every scheme x layout x dtype x source against the reference, forward and all gradients."""

from __future__ import annotations

import inspect

import pytest
import torch

import anynorm
from anynorm import FAMILY
from specimens import LAYOUTS, SPECIMENS, TRACKING, Specimen, assert_close, wide

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def find_terms(specimen: Specimen, module, g, x, given) -> tuple[float, float]:
    """The largest terms summed into dx and dgamma."""
    gamma, _ = specimen.affine(module)
    scaled = specimen.gradients(module, g, x, given)
    largest_g = float(abs(wide(g)).max())
    xhat = specimen.forward(anynorm_without_affine(specimen, module), x, given)
    eps = specimen.options(module, None)["eps"]
    mean_square = wide(x).reshape(specimen.flat)
    var = (
        given[1] if given else anynorm.reference.moments(mean_square, specimen.axes, FAMILY[specimen.scheme].centred)[1]
    )
    rstd = float((1 / (var + eps) ** 0.5).max())
    assert scaled[0].shape == specimen.flat
    return float(abs(gamma).max()) * rstd * largest_g, float(abs(xhat).max()) * largest_g


def anynorm_without_affine(specimen: Specimen, module):
    twin = specimen.make()
    twin.weight = None
    if hasattr(twin, "bias"):
        twin.bias = None
    twin.eps = specimen.options(module, None)["eps"]
    return twin


def check(specimen: Specimen, module, x: torch.Tensor, given=None) -> None:
    g = specimen.draw("contiguous", x.dtype, seed=1) - 3
    leaf = x.detach().requires_grad_()
    parameters = [p for p in (module.weight, getattr(module, "bias", None)) if p is not None]
    y = module(leaf)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    found = torch.autograd.grad(y, [leaf, *parameters], g)
    true = specimen.gradients(module, g, x, given)
    dx_term, dgamma_term = find_terms(specimen, module, g, x, given)
    terms = (dx_term, dgamma_term, float(abs(wide(g)).max()))
    # Sums of up to 128 float32 round as they go; float64 has no wider type at all to compute in.
    factor = 4 if x.dtype == torch.float32 else 64
    assert_close(y, specimen.forward(module, x, given), factor, "y")
    for name, got, want, term in zip(("dx", "dgamma", "dbeta"), found, true, terms, strict=False):
        assert_close(got, want, factor, name, term)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
def test_batch_source(specimen, layout, dtype):
    check(specimen, specimen.make(dtype=dtype), specimen.draw(layout, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("specimen", TRACKING, ids=str)
def test_running_source(specimen, layout, dtype):
    module = specimen.make(dtype=dtype, track_running_stats=True).eval()
    check(specimen, module, specimen.draw(layout, dtype), specimen.running(module))


@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_with_half_input(specimen, dtype):
    check(specimen, specimen.make(dtype=torch.float32), specimen.draw("contiguous", dtype))


def find_options() -> list[tuple[Specimen, dict]]:
    """Each class with what its constructor can leave out."""
    pairs = []
    for specimen in SPECIMENS:
        names = inspect.signature(getattr(torch.nn, specimen.kind)).parameters
        pairs += [(specimen, {name: False}) for name in ("affine", "elementwise_affine", "bias") if name in names]
    return pairs


@pytest.mark.parametrize(("specimen", "options"), find_options(), ids=str)
def test_without_gamma_or_beta(specimen, options):
    check(specimen, specimen.make(**options), specimen.draw())


@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
def test_gradient_of_a_sum_arrives_expanded(specimen):
    module, x = specimen.make(), specimen.draw().requires_grad_()
    module(x).sum().backward()
    true = specimen.gradients(module, torch.ones(specimen.shape), x)
    assert_close(x.grad, true[0], 4, "dx", float(abs(specimen.affine(module)[0]).max()) * 2)


@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
def test_no_graph_where_no_gradient_is_needed(specimen):
    module = specimen.make().requires_grad_(False)
    assert module(specimen.draw()).grad_fn is None
    with torch.no_grad():
        assert specimen.make()(specimen.draw()).grad_fn is None


@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
def test_only_the_gradients_asked_for(specimen):
    module, x = specimen.make(), specimen.draw()
    assert torch.autograd.grad(module(x).square().sum(), module.weight)[0].shape == module.weight.shape
    module.requires_grad_(False)
    x.requires_grad_()
    assert torch.autograd.grad(module(x).square().sum(), x)[0].shape == x.shape


def test_every_class_of_the_table_exists_and_is_torchs():
    for scheme in FAMILY.values():
        assert not scheme.function or hasattr(anynorm.functional, scheme.function)
        theirs = FAMILY[scheme.variant_of or scheme.name].classes
        for kind in scheme.classes:
            namesake = next((name for name in theirs if name[-2:] == kind[-2:]), theirs[0])
            base = torch.nn.modules.batchnorm._BatchNorm if kind == "SyncBatchNorm" else getattr(torch.nn, namesake)
            assert issubclass(getattr(anynorm, kind), base)  # DistributedDataParallel refuses torch's SyncBatchNorm
