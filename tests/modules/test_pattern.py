"""Patterns: every member of the family, ones nobody named, and errors that show pattern, shape and repair."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.nn as nn

from anynorm import AnyNorm, PatternError, reference
from specimens import wide

MEMBERS = [
    ("batch", lambda: AnyNorm("n c h w -> c", affine="c", c=12, track_running_stats=True), lambda: nn.BatchNorm2d(12)),
    ("batch s", lambda: AnyNorm("n c s -> c", affine="c", c=12), lambda: nn.BatchNorm2d(12, track_running_stats=False)),
    ("instance", lambda: AnyNorm("n c h w -> n c", affine="c", c=12), lambda: nn.InstanceNorm2d(12, affine=True)),
    ("group", lambda: AnyNorm("n (g k) h w -> n g", affine="g k", g=3, k=4), lambda: nn.GroupNorm(3, 12)),
    ("layer", lambda: AnyNorm("n d -> n", affine="d", d=(12, 5, 6)), lambda: nn.LayerNorm((12, 5, 6))),
    ("last", lambda: AnyNorm("n d -> n", affine="d", d=6), lambda: nn.LayerNorm(6)),
    ("rms", lambda: AnyNorm("n d -> n", "d", d=6, centred=False, bias=False, eps=1e-3), lambda: nn.RMSNorm(6, 1e-3)),
]  # fmt: skip


@pytest.mark.parametrize(("make", "theirs"), [m[1:] for m in MEMBERS], ids=[m[0] for m in MEMBERS])
def test_members_equal_torch_and_load_its_checkpoints(make, theirs):
    ours, its = make(), theirs()
    for parameter in its.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(its.state_dict(), strict=True)
    for step in range(3):
        x = torch.randn(4, 12, 5, 6, generator=torch.Generator().manual_seed(step)) + 1
        torch.testing.assert_close(ours(x), its(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.eval()(x), its.eval()(x), rtol=1e-5, atol=1e-5)
    its.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("pattern", "affine", "sizes", "view", "axes", "gamma"),
    [
        ("n c h w -> n h w", "c", {"c": 12}, (4, 12, 5, 6), (1,), (1, 12, 1, 1)),
        ("n c h w -> n w", "c h", {"c": 12, "h": 5}, (4, 12, 5, 6), (1, 2), (1, 12, 5, 1)),
        ("(b m) c h w -> b c", "c", {"m": 2, "c": 12}, (2, 2, 12, 5, 6), (1, 3, 4), (1, 1, 12, 1, 1)),
        ("n (g k) h w -> g", "g", {"g": 3, "k": 4}, (4, 3, 4, 5, 6), (0, 2, 3, 4), (1, 3, 1, 1, 1)),
        ("n c (a b) w -> n a", "", {"a": 5}, (4, 12, 5, 1, 6), (1, 3, 4), (1, 1, 1, 1, 1)),
        ("n c h w ->", "", {}, (4, 12, 5, 6), (0, 1, 2, 3), (1, 1, 1, 1)),
    ],
)
def test_norms_nobody_named(pattern, affine, sizes, view, axes, gamma, layout):
    x = (
        (torch.randn(4, 12, 5, 6, generator=torch.Generator().manual_seed(0)) + 2)
        .to(memory_format=layout)
        .requires_grad_()
    )
    norm = AnyNorm(pattern, affine=affine, **sizes)
    w, b = np.ones(gamma), np.zeros(gamma)
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        w, b = wide(norm.weight).reshape(gamma), wide(norm.bias).reshape(gamma)
    y = norm(x)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(y, [x, *norm.parameters()], g)
    np.testing.assert_allclose(wide(y).reshape(view), reference.forward(wide(x).reshape(view), axes, w, b), atol=2e-6)
    true = reference.gradients(wide(g).reshape(view), wide(x).reshape(view), axes, w)
    for mine, its in zip(found, true, strict=False):
        np.testing.assert_allclose(wide(mine).reshape(its.shape), its, rtol=1e-5, atol=1e-5)


def test_first_axis_with_gamma():
    norm = AnyNorm("c n -> c", affine="c", c=6)
    x = torch.randn(6, 5, requires_grad=True)
    torch.testing.assert_close(norm(x), nn.BatchNorm1d(6)(x.T).T, rtol=1e-5, atol=1e-5)
    norm(x).square().sum().backward()
    expected = reference.gradients(2 * wide(norm(x)), wide(x), (1,), np.ones((6, 1)))
    np.testing.assert_allclose(wide(norm.weight.grad), expected[1].ravel(), rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (lambda: AnyNorm("n c h w"), ['pattern \'n c h w\'', "->", 'write for example "n c s -> c"']),
        (lambda: AnyNorm("n (c h -> n"), ["got '('", "parentheses"]),
        (lambda: AnyNorm("n c c -> n"), ["'c' twice", "rename"]),
        (lambda: AnyNorm("n c -> n x"), ["got 'x'", "choose among n, c"]),
        (lambda: AnyNorm("n c -> n c"), ["at least one axis must be pooled"]),
        (lambda: AnyNorm("n c h w -> c", affine="c"), ["needs the size of 'c'", "pass c=..."]),
        (lambda: AnyNorm("n c h w -> c", affine="x", x=3), ["has no axis 'x'", "choose among c, h, n, w"]),
        (lambda: AnyNorm("n c h w -> c", track_running_stats=True), ["running averages needs the size of 'c'"]),
        (lambda: AnyNorm("n c -> c", centred=False, track_running_stats=True), ["need centred=True"]),
        (lambda: AnyNorm("n c h w -> c")(torch.zeros(2, 3, 4)), ["names 4 axes", "with 3", "got shape (2, 3, 4)"]),
        (lambda: AnyNorm("n c s -> c")(torch.zeros(2)), ["at least 2 axes", "got shape (2,)"]),
        (lambda: AnyNorm("n c h w -> c", "c", c=5)(torch.zeros(2, 3, 4, 4)), ["built for c=5", "c is 3", "with c=3"]),
        (lambda: AnyNorm("n (g k) s -> n g", g=4)(torch.zeros(2, 6, 3)), ["splits axis 1", "(2, 6, 3)", "is 6"]),
        (lambda: AnyNorm("n c s -> n c")(torch.zeros(2, 6)), ["pools nothing", "got shape (2, 6)"]),
        (lambda: AnyNorm("n c -> c", eps=-1.0), ["eps must be non-negative; got -1.0"]),
        (lambda: AnyNorm("n (g k) s -> n g", g=0), ["sizes are whole numbers of 1 or more; got g=0"]),
        (lambda: AnyNorm("n (g k) s -> n g")(torch.zeros(2, 6, 3)), ["all sizes in (g k) but one", "pass g=..."]),
        (lambda: AnyNorm("n d -> n", affine="d", d=(3, 4))(torch.zeros(2, 4, 3)), ["built for d=(3, 4)", "(2, 4, 3)"]),
    ],
)  # fmt: skip
def test_errors(build, parts):
    with pytest.raises(PatternError) as caught:
        build()
    for part in parts:
        assert part in str(caught.value)


def test_one_value_per_mean_is_refused_and_nothing_moves():
    norm = AnyNorm("n c -> c", c=3, track_running_stats=True)
    with pytest.raises(ValueError, match="AnyNorm: statistics need more than 1 value per mean"):
        norm(torch.ones(1, 3))
    assert norm.num_batches_tracked == 0
    assert norm.eval()(torch.ones(1, 3)).shape == (1, 3)


def test_cumulative_average():
    ours, theirs = AnyNorm("n c s -> c", c=3, track_running_stats=True, momentum=None), nn.BatchNorm1d(3, momentum=None)
    for step in range(3):
        x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(step))
        ours(x), theirs(x)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_integers_are_refused():
    with pytest.raises(NotImplementedError, match="input must be float16, bfloat16, float32 or float64"):
        AnyNorm("n c -> c")(torch.ones(2, 3, dtype=torch.long))


def test_repr_and_pickle():
    norm = AnyNorm("n (g k) s -> n g", affine="g k", g=2, k=3, eps=1e-3)
    assert "affine='g k'" in repr(norm)
    assert "g=2, k=3" in repr(norm)
    x = torch.randn(4, 6, 5)
    assert torch.equal(pickle.loads(pickle.dumps(norm))(x), norm(x))


@pytest.mark.parametrize("letter", ["b", "m", "c", "g", "k", "l", "x"])
@pytest.mark.parametrize("pattern", ["n _ t -> n _", "_ t -> _", "n _ t -> _", "(_ u) t -> _", "n (_ u) t -> n _"])
def test_no_letter_but_n_s_and_d_has_a_meaning(pattern, letter):
    """Defect: an axis called b was taken for ghost batches, and the running averages were wrong in silence."""
    x = torch.randn(*(6, 3, 4)[-len(pattern.split("->")[0].replace("(_ u)", "_").split()) :])
    found = []
    for name in ("q", letter):
        norm = AnyNorm(pattern.replace("_", name), track_running_stats=True, **{name: 3})
        y = norm(x.clone().requires_grad_())
        found.append([y.detach(), norm.running_mean, norm.running_var, norm.eval()(x)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_running_averages_over_samples_whatever_the_next_axis_is_called():
    x = torch.randn(5, 3, 4)
    norm = AnyNorm("n b t -> n b", track_running_stats=True, b=3)
    norm(x)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var(2).mean(0))
