"""Run pytest with another build of the compiled module: `with_module.py MODULE.so [pytest's arguments]`."""

import importlib.util
import sys


def main() -> int:
    """Put the module where the package looks for it, then run the tests."""
    import pytest
    import torch  # noqa: F401  its OpenMP runtime must be there first

    spec = importlib.util.spec_from_file_location("anynorm._kernels", sys.argv[1])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    from anynorm.engine import kernels

    assert kernels.compiled is module
    return pytest.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
