"""Masks: every norm, form, layout and dtype against the reference on the real positions alone, and to the bit."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import anynorm
from anynorm import FAMILY, functional, reference
from anynorm.engine import kernels
from specimens import SPECIMENS, TRACKING, Specimen, assert_close, wide

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "strided")
FORMS = ("lengths", "prefix", "holes", "whole numbers", "floats", "shared by samples", "empty sample")
POSITIONED = [s for s in SPECIMENS if s.scheme not in ("batch", "group", "instance") or s.spatial]


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def find_positions(specimen: Specimen) -> tuple[int, ...]:
    """The shape of a mask."""
    if specimen.scheme in ("layer", "rms"):
        return (specimen.shape[0], 3)
    return (specimen.shape[0], *specimen.spatial)


def draw_mask(positions: tuple[int, ...], form: str) -> tuple[Tensor, dict[str, object]]:
    """Which positions are real, and how a call is told."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([positions[-1], 2, 1, positions[-1] - 1, 2])[: positions[0]]
    shape = (positions[0],) + (1,) * (len(positions) - 2) + (positions[-1],)
    mask = (torch.arange(positions[-1]) < lengths[:, None]).view(shape).expand(positions)
    if form == "holes":
        mask = torch.rand(positions, generator=generator) < 0.6
        mask[:, ..., 0] = True
    if form == "shared by samples":
        shared = (torch.rand((1, *positions[1:]), generator=generator) < 0.6).bool()
        shared[..., 0] = True
        return shared.expand(positions), {"mask": shared}
    if form == "empty sample":
        mask = mask.clone()
        mask[1] = False
    if form == "lengths":
        return mask, {"lengths": lengths}
    told = {"whole numbers": mask.long(), "floats": mask.double()}.get(form, mask)
    return mask, {"mask": told}


def draw(specimen: Specimen, layout: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    if specimen.scheme in ("layer", "rms"):
        generator = torch.Generator().manual_seed(seed)
        shape = (specimen.shape[0], 3, *specimen.shape[1:])
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) + 3
        return x.mT.contiguous().mT if layout == "channels_last" else x
    return specimen.draw(layout, dtype, seed)


