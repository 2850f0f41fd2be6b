"""One job of the study: a network trained with statistics over few images, and its test error."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import anynorm
from anynorm.apps.studies.data import load_data
from anynorm.apps.studies.models import cnn, mlp
from anynorm.apps.studies.norms import NORMS

BATCH = 32  # of SGD, always; the statistics are over `size` of its images
IMAGES = 1_000
SGD_MOMENTUM = 0.9
NETWORKS = {"mlp": mlp, "cnn": cnn}


@dataclass(frozen=True)
class Job:
    """An arm, trained once; with `held_out` it is judged on the validation images, else on the test images."""

    network: str
    arm: str
    size: int
    rate: float
    seed: int
    epochs: int
    held_out: bool = False


@dataclass(frozen=True)
class Outcome:
    """Loss, and error in percent by how the network is evaluated: as it is, and after recalibration."""

    loss: float
    error: float
    recalibrated: float | None = None


@cache
def load() -> dict[str, Tensor]:
    """1,000 images to train on, 500 to choose rates by and 1,000 to test on."""
    data = load_data("mnist")
    parts = {
        name: torch.from_numpy(getattr(data, name)) for name in ("validation_x", "validation_y", "test_x", "test_y")
    }
    return {**parts, "x": torch.from_numpy(data.train_x)[:IMAGES], "y": torch.from_numpy(data.train_y)[:IMAGES]}


def build(job: Job, arm: str) -> nn.Module:
    """A network from the seed alone: every arm starts from the same weights."""
    steps = job.epochs * (IMAGES // BATCH)
    batches = steps * BATCH // job.size
    # Averages are over the same number of images whatever the size; the paper's schedule as shares of the training.
    momentum = 0.1 * job.size / BATCH
    warmup = (batches // 20, batches * 6 // 20, batches * 4 // 20)

    def make(num_features: int, dims: int) -> nn.Module:
        if arm in ("group", "layer"):
            return NORMS[arm](num_features, dims)
        if arm == "renorm":
            renorm = anynorm.BatchRenorm2d if dims else anynorm.BatchRenorm1d
            return renorm(num_features, momentum=momentum, warmup=warmup)
        if arm == "ghost":
            ghost = anynorm.GhostBatchNorm2d if dims else anynorm.GhostBatchNorm1d
            return ghost(num_features, momentum=momentum, ghost_size=job.size)
        return NORMS["batch"](num_features, dims)

    torch.manual_seed(job.seed)
    return NETWORKS[job.network](make, (1, 28, 28), 10)


def run_job(job: Job) -> Outcome:
    """Train and measure; the test images are not looked at where a rate is being chosen."""
    data = load()
    network = fit(job, data)
    x, y = (data[("validation_" if job.held_out else "test_") + name] for name in "xy")
    loss, error = evaluate(network, x, y)
    if job.held_out or job.arm != "ghost":
        return Outcome(loss, error)
    plain = build(job, "batch")  # The state of ghost batch norm is batch norm's.
    plain.load_state_dict(network.state_dict())
    anynorm.recalibrate(plain, data["x"].split(250), progress=False)
    return Outcome(loss, error, evaluate(plain, x, y)[1])


def fit(job: Job, data: dict[str, Tensor]) -> nn.Module:
    """SGD on batches of 32. Batch renormalization sees them as micro-batches of `size`, whose gradients are added;
    ghosts are the same for batch norm in one call; the other norms do not see a batch at all."""
    network = build(job, job.arm)
    optimizer = torch.optim.SGD(network.parameters(), job.rate, SGD_MOMENTUM)
    generator = torch.Generator().manual_seed(job.seed)
    size = job.size if job.arm == "renorm" else BATCH
    for _ in range(job.epochs):
        for chosen in torch.randperm(IMAGES, generator=generator)[: IMAGES // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            for part in chosen.split(size):
                loss = F.cross_entropy(network(data["x"][part]), data["y"][part])
                (loss * len(part) / BATCH).backward()
            optimizer.step()
    return network


@torch.no_grad()
def evaluate(network: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy, and errors in percent."""
    logits = network.eval()(x)
    return float(F.cross_entropy(logits, y)), 100 * float((logits.argmax(1) != y).double().mean())
