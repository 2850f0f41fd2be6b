"""What is used of torch though it is not public: each answers what the code relies on, and norms are right without any.

A torch that changes one of these fails here first, by its name.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from anynorm import torch_private
from anynorm.engine.request import Request
from anynorm.statistics import find_power
from anynorm.torch_private import (
    DeviceContext,
    NormBase,
    TransformType,
    as_plain_tensors,
    count_dispatch_modes,
    count_function_modes,
    count_transforms,
    dispatch_keys,
    find_backward,
    find_default_store,
    find_dispatch_modes,
    find_forward_level,
    find_function_modes,
    find_saved_tensor_hooks,
    find_transforms,
    functions_of_nn,
    increment_version,
    is_exporting,
    is_legacy_batched,
    is_tracing,
    is_wrapped,
    map_tensors,
    not_compiled,
    tree_leaves,
    unwrap,
)

X = torch.arange(6.0).reshape(2, 3)


def test_dispatch_keys_tell_plain_memory():
    plain = dispatch_keys(torch.empty(0)).raw_repr()
    assert dispatch_keys(X).raw_repr() == plain
    for other in (X.to(torch.complex64).conj(), X.to_sparse(), X.to("meta"), torch._neg_view(X)):
        assert dispatch_keys(other).raw_repr() != plain


def test_transforms_are_counted_and_named():
    assert count_transforms() == 0
    assert not find_transforms()
    seen = []

    def look(x):
        seen.append((count_transforms(), [level.key() for level in find_transforms()], is_wrapped(x), type(unwrap(x))))
        return x.sum()

    torch.func.vmap(torch.func.grad(look))(X)
    assert seen == [(2, [TransformType.Vmap, TransformType.Grad], True, torch.Tensor)]
    assert not is_wrapped(X)
    torch.func.jvp(look, (X,), (X,))
    assert seen[-1][1] == [TransformType.Jvp]


def test_compilers_know_transforms_exports_and_named_tuples():
    """torch.compile of 2.10 ends its graph at the first, answers True to the second; that of 2.8 lacks the third."""
    assert not is_exporting()

    @torch.compile(backend="eager", fullgraph=True)
    def look(x):
        request = Request(eps=1.0)._replace(eps=2.0)
        return x + count_transforms() + 10 * is_exporting() + 100 * request.eps

    assert torch.equal(look(X), X + 200)

    class Look(nn.Module):
        def forward(self, x):
            return x + (1 if is_exporting() else 2)

    assert torch.equal(torch.export.export(Look(), (X,)).module()(X), X + 1)


def test_powers_of_two_are_the_same_under_vmap():
    for dtype in (torch.float32, torch.float64):
        low, high = torch.finfo(dtype).tiny, torch.finfo(dtype).max
        sizes = torch.tensor([[0, low, 0.3, 1, 1.5], [3, 1e20, high / 2, high, torch.inf]], dtype=dtype)
        assert torch.equal(torch.func.vmap(find_power)(sizes), find_power(sizes))


def test_modes_are_counted_and_found():
    assert (count_dispatch_modes(), count_function_modes()) == (0, 0)

    class Dispatch(TorchDispatchMode):
        pass

    class Function(TorchFunctionMode):
        pass

    with Dispatch() as one:
        assert count_dispatch_modes() == 1
        assert find_dispatch_modes() == [one]
    with Function() as one:
        assert count_function_modes() == 1
        assert find_function_modes() == [one]
    with torch.device("cpu"):
        assert [type(mode) for mode in find_function_modes()] == [DeviceContext]


def test_tracing_is_noticed():
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append(is_tracing())
            return x + 1

    torch.jit.trace(Look(), X, check_trace=False)
    assert seen[-1]
    assert not is_tracing()


def test_the_older_vmap_is_noticed():
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append(is_legacy_batched(g))
            return g

    x = X.clone().requires_grad_()
    torch.autograd.grad(Look.apply(x), x, torch.ones(2, 2, 3), is_grads_batched=True)
    torch.autograd.grad(Look.apply(x), x, torch.ones(2, 3))
    assert seen[-1] is False
    assert not is_legacy_batched(X)


def test_forward_mode_has_a_level():
    assert find_forward_level() == -1
    with forward_ad.dual_level():
        assert find_forward_level() == 0


def test_backward_is_noticed():
    seen = []

    def look(x):
        seen.append(find_backward() != -1)
        return x.sin()

    checkpoint(look, X.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert seen == [False, True]


def test_written_tensors_get_a_new_version():
    first, second = X.clone(), X.clone()
    increment_version((first, second))
    assert (first._version, second._version) == (1, 1)


def test_saved_tensor_hooks_are_found():
    assert find_saved_tensor_hooks(True) is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert find_saved_tensor_hooks(True) is not None


def test_a_subclass_is_treated_as_its_tensor():
    class Sub(torch.Tensor):
        pass

    with as_plain_tensors():
        assert type(X.as_subclass(Sub) + 1) is not Sub


def test_names_of_functions_and_classes():
    assert hasattr(functions_of_nn, "gelu")
    assert issubclass(nn.BatchNorm2d, NormBase)
    assert issubclass(nn.InstanceNorm1d, NormBase)
    assert not_compiled(lambda: 1)() == 1


def test_containers():
    tree = {"a": [X, (1, X)], "b": "c"}
    assert [type(leaf) for leaf in tree_leaves(tree)] == [torch.Tensor, int, torch.Tensor, str]
    doubled = map_tensors(lambda t: 2 * t, tree)
    assert torch.equal(doubled["a"][1][1], 2 * X)
    assert doubled["b"] == "c"


def test_containers_without_torchs_functions(monkeypatch):
    monkeypatch.setattr(torch_private, "find", lambda path, instead: instead)
    test_containers()


def test_the_store_of_the_ranks(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        store = find_default_store()
        store.set("key", "value")
        assert store.get("key") == b"value"
    finally:
        torch.distributed.destroy_process_group()


ABSENT = """
import torch
for path in PATHS:
    *owners, name = path.split(".")
    owner = torch
    for part in owners:
        owner = getattr(owner, part)
    delattr(owner, name)
