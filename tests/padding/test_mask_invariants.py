"""Masks: padding changes no bit; what follows a masked norm, compilers, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import anynorm
from anynorm import FAMILY, functional
from anynorm.engine import kernels
from padding.mask_cases import NORMS, POSITIONED, draw, draw_mask, find_positions, sequences, spoil


def outputs(name: str, x: Tensor, lengths: list[int], c: int, images: bool, holes: bool) -> list[Tensor]:
    """The real positions of y and dx, (positions, C) each, of x (N, L, C)."""
    module, mask = NORMS[name](c), anynorm.mask_of(lengths, x.shape[1])
    if holes:
        mask = mask & (torch.arange(x.shape[1]) % 3 != 1)
    flat = name in ("layer", "rms")
    leaf = x.clone().requires_grad_()
    if flat:
        y = module(leaf, mask=mask)
    elif images:  # channels last in memory
        kinds = {"batch": anynorm.BatchNorm2d(c), "instance": anynorm.InstanceNorm2d(c), "group": NORMS["group"](c)}
        y = kinds[name](leaf.unsqueeze(1).permute(0, 3, 1, 2), mask=mask.unsqueeze(1)).permute(0, 2, 3, 1).squeeze(1)
    else:
        y = module(leaf.mT.contiguous(), mask=mask).mT
    (dx,) = torch.autograd.grad((y[mask] * torch.arange(c)).sin().sum(), leaf)
    return [y[mask], dx[mask]]


@pytest.mark.skipif(bool(kernels.OFF), reason="sums of torch's operations depend on the shape; see test_training")
@pytest.mark.parametrize("holes", [False, True], ids=["prefix", "holes"])
@pytest.mark.parametrize("images", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize(("c", "size"), [(4, 30), (20, 70), (4, 5_000), (34, 33_000)])
@pytest.mark.parametrize("name", NORMS)
def test_more_padding_changes_no_bit(name, c, size, images, holes):
    if images and name in ("layer", "rms"):
        pytest.skip("layer and RMS norm have one layout")
    generator = torch.Generator().manual_seed(0)
    lengths = [size, size // 2, 3]
    found = []
    for padded in (size, size + 1, 2 * size + 7):
        x = torch.full((3, padded, c), float("nan"))
        for sample, length in enumerate(lengths):
            generator.manual_seed(sample)
            x[sample, :length] = torch.randn(length, c, generator=generator)
        found.append(outputs(name, x, lengths, c, images, holes))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# ---- what follows, gradients of gradients, compilers -----------------------------------------------------------------


@pytest.mark.parametrize("form", ["prefix", "holes"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("specimen", POSITIONED, ids=str)
def test_what_follows_is_zero_at_padding(specimen, with_residual, layout, form):
    plain = specimen.make()
    fused = getattr(anynorm, specimen.kind.replace("Norm", "NormAct"))(
        *(
            [plain.normalized_shape]
            if hasattr(plain, "normalized_shape")
            else (3, 6)
            if "Group" in specimen.kind
            else [6]
        ),
        activation="silu",
        **({"affine": True} if specimen.scheme == "instance" else {}),
    )
    fused.load_state_dict(plain.state_dict())
    mask, arguments = draw_mask(find_positions(specimen), form)
    x = spoil(draw(specimen, layout, torch.float32), mask, specimen)
    residual = spoil(draw(specimen, layout, torch.float32, seed=2), mask, specimen) if with_residual else None
    leaves = [[t.clone().requires_grad_() for t in (x, residual) if t is not None] for _ in range(2)]
    y = fused(*leaves[0], **arguments)
    spread = (
        mask[(...,) + (None,) * (x.dim() - mask.dim())] if specimen.scheme in ("layer", "rms") else mask.unsqueeze(1)
    )
    z = plain(leaves[1][0], **arguments)
    z = nn.functional.silu(z if residual is None else z + torch.where(spread, leaves[1][1], 0.0))
    z = torch.where(spread, z, 0.0)
    g = spoil(torch.randn_like(x), mask, specimen)
    found = torch.autograd.grad(y, leaves[0], g)
    true = torch.autograd.grad(z, leaves[1], torch.where(spread, g, 0.0))
    torch.testing.assert_close(y, z, atol=2e-6, rtol=2e-6)
    # A sample with one real position has rstd = 1 / sqrt(eps): its dx of 0 is a difference of terms as large as that.
    term = float(plain.weight.abs().max()) * (plain.eps or 1.0) ** -0.5 * float(torch.where(spread, g, 0.0).abs().max())
    for a, b, magnitude in zip(found, true, (term, float(true[-1].abs().max())), strict=False):
        torch.testing.assert_close(a, b, atol=4 * torch.finfo(torch.float32).eps * magnitude, rtol=1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_gradients_of_gradients(name):
    module = NORMS[name](4).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, True, True]])

    def call(x: Tensor) -> Tensor:
        return module(x, mask=mask) if name in ("layer", "rms") else module(x.mT, mask=mask)

    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("name", NORMS)
def test_under_compile(name):
    torch._dynamo.reset()
    module = NORMS[name](4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, mask = torch.randn(2, 4, 6), anynorm.mask_of([6, 3], 6)
    x = x.mT if name in ("layer", "rms") else x
    torch.testing.assert_close(compiled(x, mask=mask), NORMS[name](4)(x, mask=mask), atol=1e-6, rtol=1e-6)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"mask": torch.ones(2, 4)}, ValueError, r"without its channels, \(2, 5\); got mask \(2, 4\)"),
        ({"mask": torch.ones(2, 3, 5)}, ValueError, r"got mask \(2, 3, 5\)"),
        ({"mask": torch.full((2, 5), -torch.inf)}, ValueError, "got -inf; pass a bool mask"),
        ({"mask": torch.ones(2, 5), "lengths": [5, 5]}, ValueError, "got both"),
        ({"lengths": [5]}, ValueError, r"one entry for each sample, \(2,\); got \(1,\)"),
        ({"lengths": [5, 6]}, ValueError, "from 0 to 5, the input's positions; got 5 to 6"),
        ({"lengths": [1.0, 2.0]}, TypeError, "whole numbers; got torch.float32"),
        ({"lengths": [1, 0]}, ValueError, "more than 1 real position"),
    ],
)
def test_masks_that_do_not_fit(arguments, error, sentence):
    module = anynorm.BatchNorm1d(3)
    with pytest.raises(error, match=sentence):
        module(torch.ones(2, 3, 5), **arguments)
    assert int(module.num_batches_tracked) == 0


def test_other_faults_keep_their_own_errors():
    with pytest.raises(RuntimeError, match="one element per channel"):
        anynorm.BatchNorm1d(4)(torch.ones(2, 2, 1))
    with pytest.raises(TypeError, match="normalized_shape must be a sequence"):
        functional.layer_norm(torch.ones(2, 3, 4), 4, lengths=[3, 1])


def test_lengths_of_images_are_refused():
    with pytest.raises(ValueError, match="pass a mask instead"):
        anynorm.BatchNorm2d(3)(torch.ones(2, 3, 5, 5), lengths=[5, 5])


@pytest.mark.parametrize("given", [{}, {"lengths": [1, 0]}], ids=["input", "mask"])
def test_one_value_per_channel(given):
    x = torch.full((2, 3, 5), 2.0) if given else torch.full((1, 3), 2.0)
    with pytest.raises(ValueError, match=r"BatchNorm1d\(3\)|batch_norm: statistics need more than 1 real"):
        anynorm.BatchNorm1d(3)(x, **given)
    running = anynorm.BatchNorm1d(3, on_single="running", eps=1e-12)
    state = {name: t.clone() for name, t in running.state_dict().items()}
    real = (slice(None), slice(None), 0) if given else (slice(None), slice(None))
    y = running(x, **given)
    assert torch.equal(y[real][0], torch.full((3,), 2.0))
    assert all(torch.equal(t, state[name]) for name, t in running.state_dict().items())
    assert torch.equal(anynorm.BatchNorm1d(3, on_single="skip")(x, **given)[real][0], torch.full((3,), 2.0))
    with pytest.raises(ValueError, match="on_single must be one of error, running, skip"):
        anynorm.BatchNorm1d(3, on_single="ignore")
    with pytest.raises(ValueError, match="needs running averages"):
        anynorm.BatchNorm1d(3, track_running_stats=False, on_single="running")(x, **given)


def test_ragged_inputs_take_no_mask():
    packed = nn.utils.rnn.pack_sequence(sequences(), enforce_sorted=False)
    with pytest.raises(ValueError, match="has no padding; got a mask or lengths"):
        functional.batch_norm(packed, None, None, training=True, mask=torch.ones(1))


def test_every_norm_of_the_family_takes_a_mask():
    assert set(NORMS) == {name for name, scheme in FAMILY.items() if not scheme.variant_of}
