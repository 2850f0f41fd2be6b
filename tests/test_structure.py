"""Keeps invariants of the code: the way from a module to the kernels is short, and functions take few arguments."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import anynorm
from anynorm.engine import addresses, kernels
from anynorm.padding.context import CONTEXTS

PACKAGE = Path(anynorm.__file__).parent
MOST_FRAMES = 5
MOST_ARGUMENTS = 6

# Signatures of torch's, which people know by their places; and torch's hook.
LONG = {
    "functional/batch.py batch_norm",
    "functional/ghost.py ghost_batch_norm",
    "functional/instance.py instance_norm",
    "functional/renorm.py batch_renorm",
    "modules/sync.py _SyncBatch.__init__",
    "modules/torch_state.py BatchNormState.__init__",
    "modules/torch_state.py InstanceNormState.__init__",
}
TORCHS = "_load_from_state_dict"


names_functions = pytest.mark.skipif(sys.version_info < (3, 11), reason="frames name their functions since Python 3.11")
CALLS = ("normalize_known", "forward_saving", "forward_tensors", "forward")  # of the compiled module


def find_way(norm: torch.nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The frames of the package, from the module's forward to the last compiled call, the innermost first."""
    ways = []

    def watch(call: Any) -> Any:
        def watched(*arguments, **options):
            frame = sys._getframe(1)
            way = []
            while frame is not None:
                if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
                    way.append(f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)} {frame.f_code.co_qualname}")
                frame = frame.f_back
            ways.append(way)
            return call(*arguments, **options)

        return watched

    norm(x)  # The checks of a first call come between.
    compiled = SimpleNamespace(**vars(kernels.compiled))
    for name in CALLS:
        setattr(compiled, name, watch(getattr(compiled, name)))
    with monkeypatch.context() as patch:
        for module in (kernels, addresses):
            patch.setattr(module, "compiled", compiled)
        norm(x)
    return ways[-1]


@names_functions
@pytest.mark.skipif(bool(kernels.OFF), reason="there is no compiled call without the kernels")
@pytest.mark.parametrize("wants_gradient", [True, False])
@pytest.mark.parametrize("name", ["batch", "evaluation", "layer", "rms", "group", "instance", "fused"])
def test_few_frames_lie_between_a_module_and_the_kernels(name, wants_gradient, monkeypatch):
    norm = {
        "batch": lambda: anynorm.BatchNorm2d(6),
        "evaluation": lambda: anynorm.BatchNorm2d(6).eval(),
        "layer": lambda: anynorm.LayerNorm(5),
        "rms": lambda: anynorm.RMSNorm(5),
        "group": lambda: anynorm.GroupNorm(2, 6),
        "instance": lambda: anynorm.InstanceNorm2d(6, affine=True),
        "fused": lambda: anynorm.BatchNormAct2d(6),
    }[name]()
    with torch.set_grad_enabled(wants_gradient):
        way = find_way(norm, torch.randn(4, 6, 5, 5), monkeypatch)
    assert way[-1].endswith(".forward"), way
    if kernels.READS_TENSORS and not wants_gradient and name != "instance":
        assert len(way) == 3 + (name == "rms"), way  # the module's forward and normalize, and the front
    most = MOST_FRAMES + (name == "rms")  # torch calls its argument x there, which takes a forward of its own
    most += not kernels.READS_TENSORS  # An older torch: addresses are found in Python.
    assert len(way) <= most, way


def count_calls(step: Any) -> Counter[str]:
    """How often which functions of the package are called."""
    found: Counter[str] = Counter()

    def note(frame, event, argument):
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            found[frame.f_code.co_qualname] += 1

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


@names_functions
@pytest.mark.skipif(not kernels.READS_TENSORS, reason="without them, or with an older torch, Python finds addresses")
@pytest.mark.parametrize(("name", "most"), [("batch", 15), ("layer", 6), ("group", 6), ("rms", 8), ("fused", 16)])
def test_a_small_step_costs_few_calls_of_python(name, most, monkeypatch):
    """Forward and backward: each call in Python costs as much as the arithmetic of a small batch."""
    monkeypatch.setattr(CONTEXTS, "was_opened", False)  # as in a process that never had a context
    norm = {
        "batch": lambda: anynorm.BatchNorm1d(16),
        "layer": lambda: anynorm.LayerNorm(16),
        "group": lambda: anynorm.GroupNorm(4, 16),
        "rms": lambda: anynorm.RMSNorm(16),
        "fused": lambda: anynorm.BatchNormAct1d(16),
    }[name]()
    leaves = [torch.randn(8, 16).requires_grad_(), *norm.parameters()]
    step = lambda: torch.autograd.grad(norm(leaves[0]), leaves, torch.ones(8, 16))  # noqa: E731
    step()  # The first is checked.
    found = count_calls(step)
    assert found["Normalize.backward"] == 1
    assert found.total() <= most, found
    with torch.device("cpu"):  # which is a mode, and only says where to make tensors
        assert count_calls(step) == found


def find_functions(tree: ast.AST, outer: str = "") -> list[tuple[str, ast.FunctionDef]]:
    """All functions, also those within classes and functions, by their qualified names."""
    found = []
    for node in ast.iter_child_nodes(tree):
        name = f"{outer}{getattr(node, 'name', '')}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append((name, node))
        is_named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        found += find_functions(node, f"{name}." if is_named else outer)
    return found


def count_positional(function: ast.FunctionDef) -> int:
    """How many arguments can be given by their place; the first of a method, and autograd's context, are not."""
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))


def test_no_function_takes_many_arguments_by_their_place():
    long = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, function in find_functions(ast.parse(path.read_text())):
            if count_positional(function) > MOST_ARGUMENTS and not name.endswith(TORCHS):
                long.add(f"{path.relative_to(PACKAGE)} {name}")
    assert long == LONG


def test_a_long_function_is_found():
    tree = ast.parse(
        "class A:\n    def f(self, a, b, c, d, e, f, g): ...\n    def g(self, a, b, c, d, e, f, *, g): ..."
    )
    assert [count_positional(function) for _, function in find_functions(tree)] == [7, 6]
    assert [name for name, _ in find_functions(tree)] == ["A.f", "A.g"]