import anynorm
from anynorm import torch_private
from torch import nn
torch.manual_seed(0)
x = torch.randn(6, 4, 5, 5)
for ours, theirs in ((anynorm.BatchNorm2d(4), nn.BatchNorm2d(4)), (anynorm.GroupNorm(2, 4), nn.GroupNorm(2, 4)),
                     (anynorm.LayerNorm(5), nn.LayerNorm(5)), (anynorm.InstanceNorm2d(4), nn.InstanceNorm2d(4))):
    for mode in (True, False):
        found = []
        for norm in (ours, theirs):
            given = x.clone().requires_grad_()
            y = norm.train(mode)(given)
            (y * x).sum().backward()
            found.append((y, given.grad))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found)), ours
print("right")
"""


def list_paths():
    """Every private name that torch_private asks for."""
    source = Path(torch_private.__file__).read_text(encoding="utf-8")
    return re.findall(r'find\(\s*"([\w.]+)"', source)


# torch computes nothing itself without these.
NEEDED = (
    "_C._nn",
    "nn.",
    "utils._device",
    "_C._is_tracing",
    "_C._len_torch",
    "_C.DisableTorch",
    "utils._python",
    "overrides",
)


@pytest.mark.parametrize("which", ["none", "all"])
def test_norms_are_right_without_what_a_torch_may_lack(which):
    paths = [path for path in list_paths() if which == "all" and not path.startswith(NEEDED)]
    assert which == "none" or len(paths) >= 12
    done = subprocess.run([sys.executable, "-c", f"PATHS = {paths}\n{ABSENT}"], capture_output=True, text=True)
    assert done.stdout.strip() == "right", done.stderr[-2000:]
