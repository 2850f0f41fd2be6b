"""Run pytest with another build of the compiled module: `with_module.py MODULE.so [pytest's arguments]`."""

import importlib.util
import sys

spec = importlib.util.spec_from_file_location("anynorm._kernels", sys.argv[1])
assert spec is not None
assert spec.loader is not None
import torch  # noqa: E402, F401  its OpenMP runtime must be there first

module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)

import pytest  # noqa: E402

from anynorm import kernels  # noqa: E402

assert kernels.compiled is module
sys.exit(pytest.main(sys.argv[2:]))
