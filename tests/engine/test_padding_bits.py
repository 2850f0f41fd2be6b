"""More padding changes no bit (kind 3): a search over norms, layouts, shapes, masks, dtypes and extreme values."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import anynorm
from anynorm.engine import kernels
from fused_specimens import TORCHS

pytestmark = [
    pytest.mark.skipif(bool(kernels.OFF), reason="sums of torch's operations depend on the shape"),
    pytest.mark.filterwarnings("ignore:.*one value per"),
]

KINDS = ["batch", "instance", "group", "ghost", "renorm", "layer", "rms"]
# Positions of one sample: one step, fewer than a vector, two segments, images whose rows get holes between them.
SIZES = [(1,), (2,), (7,), (40,), (1, 1), (1, 7), (5, 1), (3, 17), (2, 3, 2)]
LONG = [(70_000,), (33, 1000)]


@dataclass
class Case:
    kind: str
    module: nn.Module
    last: bool  # channels last in memory
    extra: tuple[int, ...]  # how much longer each axis of positions becomes
    mask: Tensor
    x: Tensor
    grad: Tensor
    residual: Tensor | None

    def lay(self, t: Tensor) -> Tensor:
        if self.kind in ("layer", "rms"):
            return t.movedim(1, -1).contiguous()
        if not self.last:
            return t.contiguous()
        return t.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)

    def run(self, padded: bool, fill: float = 0.0) -> dict[str, Tensor]:
        """Results at the positions that the shorter input has too."""

        def pad(t: Tensor) -> Tensor:
            return F.pad(t, [n for size in reversed(self.extra) for n in (0, size)], value=fill) if padded else t

        module = copy.deepcopy(self.module)
        leaves = {"dx": self.lay(pad(self.x)).requires_grad_()}
        if self.residual is not None:
            leaves["dresidual"] = self.lay(pad(self.residual)).requires_grad_()
        mask = F.pad(self.mask, [n for size in reversed(self.extra) for n in (0, size)]) if padded else self.mask
        y = module(leaves["dx"], mask=mask, **({"residual": leaves["dresidual"]} if "dresidual" in leaves else {}))
        named = {**leaves, **{"d" + name: p for name, p in module.named_parameters()}}
        found = dict(zip(named, torch.autograd.grad(y, list(named.values()), self.lay(pad(self.grad))), strict=True))
        for name, t in {"y": y.detach(), **{name: found[name] for name in leaves}}.items():
            shaped = t.movedim(-1, 1) if self.kind in ("layer", "rms") else t
            found[name] = shaped[(slice(None), slice(None), *(slice(size) for size in self.x.shape[2:]))]
        return {**found, **dict(module.named_buffers())}


def make(kind: str, c: int, axes: int, activation: str | None, choice: random.Random) -> nn.Module:
    """With random parameters, sometimes one near a float's limits, which takes other loops."""
    if kind in ("layer", "rms", "group"):
        groups = [choice.choice([g for g in (1, 2, c) if c % g == 0])] if kind == "group" else []
        name = {"layer": "LayerNormAct", "rms": "RMSNormAct", "group": "GroupNormAct"}[kind]
        module = getattr(anynorm, name)(*groups, c, activation=activation)
    else:
        name = {"batch": "BatchNorm", "instance": "InstanceNorm", "ghost": "GhostBatchNorm", "renorm": "BatchRenorm"}
        options = {"instance": {"affine": True, "track_running_stats": True}, "renorm": {"warmup": (0, 1, 1)}}
        options["ghost"] = {"ghost_size": choice.choice([2, 3])}
        module = getattr(anynorm, f"{name[kind]}Act{axes}d")(c, activation=activation, **options.get(kind, {}))
    odd = choice.choice([None, None, None, 0.0, 1e-33, 1e31])
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape))
            if odd is not None:
                p[choice.randrange(c)] = odd
    return module


