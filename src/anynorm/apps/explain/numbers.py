"""The numbers that `anynorm explain` shows: small inputs stand here, everything else is computed by the library."""

from dataclasses import dataclass

import torch
from torch import Tensor

from anynorm import functional, reference
from anynorm.family import FAMILY
from anynorm.pooling import Pooling, Sizes, find_pooling

PEOPLE = torch.tensor([[1.60, 50.0], [1.70, 72.0], [1.75, 66.0], [1.95, 92.0]], dtype=torch.float64, device="cpu")
CHANNELS = ("height, m", "weight, kg")
GAMMA = torch.tensor([2.0, 0.5], dtype=torch.float64, device="cpu")
BETA = torch.tensor([1.0, -1.0], dtype=torch.float64, device="cpu")
EPS = 1e-5
MOMENTUM = 0.1

# 2 samples, 4 channels, 3 positions; channels differ in level, and the second sample is larger.
SMALL = torch.tensor(
    [
        [[1, 2, 3], [4, 4, 7], [0, 6, 3], [8, 9, 7]],
        [[5, 7, 3], [9, 8, 4], [2, 2, 8], [9, 6, 9]],
    ],
    dtype=torch.float64,
    device="cpu",
)
GROUPS = 2


@dataclass(frozen=True)
class Steps:
    """Batch norm of (N, C) step by step: statistics per channel, normalized values, outputs."""

    x: Tensor
    mean: Tensor
    var: Tensor
    normalized: Tensor
    y: Tensor


@dataclass(frozen=True)
class Pools:
    """Which elements of x share a mean: `label` counts the pools from 0 and has the shape of x."""

    norm: str
    label: Tensor
    mean: Tensor
    var: Tensor
    y: Tensor

    @property
    def count(self) -> int:
        """Return how many means there are."""
        return self.mean.numel()

    @property
    def size(self) -> int:
        """Return how many elements share one."""
        return self.label.numel() // self.count


@dataclass(frozen=True)
class Running:
    """The running averages after some batches, per channel."""

    batches: int
    mean: Tensor
    var: Tensor


def find_statistics(x: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """Return mean and population variance of each pool in float64, flat; 0 and mean square where not centred."""
    values = pooling.open(x.detach()).double().numpy()
    mean, var = reference.moments(values, pooling.pooled, pooling.centred)
    return torch.from_numpy(mean).flatten(), torch.from_numpy(var).flatten()


def take_steps(x: Tensor = PEOPLE) -> Steps:
    """Return the three steps of batch norm in training on (N, C)."""
    mean, var = find_statistics(x, find_pooling(FAMILY["batch"].pattern, "c", True, x.dim()))
    normalized = functional.batch_norm(x, None, None, training=True, eps=EPS)
    y = functional.batch_norm(x, None, None, GAMMA, BETA, training=True, eps=EPS)
    return Steps(x, mean, var, normalized, y)


def follow_running(batches: tuple[int, ...] = (0, 1, 2, 10, 100), x: Tensor = PEOPLE) -> list[Running]:
    """Return the running averages after these numbers of batches, the same batch each time."""
    mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    seen = []
    for number in range(max(batches) + 1):
        if number in batches:
            seen.append(Running(number, mean.clone(), var.clone()))
        functional.batch_norm(x, mean, var, training=True, momentum=MOMENTUM, eps=EPS)
    return seen


def evaluate(running: Running, x: Tensor = PEOPLE) -> Tensor:
    """Return the output in evaluation with these running averages."""
    return functional.batch_norm(x, running.mean, running.var, GAMMA, BETA, training=False, eps=EPS)


def find_pools(norm: str, x: Tensor = SMALL, sizes: Sizes | None = None) -> Pools:
    """Return which elements of x share a mean under a norm of the family, their statistics and the output.

    Args:
        norm: a name in `FAMILY`.
        x: (N, C, L), floating point.
        sizes: sizes the pattern needs; where None, features are all axes but the first, and GROUPS groups.
    """
    scheme = FAMILY[norm]
    if sizes is None:
        sizes = tuple(
            (axis, value) for axis, value in (("d", tuple(x.shape[1:])), ("g", GROUPS)) if axis in _axes(norm)
        )
    pooling = find_pooling(scheme.pattern, scheme.affine, scheme.centred, x.dim(), sizes)
    view = pooling.open(x)
    mean, var = find_statistics(x, pooling)
    shape = [1 if axis in pooling.pooled else size for axis, size in enumerate(view.shape)]
    label = torch.arange(mean.numel(), device=mean.device).reshape(shape).expand(view.shape).reshape(x.shape)
    y = reference.forward(view.numpy(), pooling.pooled, eps=EPS, centred=pooling.centred)
    return Pools(norm, label, mean, var, torch.from_numpy(y).reshape(x.shape))


def _axes(norm: str) -> set[str]:
    """Return the letters of a norm's pattern."""
    return set(FAMILY[norm].pattern) - set(" ()->")


def depends_on_others(norm: str) -> bool:
    """Return whether the output of sample 1 changes when sample 2 is replaced, by trying."""
    other = SMALL.clone()
    other[1] = 10.0 - other[1] * 2.0
    return not torch.equal(find_pools(norm).y[0], find_pools(norm, other).y[0])
