"""What does a change to the kernels cost? Two builds of the compiled module, in turn in one process.

`python -m benchmarks.builds OTHER.so` times the installed build against another, and prints the medians of the ratios.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch

import anynorm
from anynorm.apps.timing.cases import Case, make_call, needs_grad
from anynorm.apps.timing.interleaved import time_interleaved
from anynorm.engine import kernels

SECONDS = 1.0  # for a case in a mode
CASES = (
    Case("maps", "BatchNorm2d", (64,), (8, 64, 56, 56)),
    Case("maps", "BatchNorm2d", (64,), (8, 64, 56, 56), channels_last=True),
    Case("small maps", "BatchNorm2d", (512,), (64, 512, 7, 7)),
    Case("groups", "GroupNorm", (32, 256), (32, 256, 28, 28)),
    Case("text", "LayerNorm", (768,), (1576, 768)),
    Case("features", "BatchNorm1d", (512,), (256, 512)),
)


def load(path: str) -> Any:
    """Another build, with the instruction set of the installed one."""
    name = "other._kernels"
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    if not module.choose_instruction_set(kernels.compiled.instruction_set()):
        sys.exit(f"{path} has no kernels for {kernels.compiled.instruction_set()}")
    return module


def by(build: Any, call: Callable[[], object]) -> Callable[[], object]:
    """The call by a build; plans are alike in both."""

    def run() -> object:
        kernels.compiled = build
        return call()

    return run


def main() -> None:
    """Print the table."""
    if len(sys.argv) != 2 or kernels.OFF:
        sys.exit(kernels.OFF or __doc__)
    builds = {"this": kernels.compiled, "other": load(sys.argv[1])}
    print("| case | mode | other, ms | this / other |\n|---|---|---|---|")
    for case in CASES:
        x, g = case.draw()
        for mode in ("training", "forward+backward"):
            module = case.make(anynorm)
            call = make_call(module, module.parameters(), mode, x, g)
            with torch.set_grad_enabled(needs_grad(mode)):
                rounds = time_interleaved({name: by(build, call) for name, build in builds.items()}, SECONDS)
            place = " cl" if case.channels_last else ""
            ratio = rounds.ratio("this", "other")
            print(f"| {case.name}{place} | {mode} | {1e3 * rounds.median('other'):.3g} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
