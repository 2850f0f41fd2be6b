"""The oracle against torch's autograd in float64, by a third way of writing the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anynorm import reference

CASES = [
    ((6, 4, 5), (0, 2), (1, 4, 1), True),
    ((6, 4, 5), (2,), (1, 4, 1), True),
    ((6, 20), (1,), (20,), True),
    ((6, 20), (1,), (20,), False),
    ((3, 2, 4, 5), (2, 3), (1, 2, 4, 1), True),
]


@pytest.mark.parametrize(("shape", "axes", "spread", "centred"), CASES)
def test_forward_and_gradients(shape, axes, spread, centred):
    generator = torch.Generator().manual_seed(0)
    x, gamma, beta = (
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in (shape, spread, spread)
    )
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    centre = x - x.mean(axes, keepdim=True) if centred else x
    y = centre / (centre.pow(2).mean(axes, keepdim=True) + 1e-5).sqrt() * gamma + beta
    true = torch.autograd.grad(y, (x, gamma, beta), g)
    arrays = [t.detach().numpy() for t in (x, gamma, beta, g)]
    got_y = reference.forward(arrays[0], axes, arrays[1], arrays[2], centred=centred)
    got = reference.gradients(arrays[3], arrays[0], axes, arrays[1], centred=centred)
    np.testing.assert_allclose(got_y, y.detach().numpy(), rtol=1e-12, atol=1e-12)
    for mine, its in zip(got, true, strict=True):
        np.testing.assert_allclose(mine, its.numpy(), rtol=1e-11, atol=1e-12)


def test_given_statistics_are_constants():
    x, g = np.array([[1.0, 5.0]]), np.array([[1.0, 2.0]])
    given = (np.array([[1.0, 1.0]]), np.array([[4.0, 4.0]]))
    np.testing.assert_allclose(reference.forward(x, (0,), eps=0.0, given=given), [[0.0, 2.0]])
    dx, dgamma, dbeta = reference.gradients(g, x, (0,), gamma=[[3.0, 3.0]], eps=0.0, given=given)
    np.testing.assert_allclose(dx, [[1.5, 3.0]])
    np.testing.assert_allclose(dgamma, [[0.0, 4.0]])
    np.testing.assert_allclose(dbeta, [[1.0, 2.0]])
