"""Equals torch: how results and gradients lie in memory, for inputs with holes, expanded ones, and axes of size 1."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import anynorm

LAST, LAST_3D = torch.channels_last, torch.channels_last_3d


def last(*shape: int) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=LAST if len(shape) == 4 else LAST_3D)


INPUTS = {
    "contiguous": torch.randn(4, 8, 6, 6),
    "channels_last": last(4, 8, 6, 6),
    "chunk": last(4, 16, 6, 6).chunk(2, 1)[1],
    "every other channel": last(4, 16, 6, 6)[:, ::2],
    "crop": last(4, 8, 9, 9)[..., 1:7, 1:7],
    "every other sample": last(8, 8, 6, 6)[::2],
    "contiguous chunk": torch.randn(4, 16, 6, 6)[:, 8:],
    "contiguous crop": torch.randn(4, 8, 9, 9)[..., 1:7, 1:7],
    "expanded samples": last(1, 8, 6, 6).expand(4, 8, 6, 6),
    "expanded channels": torch.randn(4, 1, 6, 6).expand(4, 8, 6, 6),
    "expanded positions": torch.randn(4, 8, 1, 1).expand(4, 8, 6, 6),
    "transposed image": torch.randn(4, 8, 6, 6).transpose(2, 3),
    "transposed channels_last": last(4, 8, 6, 6).transpose(2, 3),
    "transposed batch": torch.randn(8, 4, 6, 6).transpose(0, 1),
    "one position": torch.randn(4, 8, 1, 1),
    "one position of a map": last(4, 8, 6, 6)[:, :, :1, :1],
    "one position of a contiguous map": torch.randn(4, 8, 6, 6)[:, :, :1, :1],
    "one sample": last(4, 8, 6, 6)[1:2],
    "one row": last(4, 8, 1, 6),
    "one column": last(4, 8, 6, 1),
    "channels_last_3d": last(4, 8, 3, 4, 4),
    "chunk 3d": last(4, 16, 3, 4, 4)[:, 8:],
    "one slice 3d": last(4, 8, 3, 4, 4)[:, :, :1],
    "crop 3d": last(4, 8, 5, 6, 6)[:, :, 1:4, 1:5],
    "sequences": torch.randn(4, 6, 16).transpose(1, 2)[:, :8],
    "features": torch.randn(8, 4).t(),
}
MAKE = {
    "batch": lambda library, axes: getattr(library, f"BatchNorm{max(axes - 2, 1)}d")(8),
    "evaluation": lambda library, axes: getattr(library, f"BatchNorm{max(axes - 2, 1)}d")(8).eval(),
    "group": lambda library, axes: library.GroupNorm(2, 8),
}


def find_strides(norm: nn.Module, x: torch.Tensor) -> list[tuple[int, ...]]:
    """Of the result without and with a gradient, and of the gradient."""
    with torch.no_grad():
        found = [copy.deepcopy(norm)(x).stride()]
    leaf = x.detach().requires_grad_()
    y = norm(leaf)
    (g,) = torch.autograd.grad(y, leaf, torch.ones(y.shape))
    return [*found, y.stride(), g.stride()]


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", INPUTS)
def test_batch_and_group_norm_lie_as_torchs(name, kind):
    x = INPUTS[name]
    theirs = MAKE[kind](nn, x.dim())
    ours = copy.deepcopy(theirs)
    anynorm.accelerate(ours)
    expected, found = find_strides(theirs, x), find_strides(ours, x)
    assert found == expected


@pytest.mark.parametrize("name", INPUTS)
def test_a_mode_changes_no_layout(name):
    """The formula in differentiable operations lies as the kernels' result does."""
    from torch.utils.flop_counter import FlopCounterMode

    x = INPUTS[name]
    norm = anynorm.GroupNorm(2, 8)
    with FlopCounterMode(display=False):
        y = norm(x)
    assert y.stride() == norm(x).stride()


@pytest.mark.parametrize("name", ["chunk", "crop", "every other sample", "one sample", "chunk 3d"])
def test_every_norm_keeps_channels_last(name):
    """torch's instance and layer norm do not (pytorch#72341); slices are as the map they come from."""
    x = INPUTS[name]
    memory_format = LAST if x.dim() == 4 else LAST_3D
    mask = torch.ones(len(x), *x.shape[2:])
    rows = x.shape[1:]
    outputs = [
        anynorm.functional.instance_norm(x),
        anynorm.functional.layer_norm(x, rows),
        anynorm.functional.rms_norm(x, rows),
        anynorm.functional.group_norm(x, 2, mask=mask),
        anynorm.functional.batch_norm(x, None, None, training=True, activation="relu", residual=torch.randn(x.shape)),
        anynorm.functional.batch_norm(x, None, None, training=True, mask=mask),
    ]
    if x.dim() == 4:
        outputs += [anynorm.GhostBatchNorm2d(8, ghost_size=2)(x), anynorm.BatchRenorm2d(8)(x)]
    assert [y.is_contiguous(memory_format=memory_format) for y in outputs] == [True] * len(outputs)


def test_a_network_stays_channels_last_behind_a_split():
    """As in CSP and ShuffleNet blocks, with the kernels off as well: the rule looks at strides alone."""
    split = last(2, 8, 5, 5).chunk(2, 1)
    net = nn.Sequential(anynorm.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), anynorm.BatchNorm2d(4))
    assert all(net(part).is_contiguous(memory_format=LAST) for part in split)
