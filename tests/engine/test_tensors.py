"""Tensors read in C++: never one that is not plain memory to Python, and the same bits, versions and refusals."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize, grad, jvp, vmap

import anynorm
from anynorm.engine import kernels, paths, watch
from anynorm.engine.gradients import apply
from anynorm.engine.memory import CPU
from anynorm.engine.request import Request
from anynorm.pooling import find_pooling
from anynorm.sources import BATCH
from kernel_cases import run_python

pytestmark = pytest.mark.skipif(not kernels.READS_TENSORS, reason="this torch does not lend its tensors' memory")
X = torch.randn(3, 4)


class Subclass(torch.Tensor):
    pass


def leak(transform: Callable) -> Tensor:
    """What a function saw under a transform that is over."""
    seen = []
    transform(lambda x: (seen.append(x), x.sum())[1])
    return seen[0]


def make_fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(3)


def make_inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


def free(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


READ: dict[str, Callable[[], Tensor]] = {
    "tensor": lambda: X.clone(),
    "parameter": lambda: torch.nn.Parameter(X),
    "inference": make_inference,
    "no axes": lambda: torch.tensor(1.0),
    "strided": lambda: X[:, ::2],
    "expanded": lambda: torch.ones(1).expand(4),
    "bfloat16": X.bfloat16,
    "float16": X.half,
    "float64": X.double,
}
LEFT: dict[str, Callable[[], Tensor]] = {
    "negative bit": lambda: torch._neg_view(X),
    "imaginary part of a conjugate": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "zeros that are only noted": lambda: torch._efficientzerotensor(3),
    "meta": lambda: X.to("meta"),
    "sparse": X.to_sparse,
    "compressed": X.to_sparse_csr,
    "another library's": X.to_mkldnn,
    "quantized": lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([X[0], X[1, :2]]),
    "jagged": lambda: torch.nested.nested_tensor([X[0], X[1, :2]], layout=torch.jagged),
    "whole numbers": lambda: torch.arange(3),
    "complex": lambda: X.to(torch.complex64),
    "eight bits": lambda: X.to(torch.float8_e4m3fn),
    "functional": lambda: torch._to_functional_tensor(X),
    "fake": make_fake,
    "subclass": lambda: X.as_subclass(Subclass),
    "unknown size": lambda: torch.nn.UninitializedParameter(),
    "freed": lambda: free(X.clone()),
    "empty": lambda: torch.empty(0),
    "of vmap": lambda: leak(lambda f: vmap(f)(X)),
    "of grad": lambda: leak(lambda f: grad(f)(X)),
    "of jvp": lambda: leak(lambda f: jvp(f, (X,), (X,))),
    "of functionalize": lambda: leak(lambda f: functionalize(f)(X)),
    "nine axes": lambda: torch.ones([1] * 9),
}


@pytest.mark.parametrize("name", READ)
def test_plain_memory_is_read(name):
    assert watch.is_plain(READ[name]())
    assert kernels.compiled.describe(READ[name]()) is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LEFT)
def test_anything_else_is_left_to_python(name):
    assert kernels.compiled.describe(LEFT[name]()) is None
    assert kernels.compiled.describe(X, LEFT[name]()) is None


@pytest.mark.parametrize("thing", [1, "x", [X], (), object(), X.numpy(), torch.float32])
def test_what_is_no_tensor_is_left_to_python(thing):
    assert kernels.compiled.describe(thing) is None


def test_gradients_of_a_batch_are_left_to_python():
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append((is_legacy_batchedtensor(g), kernels.compiled.describe(g)))
            return g

    x = X.clone().requires_grad_()
    torch.autograd.grad(Look.apply(x), x, torch.randn(2, 3, 4), is_grads_batched=True)
    assert seen == [(True, None)]


def test_a_description_tells_apart_what_checks_tell_apart():
    describe = kernels.compiled.describe
    others = [X.double(), X.half(), X.bfloat16(), X[None], X[:2], X.t().contiguous().t(), X.flatten()]
    known = {describe(X, None, None), describe(X, None), describe(X, X[0], None), describe(X, None, X[0])}
    known |= {describe(X, X[0].double(), None)} | {describe(x, None, None) for x in others}
    assert len(known) == 5 + len(others)
    assert describe(X, None, None) == describe(X.clone(), None, None)
    assert describe(*[X] * 7) is not None
    assert describe(*[X] * 8) is None


KINDS: dict[str, Callable[[], torch.nn.Module]] = {
    "batch": lambda: anynorm.BatchNorm1d(6),
    "plain batch": lambda: anynorm.BatchNorm1d(6, affine=False, track_running_stats=False),
    "evaluation": lambda: anynorm.BatchNorm1d(6).eval(),
    "fused": lambda: anynorm.BatchNormAct1d(6, activation="silu"),
    "group": lambda: anynorm.GroupNorm(2, 6),
    "instance": lambda: anynorm.InstanceNorm1d(6, affine=True),
    "layer": lambda: anynorm.LayerNorm(5),
    "rms": lambda: anynorm.RMSNorm(5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_agree_to_the_bit_and_neither_calls_the_other(kind, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    x, g = (torch.randn(4, 6, 5, generator=generator).to(dtype) for _ in range(2))
    masks = [None] if kind in ("layer", "rms") else [None, torch.rand(4, 5, generator=generator) > 0.3]
    for mask in masks:
        found = []
        for reads in (True, False):
            norm, leaf = KINDS[kind]().to(torch.float64 if dtype == torch.float64 else torch.float32), x.clone()
            with monkeypatch.context() as patch:
                for module in (kernels, watch):
                    patch.setattr(module, "READS_TENSORS", reads)
                if reads:
                    patch.setattr(kernels, "addresses", None)
                options = {} if mask is None else {"mask": mask}
                y = norm(leaf.requires_grad_(), **options)
                gradients = torch.autograd.grad(y, [leaf, *norm.parameters()], g)
                with torch.no_grad():
                    again = norm(leaf, **options)
            buffers = list(norm.buffers())
            found.append(([y, again, *gradients, *buffers], [t._version for t in buffers]))
        assert found[0][1] == found[1][1]
        assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))


def test_nothing_leaks():
    """References of tensors that a call has looked at or refused are as they were."""
    norm, x, cut = anynorm.LayerNorm(4), X.clone(), torch.ones(8)[:4]
    cut.untyped_storage().resize_(4)
    objects = [x, norm.weight, norm.bias, cut, torch.float64, torch.contiguous_format, CPU]
    norm(x)
    before = [sys.getrefcount(t) for t in objects]
    with torch.no_grad():
        for _ in range(10):
            norm(x)
            with pytest.raises(RuntimeError, match="storage of"):
                anynorm.functional.layer_norm(x, (4,), cut)
    after = [sys.getrefcount(t) for t in objects]
    assert all(abs(a - b) < 5 for a, b in zip(after, before, strict=True))


def test_an_older_torch_is_served_in_python():
    """Before torch 2.10 tensors did not lend their memory to C."""
    source = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
import anynorm
from anynorm.engine import kernels
x = torch.randn(3, 4, requires_grad=True)
anynorm.LayerNorm(4)(x).sum().backward()
print(kernels.READS_TENSORS, bool(kernels.OFF), kernels.compiled.describe(x))
"""
    assert run_python(source) == "False False None"


