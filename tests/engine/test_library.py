"""What a compiler puts into its graph: one operation for a norm, with a mask too."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import anynorm
from anynorm.engine import kernels, library

MAKE = {
    "batch": (lambda: anynorm.BatchNorm1d(64), (8, 64, 70)),
    "fused": (lambda: anynorm.GroupNormAct(8, 64, activation="silu"), (8, 64, 70)),
    "rms": (lambda: anynorm.RMSNorm(64), (8, 70, 64)),
}


def capture(module):
    """The module, compiled without code of the compiler's own, and the operations of its graphs."""
    seen: list[str] = []

    def compile_graph(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    return torch.compile(module, backend=aot_autograd(fw_compiler=compile_graph), fullgraph=True), seen


@pytest.mark.skipif(bool(kernels.OFF), reason="without kernels a compiler gets the formula")
@pytest.mark.parametrize("form", ["none", "holes", "lengths"])
@pytest.mark.parametrize("name", MAKE)
def test_a_compiled_norm_is_the_kernels(name, form):
    """*Equals eager* to the bit: y, all gradients and running averages."""
    make, shape = MAKE[name]
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=generator) for _ in range(2))
    assert library.serves(x)
    holes = torch.rand(8, 70, generator=generator) < 0.7
    options = {"none": {}, "holes": {"mask": holes}, "lengths": {"lengths": torch.arange(8) * 10}}[form]
    found = []
    for compiled in (False, True):
        module = make()
        called, seen = capture(module) if compiled else (module, [])
        leaf = x.clone().requires_grad_()
        y = called(leaf, **options)
        found.append([y, *torch.autograd.grad(y, [leaf, *module.parameters()], g), *module.buffers()])
    assert seen.count("anynorm.forward.default") == seen.count("anynorm.backward.default") == 1
    for mine, its in zip(*found, strict=True):
        assert torch.equal(mine, its)
