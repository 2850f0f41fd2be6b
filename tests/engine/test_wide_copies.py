"""Off the CPU no tensor as large as x is float64: looked at on the meta device, which has no numbers."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import anynorm
from anynorm.engine import paths
from anynorm.sources import Exchange

SHAPE = (4, 6, 5, 7)


class Wide(TorchDispatchMode):
    """Collects the operations that make a float64 tensor of a size, and counts all others that make one of it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found, self.others = size, [], 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor) and t.numel() >= self.size:
                if t.dtype is torch.float64:
                    self.found.append(str(function))
                else:
                    self.others += 1
        return made


class Alone(Exchange):
    """Of one part."""

    def merge(self, moments):
        return moments

    def merge_sums(self, sums):
        return sums


class AloneSync(anynorm.BatchNorm2d):
    def is_part(self):
        return True

    def find_source(self, input, moves):
        return anynorm.sources.Merged(self.running_mean, self.running_var, 0.1, Alone())


MAKE = {
    "batch": lambda: anynorm.BatchNorm2d(6),
    "given": lambda: anynorm.BatchNorm2d(6).eval(),
    "renorm": lambda: anynorm.BatchRenorm2d(6),
    "merged": lambda: AloneSync(6),
    "ghost": lambda: anynorm.GhostBatchNorm2d(6, ghost_size=2),
    "instance": lambda: anynorm.InstanceNorm2d(6, affine=True),
    "group": lambda: anynorm.GroupNorm(2, 6),
    "fused": lambda: anynorm.GroupNormAct(2, 6, activation="silu"),
    "layer": lambda: anynorm.LayerNorm(SHAPE[1:]),
    "rms": lambda: anynorm.RMSNorm(SHAPE[1:]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("name", MAKE)
def test_no_float64_copy_of_x(name, masked, dtype):
    if masked and name == "merged":
        pytest.skip("whether any part has a real position is read, and here there is nothing to read")
    norm = MAKE[name]().to("meta")
    x = torch.empty(SHAPE, device="meta", dtype=dtype, requires_grad=True)
    positions = SHAPE[:1] if name in ("layer", "rms") else (SHAPE[0], *SHAPE[2:])
    options = {"mask": torch.empty(positions, dtype=torch.bool, device="meta")} if masked else {}
    with anynorm.exact(True), Wide(x.numel()) as seen:
        y = norm(x, **options)
        (dx, *_) = torch.autograd.grad(y.sum(), [x, *norm.parameters()], create_graph=name != "merged")
        if name != "merged":  # merged statistics are differentiated once
            dx.square().sum().backward()
    assert y.device.type == "meta"
    assert seen.others > 10
    assert not seen.found


def test_nor_where_statistics_are_found_alone():
    x = torch.empty(SHAPE, device="meta")
    mask = torch.empty((4, 1, 5, 7), device="meta")
    with Wide(x.numel()) as seen:
        for given in (None, mask):
            moments = paths.find_moments(x, anynorm.FAMILY["batch"].pool(x), given)
            assert moments.m2.dtype is torch.float64
    assert seen.others > 4
    assert not seen.found