def split_rows(specimen: Specimen, t: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """The real positions as (positions, C...) arrays, one for each set of statistics of a reference call."""
    if specimen.scheme in ("layer", "rms"):
        return [t[mask]]
    t = np.moveaxis(t, 1, -1)
    return [t[mask]] if specimen.scheme == "batch" else [t[n][mask[n]] for n in range(len(t))]


def join_rows(specimen: Specimen, parts: list[np.ndarray], like: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The inverse, with 0 at padding."""
    if specimen.scheme in ("layer", "rms"):
        out = np.zeros(like.shape)
        out[mask] = parts[0]
        return out
    out = np.zeros(np.moveaxis(like, 1, -1).shape)
    if specimen.scheme == "batch":
        out[mask] = parts[0]
    else:
        for n, part in enumerate(parts):
            out[n][mask[n]] = part
    return np.moveaxis(out, -1, 1)


def shape_rows(specimen: Specimen, rows: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Rows as the reference takes them, and the axes that share a mean."""
    if specimen.scheme in ("layer", "rms"):
        return rows, tuple(range(1, rows.ndim))
    if specimen.scheme == "group":
        return rows.reshape(len(rows), 3, 2), (0, 2)
    return rows, (0,)


def expect(specimen: Specimen, module: nn.Module, g: Tensor, x: Tensor, mask: Tensor, given: tuple | None = None):
    """y, dx, dgamma and dbeta by the reference on the real positions alone."""
    keep = mask.numpy()
    gamma, beta = (p.reshape(-1) for p in specimen.affine(module))
    like, options = wide(x), specimen.options(module, given)
    ys, dxs, dgammas, dbetas = [], [], [], []
    for rows, grads in zip(split_rows(specimen, like, keep), split_rows(specimen, wide(g), keep), strict=True):
        shaped, axes = shape_rows(specimen, rows)
        scale, shift = (p.reshape(1, *shaped.shape[1:]) for p in (gamma, beta))
        if not len(rows):
            ys.append(rows), dxs.append(rows)
            continue
        ys.append(reference.forward(shaped, axes, scale, shift, **options).reshape(rows.shape))
        dx, dgamma, dbeta = reference.gradients(grads.reshape(shaped.shape), shaped, axes, scale, **options)
        dxs.append(dx.reshape(rows.shape)), dgammas.append(dgamma), dbetas.append(dbeta)
    shape = tuple(module.weight.shape)
    return (
        join_rows(specimen, ys, like, keep),
        join_rows(specimen, dxs, like, keep),
        np.sum(dgammas, axis=0).reshape(shape),
        np.sum(dbetas, axis=0).reshape(shape),
    )


def spoil(t: Tensor, mask: Tensor, specimen: Specimen) -> Tensor:
    """NaN and Inf at padding, in the layout of t."""
    axes = specimen.scheme in ("layer", "rms")
    spread = mask[(...,) + (None,) * (t.dim() - mask.dim())] if axes else mask.unsqueeze(1)
    spoiled = t.detach().clone(memory_format=torch.preserve_format)
    spoiled.masked_fill_(~spread, float("nan"))
    return spoiled.masked_fill_(~spread & (torch.rand(mask.shape) < 0.3).view(spread.shape), float("inf"))


def check(specimen: Specimen, module: nn.Module, layout: str, dtype: torch.dtype, form: str, given=None) -> None:
    mask, told = draw_mask(find_positions(specimen), form)
    x = spoil(draw(specimen, layout, dtype), mask, specimen)
    g = spoil(draw(specimen, "contiguous", dtype, seed=1) - 3, mask, specimen)
    leaf = x.detach().requires_grad_()
    parameters = [p for p in (module.weight, getattr(module, "bias", None)) if p is not None]
    y = module(leaf, **told)
    assert y.shape == x.shape
    assert y.dtype == dtype
    found = torch.autograd.grad(y, [leaf, *parameters], g)
    true_y, *true = expect(specimen, module, g, x, mask, given)
    stats = float(torch.nan_to_num(g.double(), 0.0, 0.0, 0.0).abs().max())
    rstd = 1 / module.eps**0.5 if module.eps else 1.0  # of a sample with one real position
    gamma = float(specimen.affine(module)[0].max())
    factor = 4 if dtype == torch.float32 else 64
    assert_close(y, true_y, factor, "y", float(np.abs(true_y).max()))
    terms = (abs(gamma) * rstd * stats if form != "holes" else 0.0, stats * 6, stats)
    for name, got, want, term in zip(("dx", "dgamma", "dbeta"), found, true, terms, strict=False):
        assert_close(got, want, factor, name, term)


def allowed(specimen: Specimen, form: str) -> bool:
    """Lengths need one axis of positions."""
    return form != "lengths" or len(find_positions(specimen)) == 2


CASES = [(s, form) for s in POSITIONED for form in FORMS if allowed(s, form)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("specimen", "form"), CASES, ids=lambda c: str(c).replace(" ", "_"))
def test_training(specimen, form, layout, dtype):
    check(
        specimen, specimen.make(dtype=torch.float64 if dtype == torch.float64 else torch.float32), layout, dtype, form
    )


@pytest.mark.parametrize("form", ["prefix", "holes"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("specimen", [s for s in TRACKING if s.spatial], ids=str)
def test_evaluation(specimen, layout, form):
    options = {"track_running_stats": True}
    module = specimen.make(**options).eval()
    mean, var = (wide(t).reshape(1, -1) for t in (module.running_mean, module.running_var))
    check(specimen, module, layout, torch.float32, form, given=(mean, var))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("form", ["prefix", "holes", "empty sample"])
@pytest.mark.parametrize("specimen", [s for s in TRACKING if s.spatial], ids=str)
def test_running_averages_move_by_real_positions_alone(specimen, form, momentum):
    if momentum is None and specimen.scheme == "instance":
        momentum = 0.3  # torch's instance norm has no cumulative average
    module = specimen.make(track_running_stats=True, momentum=momentum)
    before = [wide(t).copy() for t in (module.running_mean, module.running_var)]
    mask, told = draw_mask(find_positions(specimen), form)
    x = spoil(draw(specimen, "contiguous", torch.float32), mask, specimen)
    module(x, **told)
    means, variances = [], []
    for rows in split_rows(specimen, wide(x), mask.numpy()):
        if len(rows):
            means.append(rows.mean(0))
            variances.append(((rows - rows.mean(0)) ** 2).sum(0) / max(len(rows) - 1, 1))
    weight = 1.0 if momentum is None else momentum
    for got, old, new in zip(
        (module.running_mean, module.running_var), before, (np.mean(means, 0), np.mean(variances, 0)), strict=True
    ):
        assert_close(got, old * (1 - weight) + new * weight, 4, "running")
    assert int(module.num_batches_tracked) == (1 if specimen.scheme == "batch" else 0)


@pytest.mark.parametrize("kind", ["BatchNorm1d", "InstanceNorm1d"])
def test_a_batch_of_padding_changes_nothing(kind):
    module = getattr(anynorm, kind)(3, track_running_stats=True)
    state = {name: t.clone() for name, t in module.state_dict().items()}
    x = torch.full((2, 3, 4), float("nan"), requires_grad=True)
    y = module(x, lengths=[0, 0])
    assert torch.equal(y, torch.zeros(2, 3, 4))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 3, 4))
    assert all(torch.equal(t, state[name]) for name, t in module.state_dict().items())


def test_the_toy_of_a_mask_that_was_ignored():
    """tensorflow#30161: 2 and 4 beside two padded zeros have the mean 3.0; Keras once said 1.5."""
    x = torch.tensor([[[2.0, 4.0, 0.0, 0.0]]])
    counted, ignored = anynorm.BatchNorm1d(1, momentum=1.0), anynorm.BatchNorm1d(1, momentum=1.0)
    counted(x, lengths=[2])
    ignored(x)
    assert (counted.running_mean.item(), ignored.running_mean.item()) == (3.0, 1.5)
    assert counted.running_var.item() == 2.0


# ---- to the bit ----------------------------------------------------------------------------------------------------

NORMS = {
    "batch": lambda c: anynorm.BatchNorm1d(c),
    "instance": lambda c: anynorm.InstanceNorm1d(c, affine=True),
    "group": lambda c: anynorm.GroupNorm(2, c),
    "layer": lambda c: anynorm.LayerNorm(c),
    "rms": lambda c: anynorm.RMSNorm(c),
}


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
    mask, told = draw_mask(find_positions(specimen), form)
    x = spoil(draw(specimen, layout, torch.float32), mask, specimen)
    residual = spoil(draw(specimen, layout, torch.float32, seed=2), mask, specimen) if with_residual else None
    leaves = [[t.clone().requires_grad_() for t in (x, residual) if t is not None] for _ in range(2)]
    y = fused(*leaves[0], **told)
    spread = (
        mask[(...,) + (None,) * (x.dim() - mask.dim())] if specimen.scheme in ("layer", "rms") else mask.unsqueeze(1)
    )
    z = plain(leaves[1][0], **told)
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
    ("told", "error", "sentence"),
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
def test_masks_that_do_not_fit(told, error, sentence):
    module = anynorm.BatchNorm1d(3)
    with pytest.raises(error, match=sentence):
        module(torch.ones(2, 3, 5), **told)
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


# ---- the context -----------------------------------------------------------------------------------------------------


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        anynorm.BatchNorm1d(3), nn.Conv1d(3, 4, 3, stride=2, padding=1), anynorm.InstanceNorm1d(4), nn.ReLU()
    )


MASK = anynorm.mask_of([8, 4], 8)
SHORT = anynorm.shorten(MASK, 3, 2, 1)


def test_the_context_serves_the_norms_inside():
    net, x = build(), torch.randn(2, 3, 8)
    with anynorm.masked(MASK, SHORT):
        y = net(x)
    by_hand = build()
    z = by_hand[3](by_hand[2](by_hand[1](by_hand[0](x, mask=MASK)), mask=SHORT))
    assert torch.equal(y, z)
    assert not torch.equal(net(x), y)


def test_a_shortened_mask_is_that_of_the_sample_alone():
    for kernel_size, stride, padding, dilation in [
        (3, 1, 1, 1),
        (3, 2, 1, 1),
        (5, 3, 2, 1),
        (3, 2, 2, 2),
        (4, 4, 0, 1),
    ]:
        conv = nn.Conv1d(1, 1, kernel_size, stride, padding, dilation)
        found = anynorm.shorten(anynorm.mask_of(range(9, 21), 24), kernel_size, stride, padding, dilation)
        assert found.shape[1] == conv(torch.zeros(1, 1, 24)).shape[2]
        assert found.sum(1).tolist() == [conv(torch.zeros(1, 1, size)).shape[2] for size in range(9, 21)]


def test_a_mask_that_fits_no_layer():
    with anynorm.masked(MASK), pytest.raises(ValueError, match=r"InstanceNorm1d.*\(2, 4, 4\).*\(2, 4\); got \(2, 8\)"):
        build()(torch.randn(2, 3, 8))


def test_behind_the_pooling_of_positions_no_mask_is_needed():
    with anynorm.masked(MASK):
        assert anynorm.BatchNorm1d(3)(torch.randn(2, 3)).shape == (2, 3)


def test_the_context_is_the_threads_own():
    norm, x, found = anynorm.BatchNorm1d(3), torch.randn(2, 3, 8), []
    with anynorm.masked(MASK):
        thread = threading.Thread(target=lambda: found.append(norm(x)))
        thread.start()
        thread.join()
    assert bool((found[0][1, :, 4:] != 0).all())


def test_the_context_is_the_tasks_own():
    norm, x, found = anynorm.BatchNorm1d(3), torch.randn(2, 3, 8), {}

    async def inside(opened: asyncio.Event, done: asyncio.Event) -> None:
        with anynorm.masked(MASK):
            opened.set()
            await done.wait()
            found["inside"] = norm(x)

    async def outside(opened: asyncio.Event, done: asyncio.Event) -> None:
        await opened.wait()
        found["outside"] = norm(x)
        done.set()

    async def both() -> None:
        opened, done = asyncio.Event(), asyncio.Event()
        await asyncio.gather(inside(opened, done), outside(opened, done))

    asyncio.run(both())
    assert bool((found["inside"][1, :, 4:] == 0).all())
    assert bool((found["outside"][1, :, 4:] != 0).all())


def test_the_context_under_compile():
    """The graph breaks at the norm, and the mask is there; without a context a whole graph is made."""
    torch._dynamo.reset()
    net, x = build(), torch.randn(2, 3, 8)
    whole, broken = (torch.compile(net, backend="aot_eager", fullgraph=full) for full in (True, False))
    whole(x)
    with anynorm.masked(MASK, SHORT):
        torch.testing.assert_close(broken(x), net(x), atol=1e-6, rtol=1e-6)
    torch._dynamo.reset()
    torch.testing.assert_close(whole(x), net(x), atol=1e-6, rtol=1e-6)


def test_a_mask_under_vmap():
    x = torch.randn(4, 2, 3, 8)
    y = torch.func.vmap(lambda x: functional.instance_norm(x, mask=MASK))(x)
    for got, one in zip(y, x, strict=True):
        torch.testing.assert_close(got, functional.instance_norm(one, mask=MASK), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_does_not_forget_the_mask(use_reentrant):
    net, x = build(), torch.randn(2, 3, 8, requires_grad=True)
    with anynorm.masked(MASK, SHORT):
        y = checkpoint(net, x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match=r"computes this norm again outside the anynorm\.masked context"):
        y.sum().backward()
    with anynorm.masked(MASK, SHORT):
        checkpoint(net, x, use_reentrant=use_reentrant).sum().backward()
        (true,) = torch.autograd.grad(net(x).sum(), x)
    torch.testing.assert_close(x.grad, true)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_context_that_forward_had_not(use_reentrant):
    y = checkpoint(build(), torch.randn(2, 3, 8, requires_grad=True), use_reentrant=use_reentrant)
    with anynorm.masked(MASK, SHORT), pytest.raises(RuntimeError, match="inside one that forward had not"):
        y.sum().backward()


def test_masks_may_not_be_left_out():
    with pytest.raises(TypeError, match="one or more masks are needed"):
        anynorm.masked()


# ---- without padding -------------------------------------------------------------------------------------------------

LENGTHS = [5, 1, 4]


def sequences(c: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, c, generator=generator) for length in LENGTHS]


def make_all(name: str) -> list[nn.Module]:
    kinds = [NORMS[name](4) for _ in range(4)]
    if name == "instance":
        kinds = [anynorm.InstanceNorm1d(4, affine=True, track_running_stats=True) for _ in range(4)]
    return kinds


@pytest.mark.parametrize("name", NORMS)
def test_padded_packed_and_jagged_agree(name):
    padded_norm, packed_norm, jagged_norm, last_norm = make_all(name)
    rows = sequences()
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))
    flat = name in ("layer", "rms")
    y = padded_norm(padded if flat else padded.mT.contiguous(), lengths=LENGTHS)
    y = y if flat else y.mT
    real = torch.cat([y[i, :length] for i, length in enumerate(LENGTHS)])

    leaf = torch.cat(rows).requires_grad_()
    jagged = torch.nested.nested_tensor_from_jagged(leaf, lengths=None, offsets=torch.tensor([0, 5, 6, 10]))
    z = jagged_norm(jagged)
    assert z.is_nested
    torch.testing.assert_close(z.values(), real, atol=1e-6, rtol=1e-6)
    z.values().sin().sum().backward()
    (true,) = torch.autograd.grad(padded_norm_again(name, leaf).sin().sum(), leaf)
    torch.testing.assert_close(leaf.grad, true, atol=1e-5, rtol=1e-5)

    if not flat:
        w = last_norm(torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2))
        assert w.shape[1] == 4
        torch.testing.assert_close(w.transpose(1, 2).values(), real, atol=1e-6, rtol=1e-6)

    packed = nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
    v, _ = nn.utils.rnn.pad_packed_sequence(packed_norm(packed), batch_first=True)
    torch.testing.assert_close(
        torch.cat([v[i, :length] for i, length in enumerate(LENGTHS)]), real, atol=1e-6, rtol=1e-6
    )
    for other in (packed_norm, jagged_norm):
        for key, value in padded_norm.state_dict().items():
            torch.testing.assert_close(other.state_dict()[key], value, msg=key)


