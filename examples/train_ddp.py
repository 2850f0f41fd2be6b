"""Do several processes train the same network as one? MNIST images, DistributedDataParallel and `anynorm.sync`.

    torchrun --nproc-per-node 2 examples/train_ddp.py

Every rank takes its own, uneven share of each batch. The same network is also trained by one process on the whole
batch, and by ranks whose batch norms know nothing of each other; then weights and running averages are compared.
Half a minute on a CPU; nothing is downloaded.

The network has SiLU. ReLU's slope jumps where rounding carries an input across 0, and then training in float32 does
not repeat at all: try --activation ReLU, where one process that takes the images in reverse order shows it, too.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import typer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import anynorm
from anynorm.apps.studies.data import load_data
from anynorm.apps.terminal import open_console, plain_table, say

Activation = Literal["SiLU", "ReLU"]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}  # of the largest value of a tensor, after all steps


def make_model(dtype: torch.dtype, activation: Activation) -> nn.Module:
    torch.manual_seed(0)
    act = getattr(nn, activation)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), act()),
        *(nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), act(), nn.Flatten()),
        *(nn.Linear(32 * 6 * 6, 64, bias=False), nn.BatchNorm1d(64), act(), nn.Linear(64, 10)),
    )
    anynorm.accelerate(model)
    return model.to(dtype)


def share(batch: Tensor, rank: int, world: int) -> Tensor:
    """What a rank takes: rank 1 twice as much as rank 0, rank 2 three times, and so on."""
    parts = [rank + 1 for rank in range(world)]
    sizes = [len(batch) * part // sum(parts) for part in parts]
    sizes[-1] += len(batch) - sum(sizes)
    return batch.split(sizes)[rank]


def train(model: nn.Module, x: Tensor, y: Tensor, batches: list[Tensor], rank: int, world: int) -> None:
    """The mean loss over the whole batch: DistributedDataParallel divides the sum over ranks by their number."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in batches:
        mine = share(batch, rank, world)
        loss = cross_entropy(model(x[mine]), y[mine], reduction="sum") * world / len(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def find_difference(model: nn.Module, other: nn.Module, buffers: bool) -> float:
    """The largest, relative to the largest value of its tensor."""
    pairs = zip(*(m.buffers() if buffers else m.parameters() for m in (model, other)), strict=True)
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)


@torch.no_grad()
def find_error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of the test images."""
    return 100 * float((model.eval()(x).argmax(1) != y).double().mean())


def main(
    steps: Annotated[int, typer.Option(help="How many batches to train on.", min=1)] = 60,
    size: Annotated[int, typer.Option(help="Images in the batch of all ranks together.", min=8)] = 48,
    activation: Annotated[Activation, typer.Option(help="Behind each norm.")] = "SiLU",
    double: Annotated[bool, typer.Option(help="Compute in float64.")] = False,
) -> None:
    """Train on all ranks and on one, and compare."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.set_num_threads(1)
    dtype = torch.float64 if double else torch.float32
    data = load_data("mnist")
    x, y = torch.from_numpy(data.train_x).to(dtype), torch.from_numpy(data.train_y)
    order = torch.Generator().manual_seed(1)
    batches = [torch.randint(len(x), (size,), generator=order) for _ in range(steps)]

    whole = make_model(dtype, activation)
    train(whole, x, y, batches, 0, 1)
    models = {"one process, reversed": make_model(dtype, activation)}
    train(*models.values(), x, y, [batch.flip(0) for batch in batches], 0, 1)
    for name in (f"{world} ranks, synchronized", f"{world} ranks, each by itself"):
        model = models[name] = make_model(dtype, activation)
        if "synchronized" in name:
            anynorm.sync(model)
        train(DistributedDataParallel(model) if world > 1 else model, x, y, batches, rank, world)

    test_x, test_y = torch.from_numpy(data.test_x).to(dtype), torch.from_numpy(data.test_y)
    rows = [["one process", "", "", f"{find_error(whole, test_x, test_y):.1f}"]]
    for name, model in models.items():
        found = [f"{find_difference(model, whole, buffers):.1e}" for buffers in (False, True)]
        rows.append([name, *found, f"{find_error(model, test_x, test_y):.1f}"])
    largest = max(find_difference(models[f"{world} ranks, synchronized"], whole, buffers) for buffers in (False, True))
    same = largest <= TOLERANCE[dtype]
    if rank == 0:
        console = open_console()
        shares = [len(share(batches[0], r, world)) for r in range(world)]
        say(console, f"{steps} batches of {size} images on {world} ranks, {shares} each; {dtype}")
        table = plain_table("batch norms", "weights off by", "averages off by", "test error %")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        verdict = "the same" if same else "NOT the same"
        say(console, f"Synchronized ranks and one process have {verdict} weights (to {TOLERANCE[dtype]:.0e}).")
    if dist.is_initialized():
        dist.destroy_process_group()
    raise SystemExit(activation == "SiLU" and not same)


if __name__ == "__main__":
    typer.run(main)
