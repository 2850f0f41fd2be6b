"""Checkpoints that torch loads in silence: counters that are averaged or overflowed, variances negative by rounding.

Averaged ones: WeNet's average_model.py, federated averaging (HierFL#1). Each divides every entry, the counter too.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn as nn

import anynorm
from anynorm.modules.recurrent.norms import _BatchRows

WITH_COUNTER = {
    "batch": lambda: anynorm.BatchNorm1d(3),
    "ghost": lambda: anynorm.GhostBatchNorm1d(3, ghost_size=2),
    "renorm": lambda: anynorm.BatchRenorm1d(3, warmup=(0, 0, 0)),
    "sync": lambda: anynorm.SyncBatchNorm(3),
    "instance": lambda: anynorm.InstanceNorm1d(3, track_running_stats=True),
    "fused": lambda: anynorm.BatchRenormAct1d(3),
    "pattern": lambda: anynorm.AnyNorm("n c s -> c", affine="c", c=3, track_running_stats=True),
    "sequence": lambda: anynorm.LSTM(2, 3, norm="batch-sequence").norm_ih_l0,
    "step": lambda: anynorm.GRU(2, 1, norm="batch-per-step", max_steps=4).norm_ih_l0,
}
COUNTS = {
    torch.int64: [(7, 7), (-5, 0), (-(2**63), 0)],  # the last is what torch makes of Inf
    torch.float16: [(7.0, 7), (7.5, 8), (math.inf, 65_504), (math.nan, 0), (-5.0, 0)],
    torch.float32: [(7.0, 7), (7.4, 7), (math.inf, 65_504), (-math.inf, 0), (1e30, 2**53)],
}


def find_counter(norm: nn.Module) -> str:
    return norm.counter_name if isinstance(norm, _BatchRows) else "num_batches_tracked"


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", COUNTS, ids=str)
@pytest.mark.parametrize("name", WITH_COUNTER)
def test_a_counter_is_no_reason_to_refuse_a_checkpoint(name, dtype, assign):
    """Rounded, with a warning that names the entry; the caller's dict stays as it was."""
    for given, taken in COUNTS[dtype]:
        model = nn.Sequential(WITH_COUNTER[name]())
        norm, key = model[0], f"0.{find_counter(model[0])}"
        state = {k: v.clone() for k, v in model.state_dict().items()}
        state[key] = torch.full_like(state[key], given, dtype=dtype)
        before = dict(state), {k: v.clone() for k, v in state.items()}
        if given == 7:
            model.load_state_dict(state, assign=assign)
        else:
            with pytest.warns(UserWarning, match=f"^{key} must be a whole number of 0 or more; got .*{taken}"):
                model.load_state_dict(state, assign=assign)
        counter = getattr(norm, find_counter(norm))
        assert counter.dtype == torch.int64 and (counter == taken).all()
        assert all(
            state[k] is before[0][k] and torch.equal(state[k].nan_to_num(-9), v.nan_to_num(-9))
            for k, v in before[1].items()
        )
        if name == "renorm":
            assert norm.extra_state()["batches"] == taken


@pytest.mark.parametrize("name", ["batch", "pattern", "sequence"])
def test_a_cumulative_average_goes_on_from_what_is_taken(name):
    """The counter weighs batches with momentum=None: the ninth batch weighs 1/9."""
    norm = WITH_COUNTER[name]()
    norm.momentum = None
    state = {**norm.state_dict(), "num_batches_tracked": torch.tensor(7.5)}
    with pytest.warns(UserWarning, match="taken as 8"):
        norm.load_state_dict(state)
    x = torch.randn(4, norm.running_mean.numel(), 5) if name != "sequence" else torch.randn(9, 12)
    norm(x)
    mean = x.mean((0, 2)) if name != "sequence" else x.mean(0)
    torch.testing.assert_close(norm.running_mean, mean / 9)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", WITH_COUNTER)
def test_a_variance_that_is_negative_by_rounding_is_0(name, assign, recwarn):
    norm = WITH_COUNTER[name]()
    state = {k: v.clone() for k, v in norm.state_dict().items()}
    state["running_var"].flatten()[0] = -1e-9
    before = state["running_var"].clone()
    norm.load_state_dict(state, assign=assign)
    assert [str(w.message) for w in recwarn] == [
        "running_var is negative by rounding, and taken as 0 there; got -1e-09"
    ]
    assert float(norm.running_var.flatten()[0]) == 0 and norm.running_var.flatten()[1:].eq(1).all()
    assert torch.equal(state["running_var"], before)
    state["running_var"].flatten()[0] = -1e-5
    with pytest.raises(RuntimeError, match="running_var must not be negative; got -1e-05"):
        norm.load_state_dict(state, assign=assign)


def test_what_is_wrong_beside_the_counter_is_still_refused():
    norm = anynorm.BatchNorm1d(3)
    state = {**norm.state_dict(), "num_batches_tracked": torch.tensor(7.5), "running_var": -torch.ones(3)}
    with pytest.warns(UserWarning, match="taken as 8"), pytest.raises(RuntimeError, match="must not be negative"):
        norm.load_state_dict(state)
    assert norm.num_batches_tracked == 0
    with pytest.raises(RuntimeError, match="num_batches_tracked must be one whole number; got \\[1, 2\\]"):
        norm.load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor([1, 2])})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"more"'):
        norm.load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor(7.0), "more": torch.ones(1)})
    loaded = norm.load_state_dict({"num_batches_tracked": torch.tensor(7.0)}, strict=False)
    assert set(loaded.missing_keys) == {"weight", "bias", "running_mean", "running_var"}


def test_averaged_models_and_models_in_half_precision_load():
    """As torch: what is computed afterwards is the same, in training and in evaluation."""
    ours = anynorm.accelerate(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4))).model
    states = []
    for _ in range(2):
        ours(torch.randn(4, 3, 9))
        states.append(copy.deepcopy(ours.state_dict()))
    averaged = {k: torch.true_divide(states[0][k] + states[1][k], 2) for k in states[0]}
    half = {k: v.half() for k, v in ours.state_dict().items()} | {"1.num_batches_tracked": torch.tensor(7e4).half()}
    for state, taken in ((averaged, 2), (half, 65_504)):
        theirs = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4))
        theirs.load_state_dict(state)
        with pytest.warns(UserWarning, match=f"^1.num_batches_tracked .* taken as {taken}"):
            ours.load_state_dict(state)
        x = torch.randn(4, 3, 9)
        for mode in (True, False):
            torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x), rtol=1e-5, atol=1e-5)


def test_a_model_that_holds_such_values_is_accelerated_and_evaluated_as_torch_does():
    """What torch has loaded is not looked at again: in evaluation the variance enters as it is."""
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    state = {
        **model.state_dict(),
        "0.running_var": torch.tensor([-1e-9, 1, 2]),
        "0.num_batches_tracked": torch.tensor(7.5),
    }
    model.load_state_dict(state, assign=True)
    x = torch.randn(4, 3)
    want = model(x)
    torch.testing.assert_close(anynorm.accelerate(model).model(x), want, rtol=1e-6, atol=1e-6)
    got = anynorm.functional.batch_norm(x, model[0].running_mean, model[0].running_var, eps=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    with pytest.warns(UserWarning, match="negative by rounding"):
        model.load_state_dict(
            {k: v.clone() for k, v in model.state_dict().items()} | {"0.num_batches_tracked": torch.tensor(8)}
        )
    assert model[0].running_var[0] == 0
