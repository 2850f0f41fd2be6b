"""Whatever hypothesis draws: shapes, strides, dtypes and values against the reference, and what must never change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import anynorm
from anynorm import reference
from anynorm.pooling import find_pooling
from anynorm.statistics import Moments, centre, find_moments
from specimens import assert_close, wide

F = anynorm.functional
pytestmark = pytest.mark.filterwarnings("ignore:.*one value per")
quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def inputs(draw) -> torch.Tensor:
    """(N, C, *positions) with any order of axes in memory, gaps between elements, and any scale and offset."""
    shape = draw(st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 4, 6, 33])))
    shape += tuple(draw(st.lists(st.integers(1, 17), max_size=3)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    steps = [draw(st.sampled_from([1, 1, 2])) for _ in shape]
    order = draw(st.permutations(range(len(shape))))
    seed, mean, log = draw(st.integers(0, 999)), draw(st.sampled_from([0, 1, -30, 1000])), draw(st.integers(-2, 2))
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn([shape[a] * steps[a] for a in order], generator=generator, dtype=torch.float64) + mean) * 10.0**log
    limit = torch.finfo(dtype).max  # 1e5 is beyond float16
    x = x.clamp(-limit, limit).to(dtype).permute([order.index(a) for a in range(len(shape))])
    x = x[tuple(slice(None, None, step) for step in steps)]
    assert x.shape == shape
    assume(bool(torch.isfinite(x).all()))  # 1e5 is infinite in float16
    return x


def check(y: torch.Tensor, true: np.ndarray) -> None:
    # In float64 x - mean itself rounds, by the ratio of mean and standard deviation more than y can show.
    assert_close(y, true, 2 if y.dtype == torch.float32 else 1e6, "y")


@quick
@given(inputs())
def test_batch(x):
    axes = (0, *range(2, x.dim()))
    assume(x.numel() // x.shape[1] > 1)
    check(F.batch_norm(x, None, None, training=True), reference.forward(wide(x), axes))


@quick
@given(inputs(), st.sampled_from([1, 2]))
def test_group(x, groups):
    assume(x.shape[1] % groups == 0 and x.numel() // groups > 1)
    view = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    true = reference.forward(wide(x).reshape(view), tuple(range(2, len(view))))
    check(F.group_norm(x, groups), true.reshape(x.shape))


@quick
@given(inputs())
def test_instance(x):
    assume(x[0, 0].numel() > 1)
    check(F.instance_norm(x), reference.forward(wide(x), tuple(range(2, x.dim()))))


@quick
@given(inputs(), st.integers(1, 3))
def test_layer_and_rms(x, last):
    last = min(last, x.dim())
    axes = tuple(range(x.dim() - last, x.dim()))
    check(F.layer_norm(x, x.shape[-last:]), reference.forward(wide(x), axes))
    check(F.rms_norm(x, x.shape[-last:], eps=1e-4), reference.forward(wide(x), axes, eps=1e-4, centred=False))


@quick
@given(inputs())
def test_input_is_never_changed_and_gradient_matches(x):
    assume(x.numel() // x.shape[1] > 1 and x.dtype not in (torch.bfloat16, torch.float16))
    before, leaf = x.clone(), x.detach().requires_grad_()
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    (dx,) = torch.autograd.grad(F.batch_norm(leaf, None, None, training=True), leaf, g)
    assert torch.equal(before, x)
    axes = (0, *range(2, x.dim()))
    true = reference.gradients(wide(g), wide(x), axes)[0]
    _, var = reference.moments(wide(x), axes)
    term = float((1 / np.sqrt(var + 1e-5)).max() * np.abs(wide(g)).max())
    assert_close(dx, true, 4 if x.dtype == torch.float32 else 1e5, "dx", term)


@quick
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.sampled_from([0.0, 1e6]), st.booleans(), st.randoms())
def test_merge_is_the_moments_of_all(counts, mean, centred, random):
    """In any order, with empty parts."""
    pooling = find_pooling("n c -> c", "", centred, 2)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(count, 3, generator=generator, dtype=torch.float64) + mean for count in counts]
    assume(sum(counts) > 0)
    found = [find_moments(centre(part, pooling)) if len(part) else empty(centred) for part in parts]
    random.shuffle(found)
    total = found[0]
    for more in found[1:]:
        total = total.merge(more)
    whole = find_moments(centre(torch.cat(parts), pooling))
    assert total.count == whole.count
    torch.testing.assert_close(total.m2, whole.m2, rtol=1e-9, atol=1e-9)
    if centred:
        torch.testing.assert_close(total.mean, whole.mean, rtol=1e-12, atol=1e-12)


def empty(centred: bool) -> Moments:
    zero = torch.zeros(1, 3, dtype=torch.float64)
    return Moments(0, zero if centred else None, zero)


@quick
@given(inputs(), st.floats(0.1, 10), st.floats(-5, 5))
def test_scale_and_shift_of_the_input_do_not_matter(x, scale, shift):
    """Batch norm of a * x + b is batch norm of x, while eps is small beside the variance."""
    x = x.double()
    assume(x.numel() // x.shape[1] >= 3)
    y = F.batch_norm(x, None, None, training=True, eps=1e-30)
    z = F.batch_norm(x * scale + shift, None, None, training=True, eps=1e-30)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
