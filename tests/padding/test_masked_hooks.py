"""`anynorm.masked(mask, model=model)` leaves nothing behind, among hooks, threads, checkpoints and compilers."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as hooks_of_all_modules
from torch.utils.checkpoint import checkpoint

import anynorm
from anynorm.padding.context import CONTEXTS
from padding.masked_models import LENGTHS, run, unsettle


def build() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 4, 3, 2, 1), anynorm.BatchNorm1d(4), nn.SiLU(), nn.Conv1d(4, 4, 3, padding=1))
    return unsettle(net)


def test_nothing_stays_on_the_model():
    net, x = build(), torch.randn(3, 4, 40)
    plain = net(x)
    with anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
        inside = net(x)
        twin, other = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
        torch.save(net, io.BytesIO())
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in (*net.modules(), *twin.modules()))
    assert not torch.equal(inside, plain)
    assert torch.equal(net(x), plain)
    assert torch.equal(twin(x), plain)
    assert torch.equal(other(x), plain)


def count_hooks() -> int:
    return len(hooks_of_all_modules._global_forward_pre_hooks) + len(hooks_of_all_modules._global_forward_hooks)


def test_hooks_go_with_the_context_and_with_the_graph_that_would_compute_layers_again():
    net, x = build(), torch.randn(3, 4, 40, requires_grad=True)
    with anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
        y = net(x)
        assert count_hooks() == 2
    assert count_hooks() == 0
    y.sum().backward()
    for use_reentrant in (True, False):
        with anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
            y = checkpoint(net, x, use_reentrant=use_reentrant)
        assert count_hooks() == 2
        with pytest.raises(RuntimeError, match="activation checkpointing"):
            y.sum().backward()
        assert count_hooks() == 0
        with anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
            y = checkpoint(net, x, use_reentrant=use_reentrant)
        del y
        assert count_hooks() == 0


def test_an_exception_closes_the_context():
    net, x = build(), torch.randn(3, 4, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError), anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
            raise KeyError
        with pytest.raises(RuntimeError), anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
            net(x[:, :3])
    assert CONTEXTS.opened == 0
    assert torch.equal(net(x), build()(x))


def test_entered_again_and_called_twice():
    net, x = build(), torch.randn(3, 4, 40)
    context = anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net)
    with context:
        first = net(x)
        with context:
            second = net(x)
        third = net(x)
    with context:
        fourth = net(x)
    assert all(torch.equal(first, other) for other in (second, third, fourth))


def test_contexts_in_each_other():
    net, other, x = build(), build(), torch.randn(3, 4, 40)
    alone = run(net, x, LENGTHS), run(net, x, [40, 40, 3])
    with anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
        with anynorm.masked(anynorm.mask_of([40, 40, 3], 40), model=other):
            assert torch.equal(other(x), alone[1])
        assert torch.equal(net(x), alone[0])


def test_threads_have_their_own():
    net, x, found = build(), torch.randn(3, 4, 40), {}
    barrier = threading.Barrier(3)

    def call(name: str, lengths: list[int] | None) -> None:
        if lengths is None:
            barrier.wait()
            found[name] = net(x)
            barrier.wait()
            return
        with anynorm.masked(anynorm.mask_of(lengths, 40), model=net):
            barrier.wait()
            found[name] = net(x)
            barrier.wait()

    cases = {"plain": None, "one": LENGTHS, "other": [40, 40, 3]}
    threads = [threading.Thread(target=call, args=case) for case in cases.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found["plain"], net(x))
    assert torch.equal(found["one"], run(net, x, LENGTHS))
    assert torch.equal(found["other"], run(net, x, [40, 40, 3]))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("with_norm", [True, False], ids=["norm", "convolutions"])
def test_checkpointing(with_norm, use_reentrant):
    net = build() if with_norm else nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1))
    x, mask = torch.randn(3, 4, 40, requires_grad=True), anynorm.mask_of(LENGTHS, 40)
    with anynorm.masked(mask, model=net):
        y = checkpoint(net, x, use_reentrant=use_reentrant)
        (true,) = torch.autograd.grad(net(x).sum(), x)
        y.sum().backward()
        torch.testing.assert_close(x.grad, true)
        y = checkpoint(net, x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="activation checkpointing computes this"):
        y.sum().backward()
    net(x).sum().backward()


@pytest.mark.filterwarnings("ignore:Using .torch.compile.module.. when there are global hooks")
def test_compiled_models():
    torch._dynamo.reset()
    net, x = build(), torch.randn(3, 4, 40)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    plain, inside = compiled(x), run(net, x, LENGTHS)
    torch.testing.assert_close(run(compiled, x, LENGTHS), inside)
    torch.testing.assert_close(run(net, x, LENGTHS), inside)
    torch.testing.assert_close(compiled(x), plain)
    torch._dynamo.reset()
    with anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
        torch.testing.assert_close(torch.compile(net, backend="aot_eager")(x), inside)
    torch.testing.assert_close(compiled(x), plain)


@pytest.mark.skipif(
    torch.__version__.startswith("2.8."), reason="torch 2.8's compiler raises where it is loaded inside masked(model=)"
)
def test_compiled_for_the_first_time_inside():
    """In a process of its own: here torch's compiler has been loaded before."""
    code = """
import sys, torch, anynorm
net = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 3, padding=1), torch.nn.Conv1d(2, 2, 3, padding=1))
x, mask = torch.randn(2, 2, 9), anynorm.mask_of([9, 4], 9)
assert "torch._dynamo" not in sys.modules
with anynorm.masked(mask, model=net):
    y = net(x)
    assert torch.allclose(torch.compile(net, backend="eager")(x), y)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_a_context_inside_compiled_code():
    torch._dynamo.reset()
    net = build()

    @torch.compile(backend="eager")
    def call(x: Tensor) -> Tensor:
        with anynorm.masked(anynorm.mask_of(LENGTHS, 40), model=net):
            return net(x)

    with pytest.raises(RuntimeError, match=r"must be entered outside; got a function from torch\.compile"):
        call(torch.randn(3, 4, 40))
