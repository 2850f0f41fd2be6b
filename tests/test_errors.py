"""The text of every public error: function, rule, what was given, likely repair."""

from __future__ import annotations

import pytest
import torch

import anynorm
from anynorm import functional as F

TEXTS = {
    "group_norm: channels must be divisible by groups; got channels=30, groups=32; try 1, 2, 3, 5, 6, 10, 15 or 30":
        (RuntimeError, lambda: F.group_norm(torch.zeros(2, 30, 4), 32)),
    "group_norm: input must have axes (N, C, ...); got 1 axes; add one with unsqueeze":
        (RuntimeError, lambda: F.group_norm(torch.zeros(2), 1)),
    "BatchNorm1d(3): statistics need more than 1 value per channel, or every output is beta; got input (1, 3); "
    "use a larger batch, drop a last batch of one with DataLoader(drop_last=True), call eval(), or build the norm with "
    "on_single='running'":
        (ValueError, lambda: anynorm.BatchNorm1d(3)(torch.zeros(1, 3))),
    "batch_norm: statistics need more than 1 value per channel, or every output is beta; got input (1, 3); "
    "use a larger batch, drop a last batch of one with DataLoader(drop_last=True), call eval(), or build the norm with "
    "on_single='running'":
        (ValueError, lambda: F.batch_norm(torch.zeros(1, 3), None, None, training=True)),
    "instance_norm: statistics need more than 1 value per channel of a sample, or every output is beta; "
    "got input (2, 3, 1); normalize before the positions are pooled away, or use layer norm":
        (ValueError, lambda: anynorm.InstanceNorm1d(3)(torch.zeros(2, 3, 1))),
    "batch_norm: weight must have one element per channel; got 4 elements, input with channels=3; "
    "build the norm for 3 channels or move the channels to axis 1":
        (RuntimeError, lambda: F.batch_norm(torch.zeros(4, 3), None, None, torch.ones(4), training=True)),
    "batch_norm: eps must be positive; got 0.0; the default is 1e-5":
        (ValueError, lambda: F.batch_norm(torch.zeros(4, 3), None, None, training=True, eps=0.0)),
    "batch_norm: evaluation needs running statistics; got running_mean=None; pass it, or training=True":
        (RuntimeError, lambda: F.batch_norm(torch.zeros(4, 3), None, None)),
    "batch_norm: running_mean and running_var are given together or not at all; got running_var=None; pass both":
        (ValueError, lambda: F.batch_norm(torch.zeros(4, 3), torch.zeros(3), None, training=True)),
    "layer_norm: the input's last axes must be normalized_shape; got input (2, 4), normalized_shape (5,); "
    "try normalized_shape=(4,)":
        (RuntimeError, lambda: anynorm.LayerNorm(5)(torch.zeros(2, 4))),
    "layer_norm: normalized_shape must be a sequence of sizes; got 4; pass (4,)":
        (TypeError, lambda: F.layer_norm(torch.zeros(2, 4), 4)),
    "rms_norm: weight must have the shape normalized_shape; got weight (3,), normalized_shape (4,); "
    "build the norm for (4,)":
        (RuntimeError, lambda: F.rms_norm(torch.zeros(2, 4), (4,), torch.ones(3))),
    "layer_norm: input must be float16, bfloat16, float32 or float64; got torch.int64; call x.float() first":
        (NotImplementedError, lambda: F.layer_norm(torch.ones(2, 4, dtype=torch.long), (4,))),
    "batch_norm: weight must have the dtype of the input, or float32 where the input is of a half type; "
    "got weight torch.float32, input torch.float64; convert one of them with .to(dtype)":
        (RuntimeError, lambda: anynorm.BatchNorm1d(3)(torch.zeros(2, 3, dtype=torch.float64))),
    "expected 4D input (got 3D input); got shape (2, 3, 4); use the norm of the right dimension or unsqueeze":
        (ValueError, lambda: anynorm.BatchNorm2d(3)(torch.zeros(2, 3, 4))),
    "instance_norm: use_input_stats=False needs running statistics; got None; pass running_mean and running_var":
        (RuntimeError, lambda: F.instance_norm(torch.zeros(2, 3, 4), use_input_stats=False)),
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_text(text):
    kind, call = TEXTS[text]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text


SHARED = torch.ones(4)


@pytest.mark.parametrize(
    ("mean", "var", "x", "names"),
    [
        (SHARED[:3], SHARED[:3], torch.randn(4, 3), "running_mean and running_var"),
        (SHARED[:3], SHARED[1:], torch.randn(4, 3), "running_mean and running_var"),
        (torch.zeros(1).expand(3), torch.ones(3), torch.randn(4, 3), None),
        (SHARED.expand(2, 4)[0], torch.ones(4), SHARED.expand(2, 4), "running_mean and the input"),
        (torch.ones(4), SHARED, SHARED.expand(2, 4), "running_var and the input"),
    ],
)
def test_buffers_that_share_memory_are_refused(mean, var, x, names):
    if names is None:  # A buffer that overlaps itself: torch's own error, from the write.
        with pytest.raises(RuntimeError):
            F.batch_norm(x, mean, var, training=True)
        return
    with pytest.raises(ValueError, match=f"{names} must not share memory"):
        F.batch_norm(x, mean, var, training=True)
    assert torch.equal(SHARED, torch.ones(4))


def test_buffers_side_by_side_or_interleaved_are_fine():
    both = torch.ones(6)
    F.batch_norm(torch.randn(4, 3), both[:3], both[3:], training=True)
    F.batch_norm(torch.randn(4, 3), both[::2], both[1::2], training=True)


def test_shared_buffers_are_refused_under_a_default_device_too():
    with torch.device("cpu"), pytest.raises(ValueError, match="must not share memory"):
        F.batch_norm(torch.randn(4, 3), SHARED[:3], SHARED[:3], training=True)


BAD_STATE = {
    "running_var must not be negative; got -8": {"running_var": torch.tensor([1.0, -8.0, 1.0])},
    "weight must be real; got torch.complex64": {"weight": torch.ones(3, dtype=torch.complex64)},
    "running_var must not be negative; got -1e-06": {"running_var": torch.tensor([1.0, -1e-6, -1e-9])},
    "num_batches_tracked must be one whole number; got \\(7\\+0j\\)": {"num_batches_tracked": torch.tensor(7 + 0j)},
}


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("text", BAD_STATE)
def test_checkpoints_that_cannot_be_a_norms_are_refused(text):
    """torch loads each of these without a word."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    bad = {**model.state_dict(), **{f"0.{k}": v for k, v in BAD_STATE[text].items()}}
    model.load_state_dict(bad)
    fine = torch.nn.Sequential(anynorm.BatchNorm1d(3))
    before = {k: v.clone() for k, v in fine.state_dict().items()}
    with pytest.raises(RuntimeError, match="0." + text):
        fine.load_state_dict(bad)
    assert all(torch.equal(before[k], v) for k, v in fine.state_dict().items())


def test_one_value_per_group_is_said_aloud():
    """pytorch#19250: torch returns zeros in silence."""
    with pytest.warns(UserWarning, match="group_norm: one value per group in an input .2, 4., so every output is beta"):
        assert (anynorm.GroupNorm(4, 4)(torch.randn(2, 4)) == 0).all()
    with pytest.warns(UserWarning, match="layer_norm: one value per sample"):
        anynorm.LayerNorm(1)(torch.randn(2, 1))


@pytest.mark.filterwarnings("ignore:.*one value per")
@pytest.mark.parametrize("shape", [(7.0,), [7.0], (True,), "[7]"])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_shapes_that_equal_one_that_was_taken_are_refused(name, shape):
    """As in torch, the first time and later; (7.0,) equals (7,)."""
    x = torch.randn(3, 1 if shape == (True,) else 7)
    ours, theirs = getattr(F, name), getattr(torch.nn.functional, name)
    for taken in (tuple(x.shape[-1:]), list(x.shape[-1:])):
        ours(x, taken)
    for function in (ours, theirs):
        with pytest.raises(TypeError):
            function(x, shape)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 7, 1, 1)])
def test_parameters_with_other_axes_are_refused_where_torch_refuses_them(shape):
    """torch's batch norm takes gamma and beta of any axes, and averages of one."""
    x, row, other = torch.randn(3, 7, 4, 4), torch.ones(7), torch.ones(shape)
    for place in range(4):
        given = [other.clone() if place == i else row.clone() for i in range(4)]
        calls = {
            "batch_norm": lambda f, given=given: f(x, *given, True),
            "instance_norm": lambda f, given=given: f(x, *given, True),
            "group_norm": lambda f, given=given: f(x, 7, *given[2:]),
        }
        for name, call in calls.items():
            refused = []
            for module in (torch.nn.functional, F):
                try:
                    call(getattr(module, name))
                    refused.append(False)
                except RuntimeError:
                    refused.append(True)
            assert refused[0] == refused[1], (name, place)
