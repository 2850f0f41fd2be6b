"""`anynorm.accumulate(mode="sweep")` where an earlier norm reads what a later one reads: equal to the large batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import anynorm

EXACT = ("sweep", "lockstep")
SIZES = [4, 1, 3]


class Net(nn.Module):
    """A convolution before and a linear layer behind what `body` does with three norms."""

    def __init__(self, body, kind: str = "BatchNorm2d") -> None:
        super().__init__()
        self.body, self.stem, self.second = body, nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.a, self.b, self.c = (getattr(anynorm, kind)(4) for _ in range(3))
        self.head = nn.Linear(4, 2)
        for norm in (self.a, self.b, self.c):
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, self.stem(x)).mean((2, 3)))


def block_with_late_shortcut(n: Net, x: Tensor) -> Tensor:
    """As torchvision's: the shortcut's norm is called behind the main path."""
    return F.relu(n.b(n.second(F.relu(n.a(x)))) + n.c(x))


def two_blocks(n: Net, x: Tensor) -> Tensor:
    """The second block calls the norms of the first again."""
    return block_with_late_shortcut(n, block_with_late_shortcut(n, x))


def dense(n: Net, x: Tensor) -> Tensor:
    """Every norm reads the sum of all before."""
    x = x + torch.tanh(n.a(x))
    x = x + torch.tanh(n.b(x))
    return x + torch.tanh(n.c(x))


BODIES = {
    "two norms of one tensor": lambda n, x: n.a(x).pow(3) + n.b(x).exp(),
    "one behind an activation": lambda n, x: n.a(torch.tanh(x)) * n.b(x),
    "three norms of one tensor": lambda n, x: n.a(x) * n.b(x) + n.c(x).sin(),
    "one norm twice on one tensor": lambda n, x: n.a(x).pow(2) + n.a(x).sin(),
    "one norm on two tensors": lambda n, x: n.a(x).pow(3) + n.a(n.second(x)).pow(2),
    "the later reads the earlier": lambda n, x: n.a(x) * n.b(x + n.a(x)) + n.c(x),
    "the earlier enters late": lambda n, x: n.b(n.second(n.c(x)) + n.a(x)) * n.c(x),
    "one without a use": lambda n, x: (n.a(x).detach() * 0 + n.b(x)) * n.c(x),
    "late shortcut": block_with_late_shortcut,
    "two blocks": two_blocks,
    "dense": dense,
    "in place behind a norm": lambda n, x: F.relu(n.a(x), inplace=True) + n.b(x),
    "in a checkpoint": lambda n, x: checkpoint(lambda t: n.a(t).pow(3) + n.b(t), x, use_reentrant=False) + n.c(x).exp(),
}


def compare(model: nn.Module, batch: Tensor, mode: str, sizes: list[int] = SIZES, loss=None) -> None:
    """Outputs, every gradient and every buffer equal those of one backward of torch's through the large batch."""

    def find_loss(model, x):
        y = model(x)
        return y.pow(3).sum() / len(y), y

    loss, large = loss or find_loss, copy.deepcopy(model)
    found, outputs = loss(large, batch)
    found.backward()
    result = anynorm.accumulate(model, batch.split(sizes), loss, mode=mode)
    torch.testing.assert_close(torch.cat(result.outputs), outputs.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.loss, found.detach(), rtol=1e-9, atol=1e-9)
    for mine, its in zip(model.parameters(), large.parameters(), strict=True):
        assert (mine.grad is None) == (its.grad is None)
        if its.grad is not None:
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-8, atol=1e-8)
    for mine, its in zip(model.buffers(), large.buffers(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("kind", ["BatchNorm2d", "BatchNormAct2d"])
@pytest.mark.parametrize("body", BODIES)
def test_norms_of_one_tensor(body, kind, mode):
    model = Net(BODIES[body], kind).double()
    for norm in (model.a, model.b, model.c):
        if kind == "BatchNormAct2d":
            norm.activation = "silu"
    if mode == "lockstep" and "checkpoint" in body:
        with pytest.raises(RuntimeError, match="'lockstep' cannot compute a batch norm again"):
            compare(model, torch.randn(8, 3, 5, 4, dtype=torch.float64), mode)
        return
    compare(model, torch.randn(8, 3, 5, 4, dtype=torch.float64), mode)


@pytest.mark.parametrize("mode", EXACT)
def test_a_residual_that_another_norm_made(mode):
    """A fused norm whose residual comes from a norm of the same tensor, called before or behind."""
    model = Net(lambda n, x: n.act(x, residual=n.b(x)) + n.c(x), "BatchNorm2d")
    model.act = anynorm.BatchNormAct2d(4, activation="gelu")
    compare(model.double(), torch.randn(8, 3, 5, 4, dtype=torch.float64), mode)


@pytest.mark.parametrize("mode", EXACT)
def test_norms_that_read_the_batch_itself(mode):
    """Its gradient is not wanted, and no sums are."""
    model = Net(lambda n, x: n.a(x) + n.b(x)).double()
    model.stem = nn.Sequential(anynorm.BatchNorm2d(3), nn.Conv2d(3, 4, 1)).double()
    compare(model, torch.randn(8, 3, 5, 4, dtype=torch.float64), mode)


@pytest.mark.parametrize("form", ["packed", "jagged", "lengths"])
def test_ragged_batches(form):
    """Equal to the same sequences in one batch."""

    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.scale = anynorm.BatchNorm1d(3), anynorm.BatchNorm1d(3), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            mask = anynorm.mask_of(lengths, x.shape[2])[:, None]
            x = torch.tanh(x * self.scale.view(-1, 1))
            if form == "lengths":
                return (self.a(x, lengths=lengths).pow(3) + self.b(x, lengths=lengths).exp()) * mask
            if form == "packed":
                y = nn.utils.rnn.pack_padded_sequence(x.mT, lengths, batch_first=True, enforce_sorted=False)
                y = y._replace(data=self.a(y).data.pow(3) + self.b(y).data.exp())
                return nn.utils.rnn.pad_packed_sequence(y, batch_first=True, total_length=x.shape[2])[0].mT
            rows = torch.nested.nested_tensor_from_jagged(x.mT[mask[:, 0]], lengths=lengths)
            y = torch.zeros_like(x.mT)
            y[mask[:, 0]] = self.a(rows).values().pow(3) + self.b(rows).values().exp()
            return y.mT

    def loss(model, batch):
        x, lengths = batch[..., :-1], batch[:, 0, -1].long()
        y = model(x, lengths)
        return y.pow(2).sum() / len(y), y

    lengths = torch.tensor([4.0, 2, 5, 1, 3, 5, 2, 1]).view(-1, 1, 1).expand(-1, 3, 1)
    batch = torch.cat([torch.randn(8, 3, 5), lengths], 2).double()
    compare(Ragged().double(), batch, "sweep", loss=loss)


def test_a_residual_network_with_projections():
    """A stack of blocks as in torchvision's resnet, its stem's norm included."""

    class Block(nn.Module):
        def __init__(self, channels: int, out: int) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(channels, out, 3, 2, 1), nn.Conv2d(out, out, 3, 1, 1)
            self.a, self.b = anynorm.BatchNorm2d(out), anynorm.BatchNorm2d(out)
            self.short = nn.Sequential(nn.Conv2d(channels, out, 1, 2), anynorm.BatchNorm2d(out))

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.two(F.relu(self.a(self.one(x)))))
            return F.relu(y + self.short(x))

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), anynorm.BatchNorm2d(4), nn.ReLU(), Block(4, 6), Block(6, 8), nn.Flatten(1)
    )
    compare(model.double(), torch.randn(8, 3, 12, 12, dtype=torch.float64), "sweep")
