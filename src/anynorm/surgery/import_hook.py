"""When is a package told of our classes? When it has been imported: before us at once, after us right then.

No such package is imported here, and how it is told is loaded with it: torch loads one of them itself at every import.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGES = {  # and what tells each: a file beside this one, and a function of the package
    "captum.attr": ("exact_types", "register_captum"),
    "opacus.grad_sample": ("exact_types", "register_grad_samplers"),
    "opacus.validators": ("exact_types", "register_validators"),
    "torch.ao.quantization.fuse_modules": ("fusers", "show_torchs_to_modules"),
    "torch.ao.quantization.quantize_fx": ("fusers", "show_torchs_to_graphs"),
}


def register(module: ModuleType) -> None:
    """Tell one package of our classes.

    Where its private tables have changed, its import must not fail, nor must that pass in silence.
    """
    file, name = PACKAGES[module.__name__]
    try:
        getattr(import_module(f".{file}", __package__), name)(module)
    except (ImportError, AttributeError, KeyError, TypeError) as problem:
        warnings.warn(
            f"anynorm: {module.__name__} could not be told of anynorm's classes ({problem!r}), and does not know a "
            "subclass of torch's norms; use anynorm.accelerate(model, undo=True) before it",
            stacklevel=2,
        )


class ImportHook(MetaPathFinder):
    """Finds nothing itself: the other finders find one of these packages, and ours are registered once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in PACKAGES:
            return None
        # Asked one by one: find_spec of importlib would come back here.
        others = [finder.find_spec for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((found for find in others if (found := find(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register(module)

            # On this one loader object, which importlib made for this import alone.
            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign] # of this one spec
        return spec


def register_with_packages() -> None:
    """Register our classes with what has been imported, and with what will be; called once, at import."""
    for name in PACKAGES:
        if (module := sys.modules.get(name)) is not None:
            register(module)
    if not any(isinstance(finder, ImportHook) for finder in sys.meta_path):
        # First: behind the finder that finds the package it would never be asked.
        sys.meta_path.insert(0, ImportHook())
