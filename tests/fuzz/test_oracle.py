"""The oracle is right, and can fail: it equals torch in float64, and finds what torch loses in float32."""

from __future__ import annotations

from runpy import run_path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from fused_specimens import apply_torch
from fuzz import call
from fuzz.call import Inputs, check_values, find_truth, make_inputs
from fuzz.cases import Case, cases, is_allowed
from fuzz.drive import drive
from fuzz.families import alternating, few_levels, large_mean, normal, with_a_mean
from fuzz.script import write_script

KINKED = ("relu", "leaky_relu", "leaky_relu(0.3)", "relu6", "elu(0.5)")


def call_torch(case: Case, t: Inputs | None = None) -> dict[str, torch.Tensor]:
    """The case by torch's own norms."""
    t = t or make_inputs(case)
    x, weight, bias, residual = (
        None if t[name] is None else t[name].detach().requires_grad_() for name in ("x", "weight", "bias", "residual")
    )
    if case.norm == "batch":
        y = F.batch_norm(x, t["mean"].clone(), t["var"].clone(), weight, bias, not case.given, eps=case.eps)
    elif case.norm == "instance":
        y = F.instance_norm(x, t["mean"].clone(), t["var"].clone(), weight, bias, not case.given, eps=case.eps)
    elif case.norm == "group":
        y = F.group_norm(x, case.size, weight, bias, case.eps)
    else:
        shape, given = case.shape[-case.size :], (weight, bias) if case.norm == "layer" else (weight,)
        y = getattr(F, f"{case.norm}_norm")(x, shape, *given, case.eps)
    y = y if residual is None else y + residual
    y = apply_torch(case.activation, y)
    wanted = {"dx": x, "dweight": weight, "dbias": bias, "dresidual": residual}
    wanted = {name: leaf for name, leaf in wanted.items() if leaf is not None}
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), t["g"])))}


def check_oracle(case: Case) -> None:
    """The formula's values, and its gradients by hand, equal torch's in float64."""
    t = make_inputs(case)
    truth = find_truth(case, t)
    for name, value in call_torch(case, t).items():
        want = torch.from_numpy(truth[name][0].copy()).reshape(value.shape)
        torch.testing.assert_close(value, want, rtol=1e-7, atol=1e-7, msg=lambda told, name=name: f"{name}: {told}")


def is_off_the_kink(case: Case) -> bool:
    """Where y can be exactly 0, torch's rounding decides on which side of a kink it is."""
    is_moved = case.residual or (case.affine == "both" and case.norm != "rms" and case.spread > 0)
    return is_allowed(case) and (is_moved or case.activation not in KINKED)


def test_oracle():
    tame = {"data": st.sampled_from((normal, with_a_mean, few_levels, alternating)), "gradient": normal}
    fixed = {"dtype": torch.float64, "mask": "", "layout": "contiguous", "eps": st.sampled_from((1e-5, 1.0))}
    norms = ("batch", "instance", "group", "layer", "rms")
    drive(check_oracle, cases(norms, path="kernels", **tame, **fixed).filter(is_off_the_kink))


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_the_measure_sees_torchs_error(norm):
    """channels_last, mean of 1e3 to 1e6 standard deviations: torch's own kernels lose it (docs/accuracy.md)."""
    case = Case(norm, (8, 8, 12, 12), large_mean, seed=2, layout="channels_last")
    check_values(case)
    with mock.patch.object(call, "call", call_torch), pytest.raises(AssertionError, match="allowed"):
        check_values(case)


def test_a_small_error_of_a_sum_is_seen():
    """1e-5 of dgamma, over a thousand values."""
    case = Case("batch", (1000, 1), normal)
    found = call.call(case)
    found["dweight"] += 1e-5 * found["dweight"].abs()
    with mock.patch.object(call, "call", return_value=found), pytest.raises(AssertionError, match="dweight"):
        check_values(case)


def test_the_script_of_a_failure_runs_alone(tmp_path):
    """It passes and fails as the check does; here for a GELU of another width."""
    script = write_script(
        check_values, Case("layer", (2, 3, 4), seed=1, mask="holes", activation="gelu", residual=True)
    )
    assert "fuzz" not in script
    (tmp_path / "good.py").write_text(script)
    run_path(str(tmp_path / "good.py"))
    (tmp_path / "wrong.py").write_text(script.replace("/ sqrt(2)) / 2", "/ sqrt(2.01)) / 2"))
    with pytest.raises(AssertionError, match="allowed"):
        run_path(str(tmp_path / "wrong.py"))