def padded_norm_again(name: str, rows: Tensor) -> Tensor:
    """The rows padded, normalized, and taken out again."""
    parts = rows.split(LENGTHS)
    padded = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    norm = make_all(name)[0]
    flat = name in ("layer", "rms")
    y = norm(padded if flat else padded.mT.contiguous(), lengths=LENGTHS)
    y = y if flat else y.mT
    return torch.cat([y[i, :length] for i, length in enumerate(LENGTHS)])


@pytest.mark.parametrize("kind", ["BatchNormAct1d", "InstanceNormAct1d", "GroupNormAct", "LayerNormAct"])
def test_what_follows_a_ragged_norm(kind):
    fused = getattr(anynorm, kind)(*((2, 4) if kind == "GroupNormAct" else (4,)), activation="silu")
    plain = getattr(anynorm, kind.replace("Act", ""))(*((2, 4) if kind == "GroupNormAct" else (4,)))
    rows, more = sequences(), [row + 1 for row in sequences()]
    for make in (lambda r: torch.nested.nested_tensor(r, layout=torch.jagged), pack):
        x, residual = make(rows), make(more)
        y, z = fused(x, residual=residual), plain(x)
        y, z, added = (t.data if isinstance(t, nn.utils.rnn.PackedSequence) else t.values() for t in (y, z, residual))
        torch.testing.assert_close(y, nn.functional.silu(z + added), atol=1e-6, rtol=1e-6)


