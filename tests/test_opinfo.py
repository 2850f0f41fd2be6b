"""Equals torch: PyTorch's own samples of its norms, and its own errors, through ours."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anynorm

# torch's lists of samples import expecttest, which torch itself does not install; make's environment has it.
pytest.importorskip("expecttest")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

NORMS = {f"nn.functional.{name}": name for name in anynorm.functional.__all__}
OPERATIONS = [info for info in op_db if info.name in NORMS]
MODULES = [i for i in module_db if "Norm" in i.module_cls.__name__ and hasattr(anynorm, i.module_cls.__name__)]


def copies(values: Any) -> list[Any]:
    return [v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v for v in values]


def find_outcome(call: Any, arguments: Any, options: dict[str, Any], parameters: Any = ()) -> Any:
    """Result, gradients and what became of the arguments, or the error."""
    arguments, options = copies(arguments), dict(zip(options, copies(options.values()), strict=True))
    tensors = [v for v in [*arguments, *options.values()] if isinstance(v, torch.Tensor)]
    try:
        y = call(*arguments, **options)
    except Exception as error:  # whatever torch raises
        return error
    leaves = [t for t in [*tensors, *parameters] if t.requires_grad]
    gradients = torch.autograd.grad(y.cos().sum(), leaves, allow_unused=True) if y.requires_grad else ()
    return [y, *gradients, *tensors]


def assert_same(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    if isinstance(theirs, Exception):
        assert isinstance(ours, type(theirs)), (ours, theirs)
        return
    assert not isinstance(ours, Exception), ours
    tolerance = 1e-3 if dtype == torch.float32 else 1e-8
    for mine, its in zip(ours, theirs, strict=True):
        if its is None:
            assert mine is None
            continue
        assert (mine.dtype, mine.shape, mine.stride()) == (its.dtype, its.shape, its.stride())
        torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("info", OPERATIONS, ids=lambda info: info.name)
def test_functions(info, dtype):
    ours = getattr(anynorm.functional, NORMS[info.name])
    samples = [*info.sample_inputs("cpu", dtype, requires_grad=True), *info.reference_inputs("cpu", dtype)]
    if info.error_inputs_func is not None:
        samples += [error.sample_input for error in info.error_inputs("cpu")]
    assert len(samples) > 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in samples:
            given = [sample.input, *sample.args], sample.kwargs
            wanted = find_outcome(info.op, *given)
            if isinstance(wanted, Exception) and "channels to be greater than 0" in str(wanted):
                continue  # torch 2.15 refuses a group norm of no channels; before, and here, its output is empty
            assert_same(find_outcome(ours, *given), wanted, dtype)


def run_module(kind: Any, training: bool, built: Any, given: Any) -> Any:
    """The outcome of building a module and calling it, and its state behind."""
    try:
        module = kind(*built.args, **built.kwargs).train(training)
    except Exception as error:  # whatever torch raises
        return error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = find_outcome(module, given.args, given.kwargs, list(module.parameters()))
    return outcome if isinstance(outcome, Exception) else [*outcome, *module.state_dict().values()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.module_cls.__name__)
def test_modules(info, dtype, training):
    if dtype is torch.float64 and "InstanceNorm" in info.module_cls.__name__ and not takes_mixed_averages():
        pytest.skip("this torch's instance norm refuses averages of another dtype; ours takes them")
    how = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": training}
    samples = list(info.module_inputs_func(info, **how))
    if info.module_error_inputs_func is not None:
        samples += [error.module_error_input for error in info.module_error_inputs_func(info, **how)]
    for sample in samples:
        built, given = sample.constructor_input, sample.forward_input
        outcomes = []
        for kind in (getattr(anynorm, info.module_cls.__name__), info.module_cls):
            outcomes.append(run_module(kind, training, built, given))
        assert_same(*outcomes, dtype)


def test_every_norm_has_samples():
    assert {info.name for info in OPERATIONS} >= {f"nn.functional.{name}_norm" for name in ("batch", "layer", "group")}
    assert len(MODULES) >= 9


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 3, 0)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("averages", [True, False])
def test_batch_norm_of_nothing(shape, training, averages):
    """Whatever the averages are, or whether there are any: there is nothing to normalize."""
    channels = shape[1] if len(shape) > 1 else 0
    for dtype in (torch.float32, torch.float64):
        given = [torch.ones(channels, dtype=dtype) if averages else None for _ in range(2)]
        x = torch.empty(shape)
        y = anynorm.functional.batch_norm(x, *given, training=training)
        assert y.shape == x.shape == F.batch_norm(x, *given, training=training).shape
        assert y.dtype == x.dtype


def takes_mixed_averages() -> bool:
    """Whether torch's instance norm takes averages of another dtype than its input's; that of 2.8 refuses them."""
    try:
        F.instance_norm(torch.ones(2, 3, 4, dtype=torch.float64), torch.ones(3), torch.ones(3))
    except RuntimeError:
        return False
    return True


with_mixed_averages = pytest.mark.skipif(
    not takes_mixed_averages(), reason="this torch's instance norm refuses averages of another dtype; ours takes them"
)


@with_mixed_averages
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kept", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_instance_norm_takes_averages_of_any_dtype(dtype, kept, training):
    x = torch.randn(4, 3, 5, dtype=dtype) + 1
    buffers = [[torch.ones(3, dtype=kept) for _ in range(2)] for _ in range(2)]
    y = anynorm.functional.instance_norm(x, *buffers[0], use_input_stats=training)
    expected = F.instance_norm(x, *buffers[1], use_input_stats=training)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for mine, its in zip(*buffers, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-2, atol=1e-2)
    with pytest.raises(RuntimeError, match="must be floating point"):
        anynorm.functional.instance_norm(x, torch.ones(3, dtype=torch.long), torch.ones(3))
    with pytest.raises(RuntimeError, match="weight must have the dtype"):
        anynorm.functional.instance_norm(x, weight=torch.ones(3, dtype=torch.float16))


ERRORS = {
    "rms norm, too few axes": lambda library: library.rms_norm(torch.ones(3), (2, 3)),
    "rms norm, no axes": lambda library: library.rms_norm(torch.ones(()), (1,)),
    "rms norm, other sizes": lambda library: library.rms_norm(torch.ones(2, 3), (4,)),
    "layer norm, too few axes": lambda library: library.layer_norm(torch.ones(3), (2, 3)),
    "layer norm, sizes no ints": lambda library: library.layer_norm(torch.ones(2, 3), (3.0,)),
    "layer norm, one size": lambda library: library.layer_norm(torch.ones(2, 3), 3),
    "instance norm, one axis": lambda library: library.instance_norm(torch.ones(3)),
    "instance norm, two axes": lambda library: library.instance_norm(torch.ones(2, 3)),
    "batch norm, one axis": lambda library: library.batch_norm(torch.ones(3), None, None, training=True),
    "batch norm, a list": lambda library: library.batch_norm([1.0], None, None),
    "group norm, one axis": lambda library: library.group_norm(torch.ones(3), 3),
    "group norm, whole numbers": lambda library: library.group_norm(torch.ones(2, 3, dtype=torch.long), 3),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_have_torchs_type(name):
    with pytest.raises(Exception) as theirs:  # its type is what is asked
        ERRORS[name](F)
    if theirs.type is RuntimeError and name in ("rms norm, too few axes", "rms norm, no axes"):
        pytest.skip("this torch raises RuntimeError here, later ones ValueError")
    with pytest.raises(theirs.type):
        ERRORS[name](anynorm.functional)


@with_mixed_averages
def test_instance_norm_with_averages_and_no_affine_takes_float64():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for training in (True, False):
        norms = [library.InstanceNorm2d(3, track_running_stats=True).train(training) for library in (anynorm, nn)]
        outputs = [norm(x) for norm in norms]
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(norms[0].running_var, norms[1].running_var)