def draw(seed: int, long: bool = False) -> Case:
    choice = random.Random(seed)
    torch.manual_seed(seed)
    kind, sizes, n = choice.choice(KINDS), choice.choice(LONG if long else SIZES), choice.choice([2, 3, 5])
    c = choice.choice([1, 4] if long else [1, 2, 7, 16, 130, 200])
    dtype = choice.choice([torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.float16])
    activation = choice.choice([None, None, *TORCHS])
    module = make(kind, c, len(sizes), activation, choice).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    extra = tuple(choice.choice([0, 1, 5, 33]) for _ in sizes)
    mask = torch.ones(n, *sizes, dtype=torch.bool)
    if (form := choice.choice(["full", "lengths", "holes"])) == "holes":
        mask &= torch.rand(mask.shape) < 0.7
    elif form == "lengths":
        for sample in range(n):
            mask[sample, choice.randint(0, sizes[0]) :] = False
    if mask.sum() < 2:
        mask[:] = True
    shape = (n, c, *sizes)
    x = torch.randn(shape, dtype=torch.float64) + choice.choice([0, 1, 1000])
    if choice.random() < 0.5:  # A channel that takes its sums again, which must not depend on who is beside it.
        x[:, choice.randrange(c)] = choice.choice([0.1, 3e4])
        if dtype in (torch.float32, torch.float64):
            x[:, choice.randrange(c)] *= choice.choice([1e-25, 1e20, 1e30])
    residual = torch.randn(shape).to(dtype) if choice.random() < 0.4 else None
    grad = torch.randn(shape).to(dtype)
    return Case(kind, module, choice.random() < 0.5, extra, mask, x.to(dtype), grad, residual)


def check(case: Case) -> None:
    for module in (case.module,):
        if case.kind == "ghost" and (real := case.mask.flatten(1).sum(1)).min() < 2:
            module.ghost_size = len(real)  # One real position in a ghost is refused.
    short = case.run(False)
    for fill in (0.0, float("nan")):
        longer = case.run(True, fill)
        for name, found in short.items():
            assert torch.equal(found.nan_to_num(nan=7.0), longer[name].nan_to_num(nan=7.0)), (name, case)


@pytest.mark.parametrize("start", range(0, 400, 50))
def test_more_padding_changes_no_bit(start):
    for seed in range(start, start + 50):
        check(draw(seed))


@pytest.mark.parametrize("seed", range(12))
def test_more_padding_of_long_inputs_changes_no_bit(seed):
    check(draw(seed, long=True))


def test_threads_and_padding_at_once():
    before, cases = torch.get_num_threads(), [draw(seed, long=True) for seed in range(100, 104)]
    try:
        for case in cases:
            torch.set_num_threads(1)
            one = case.run(False)
            torch.set_num_threads(3)
            many = case.run(True)
            assert all(torch.equal(t.nan_to_num(nan=7.0), many[name].nan_to_num(nan=7.0)) for name, t in one.items())
    finally:
        torch.set_num_threads(before)


def test_samples_of_nothing_but_padding_change_no_bit():
    """A batch that is filled up with empty samples."""
    for c, last in ((7, False), (7, True), (200, True)):
        torch.manual_seed(0)
        norm, x = anynorm.BatchNorm2d(c), torch.randn(50, c, 1, 3)
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        mask = torch.ones(50, 1, 3, dtype=torch.bool)
        more, kept = torch.cat([x[:20], torch.full_like(x[:5], float("inf")), x[20:]]), torch.ones(55, dtype=torch.bool)
        kept[20:25] = False
        filled = norm(more, mask=kept.view(-1, 1, 1).expand(55, 1, 3))
        assert torch.equal(norm(x, mask=mask), filled[kept])
    x, kept = torch.randn(70, 9), torch.arange(90) % 9 > 1
    more = torch.full((90, 9), float("nan"))
    more[kept] = x
    norm = anynorm.BatchNorm1d(9)
    assert torch.equal(norm(x, mask=torch.ones(70, dtype=torch.bool)), norm(more, mask=kept)[kept])
