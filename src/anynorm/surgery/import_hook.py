"""When is a package told of our classes? When it has been imported: before us at once, after us right then.

Nothing is imported here, neither such a package nor `exact_types`, which knows how each is told.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGES = (  # the keys of exact_types.REGISTRATIONS
    "captum.attr",
    "opacus.grad_sample",
    "opacus.validators",
    "torch.ao.quantization.fuse_modules",
    "torch.ao.quantization.quantize_fx",
)


def register(module: ModuleType) -> None:
    """Tell one package of our classes."""
    from .exact_types import register as register_classes

    register_classes(module)


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
