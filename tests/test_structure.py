"""Keeps invariants of the code: the way from a module to the kernels is short, and functions take few arguments."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import anynorm
from anynorm.engine import addresses, kernels

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


def find_way(norm: torch.nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The frames of the package, from the module's forward to the compiled call, the innermost first."""
    ways = []

    def forward(*arguments, **options):
        frame = sys._getframe(1)
        way = []
        while frame is not None:
            if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
                way.append(f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)} {frame.f_code.co_qualname}")
            frame = frame.f_back
        ways.append(way)
        return getattr(compiled, name)(*arguments, **options)

    norm(x)  # The checks of a first call come between.
    compiled, name = kernels.compiled, "forward_tensors" if kernels.READS_TENSORS else "forward"
    with monkeypatch.context() as patch:
        for module in (kernels, addresses):
            patch.setattr(module, "compiled", SimpleNamespace(**{name: forward}))
        norm(x)
    (way,) = ways
    return way


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
    most = MOST_FRAMES + (name == "rms")  # torch calls its argument x there, which takes a forward of its own
    most += not kernels.READS_TENSORS  # An older torch: addresses are found in Python.
    assert len(way) <= most, way


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