def pack(rows: list[Tensor]) -> nn.utils.rnn.PackedSequence:
    return nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x: functional.group_norm(x, 3), RuntimeError, "channels=4, groups=3; try 1 or 2"),
        (lambda x: functional.group_norm(x, 2, activation="tanh"), ValueError, "activation must be one of"),
        (lambda x: functional.instance_norm(x, use_input_stats=False), RuntimeError, "needs running statistics"),
        (lambda x: functional.instance_norm(x, torch.zeros(3), torch.ones(3)), RuntimeError, "one element per channel"),
        (lambda x: functional.layer_norm(x, (4,), lengths=[5, 1, 4]), ValueError, "has no padding"),
        (lambda x: functional.group_norm(x, 2, residual=x.data), ValueError, "residual must be ragged"),
        (lambda x: functional.group_norm(x, 2, residual=pack(sequences()[:2])), RuntimeError, "shape of the input"),
    ],
)
def test_ragged_inputs_are_checked(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(pack(sequences()))


def test_ragged_inputs_take_no_mask():
    packed = nn.utils.rnn.pack_sequence(sequences(), enforce_sorted=False)
    with pytest.raises(ValueError, match="has no padding; got a mask or lengths"):
        functional.batch_norm(packed, None, None, training=True, mask=torch.ones(1))


def test_every_norm_of_the_family_takes_a_mask():
    assert set(NORMS) == {name for name, scheme in FAMILY.items() if not scheme.variant_of}