def make_strange() -> list[Any]:
    """What may stand where a tensor should, some of it right in some places."""
    short, freed = torch.ones(4), free(torch.ones(3, 4))
    short.untyped_storage().resize_(8)
    plain = [X, X.double(), X.half(), X.t(), X[:, :3], X[0], torch.ones(8)[::2], torch.ones(6).double(), torch.empty(0)]
    odd = [X.to("meta"), X.to_sparse(), X.as_subclass(Subclass), torch.ones(1).expand(3, 4), short, freed]
    return [None, 1, "x", (), object(), 1.5, -1.0, float("nan"), *plain, *odd]


def test_nothing_that_is_given_ends_the_process():
    """Wrong types and dead tensors, from two threads: an answer, None or an exception."""
    strange = make_strange()
    pooling = find_pooling("n c -> n", "c", True, 2)
    plan = kernels.find_plan(X, pooling)
    assert plan is not None
    request = Request(BATCH, 1e-5, None, None, None, None)
    known = {"plans": paths.PLANS, "function": "group_norm", "apply": apply}
    tensors = {"x": X, "weight": X[0], "bias": X[1], "residual": None}
    saved = X, X[0], X[1], None, None, torch.ones(6).double()
    how = plan, 1e-5, None, False, None, None
    calls = [
        (kernels.compiled.normalize_known, known | tensors | {"request": request}),
        (kernels.compiled.forward_tensors, {"plan": plan} | tensors | {"request": request, "keep": True}),
        (kernels.compiled.backward_tensors, {"grad": X, "saved": saved, "how": how, "needs": (True,) * 4}),
    ]
    may_be_strange = {*tensors, "grad", "saved", "how", "needs", "request"}
    answers: list[set[str]] = [set() for _ in calls]

    def replace(draw: random.Random, value: Any) -> Any:
        """Something strange, or where there are several things, one of them strange."""
        if type(value) not in (tuple, Request) or draw.random() < 0.1:
            return draw.choice(strange)
        place = draw.randrange(len(value))
        parts = [draw.choice(strange) if i == place else part for i, part in enumerate(value)]
        return Request(*parts) if type(value) is Request else tuple(parts)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        torch.set_grad_enabled(False)  # in this thread; gradients that are to be differentiable are left to Python
        for _ in range(1000):
            for (call, good), found in zip(calls, answers, strict=True):
                names = draw.sample(sorted(may_be_strange & set(good)), draw.randint(0, 2))
                given = good | {name: replace(draw, good[name]) for name in names}
                try:
                    result = call(*given.values())
                    found.add("None" if result is None else "an answer")
                except (AttributeError, TypeError, ValueError, KeyError) as error:
                    found.add(type(error).__name__)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers[0] >= {"None", "TypeError"}  # no such call is known
    assert all(found >= {"None", "an answer", "TypeError"} for found in answers[1:]), answers
