"""Compiled autograd over norms that ran eagerly: the gradients of a plain backward, masks and residuals included.

torch's own layers work there; a backward in Python is called from the graph, since compilers cannot look into kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd

import anynorm
from anynorm.engine import kernels
from anynorm.engine.request import Request
from anynorm.functional.batch import BATCH_NORM
from anynorm.sources import Exchange
from anynorm.sources import Merged as MergedSource


class Doubled(Exchange):
    """A second part that has what this one has."""

    def merge(self, moments):
        return moments.merge(moments)

    def merge_sums(self, sums):
        return 2 * sums


class Merged(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(torch.tensor([0.5, 1, 1.5, 2]) - n) for n in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        request = Request(MergedSource(exchange=Doubled()), mask=mask)
        return BATCH_NORM.normalize(x, self.weight, self.bias, None, request)


NORMS: dict[str, Callable[[], torch.nn.Module]] = {
    "batch": lambda: anynorm.BatchNorm2d(4),
    "evaluation": lambda: anynorm.BatchNorm2d(4).eval(),
    "ghost": lambda: anynorm.GhostBatchNorm2d(4, ghost_size=2),
    "renorm": lambda: anynorm.BatchRenorm2d(4, warmup=(0, 0, 0)),
    "fused": lambda: anynorm.BatchNormAct2d(4, activation="silu"),
    "group": lambda: anynorm.GroupNorm(2, 4),
    "instance": lambda: anynorm.InstanceNorm2d(4, affine=True),
    "layer": lambda: anynorm.LayerNorm(6),
    "rms": lambda: anynorm.RMSNorm(6),
    "merged": Merged,
}
WITH_MASK = ("batch", "evaluation", "ghost", "renorm", "fused", "group", "instance", "merged")


def find_gradients(norm: torch.nn.Module, is_compiled: bool, **options: Tensor) -> list[Tensor]:
    """Twice: the second graph is a remembered one."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(2):
        leaves = [torch.randn(4, 4, 5, 6, generator=generator, requires_grad=True)]
        given = dict(options)
        if "residual" in given:
            leaves.append(given["residual"].clone().requires_grad_())
            given["residual"] = leaves[1]
        norm.zero_grad()
        loss = (norm(leaves[0] * 2, **given) * torch.randn(4, 4, 5, 6, generator=generator)).sum()
        if is_compiled:
            with compiled_autograd._enable(torch.compile(backend="aot_eager")):
                loss.backward()
        else:
            loss.backward()
        found += [leaf.grad for leaf in leaves] + [p.grad.clone() for p in norm.parameters()]
    return found


def check(name: str, **options: Tensor) -> None:
    true, found = (find_gradients(NORMS[name](), is_compiled, **options) for is_compiled in (False, True))
    assert len(true) >= 4
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["kernels", "formula"])
def path(request, monkeypatch):
    """With the kernels, and in torch operations where there are none."""
    if request.param == "formula":
        monkeypatch.setattr(kernels, "find_plan", lambda *_, **options: None)
    elif kernels.OFF:
        pytest.skip("the kernels are off")


@pytest.mark.parametrize("name", NORMS)
def test_gradients_are_those_of_a_plain_backward(name, path):
    check(name)


@pytest.mark.parametrize("name", WITH_MASK)
def test_under_a_mask(name, path):
    check(name, mask=(torch.rand(4, 5, 6) > 0.3).float())


def test_with_a_residual(path):
    check("fused", residual=torch.randn(4, 4, 5, 6))
