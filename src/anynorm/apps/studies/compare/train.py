"""One run: a network trained from a seeded start on a seeded order of images, and what was seen on the way."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Data
from ..fit import draw_order, evaluate, find_status, finite, fit_steps, untouched
from ..models import build
from ..norms import NORMS

CHECKPOINTS = 8
PROBE = 256
HOPELESS_STEPS, HOPELESS_LOSS = 10, 1.5


@dataclass(frozen=True)
class Run:
    """What defines a run beside its data: batch is a size, or first:second, each for half of the images."""

    model: str
    norm: str
    batch: str
    rate: float
    seed: int
    images: int
    final: bool

    @property
    def cell(self) -> tuple[str, str, str]:
        """Where the run belongs in the tables."""
        return self.model, self.batch, self.norm


def parse_batch(batch: str) -> list[int]:
    """Sizes that a batch item names: one, or the two halves of a schedule."""
    return [int(size) for size in batch.split(":")]


def find_steps(batch: str, images: int) -> list[int]:
    """The batch size of every step: whole batches only, equal shares of the images for each size."""
    sizes = parse_batch(batch)
    share = images // len(sizes)
    return [size for size in sizes for _ in range(share // size)]


def train(run: Run, data: Data) -> dict[str, Any]:
    """Train one network and measure it; equal arguments give equal numbers on one machine, times aside.

    Returns:
        A record for the journal: what defines the run, `status` (finished, diverged or hopeless), `seconds` of
        training, validation accuracy and loss; for a final run also test accuracy, curves and both modes.
    """
    torch.manual_seed(run.seed)
    network = build(run.model, NORMS[run.norm], data.sample_shape, data.classes).train()
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    sizes = find_steps(run.batch, run.images)
    order = torch.from_numpy(draw_order(len(x), run.images, run.seed))[: sum(sizes)]
    recorder = CurveRecorder(network, data, len(sizes) if run.final else 0)
    status, step, seconds, started = "finished", 0, 0.0, time.perf_counter()
    for step, loss in enumerate(fit_steps(network, x, y, order.split(sizes), run.rate), 1):
        status = find_status(loss)
        wanted = status == "finished" and recorder.wants(step, loss)
        if status == "finished" and not run.final and is_hopeless(recorder.losses, len(sizes), data.classes):
            status = "hopeless"
            break
        if wanted:
            seconds += time.perf_counter() - started
            recorder.look(step, sum(sizes[:step]), seconds)
            started = time.perf_counter()
    seconds += time.perf_counter() - started
    record = {**asdict(run), "status": status, "steps": step, "seen": sum(sizes[:step]), "seconds": seconds}
    return record | measure(run, recorder, data)


def measure(run: Run, recorder: CurveRecorder, data: Data) -> dict[str, Any]:
    """Return what is measured after training: validation, and for a final run also test, both modes and curves."""
    record: dict[str, Any] = dict(zip(("validation_accuracy", "validation_loss"), recorder.validate(), strict=True))
    if run.final:
        test = torch.from_numpy(data.test_x), torch.from_numpy(data.test_y)
        record["test_accuracy"], record["test_loss"] = evaluate(recorder.network, *test)
        record["modes"] = compare_modes(recorder.network, recorder.x, recorder.y, parse_batch(run.batch)[-1])
        record["curve"], record["probed_layer"] = recorder.curve, recorder.layer
    return record


def is_hopeless(losses: list[float], steps: int, classes: int) -> bool:
    """Whether a search run should be dropped: a quarter through, and still far worse than guessing.

    Guessing costs ln(classes). A run is dropped once, at a quarter of its steps (at least HOPELESS_STEPS), where the
    mean training loss of the last HOPELESS_STEPS steps is above HOPELESS_LOSS times that.
    """
    if len(losses) != max(steps // 4, HOPELESS_STEPS):
        return False
    return sum(losses[-HOPELESS_STEPS:]) / HOPELESS_STEPS > HOPELESS_LOSS * math.log(classes)


class CurveRecorder:
    """Measures a network at evenly spaced steps of its training, and leaves it as it was."""

    def __init__(self, network: nn.Module, data: Data, steps: int) -> None:
        self.network = network
        self.x, self.y = torch.from_numpy(data.validation_x), torch.from_numpy(data.validation_y)
        self.layer, self.module = find_last_layer(network)
        self.curve: dict[str, list[float | None]] = {
            name: [] for name in ("step", "images", "seconds", "loss", "accuracy", "probe_mean", "probe_std")
        }
        self.steps = {round(steps * k / CHECKPOINTS) for k in range(1, CHECKPOINTS + 1)} if steps else set()
        self.losses: list[float] = []
        if steps:
            self.look(0, 0, 0.0)

    def wants(self, step: int, loss: float) -> bool:
        """Note the loss of a step; True where the network should be measured after it."""
        self.losses.append(loss)
        return step in self.steps

    def look(self, step: int, images: int, seconds: float) -> None:
        """Add a point to the curve: mean training loss since the last point, validation accuracy, probe."""
        loss = sum(self.losses) / len(self.losses) if self.losses else None
        self.losses = []
        mean, std = probe(self.network, self.module, self.x[:PROBE])
        point = (step, images, seconds, loss, self.validate()[0], mean, std)
        for column, value in zip(self.curve.values(), point, strict=True):
            column.append(value)

    def validate(self) -> tuple[float, float | None]:
        """Accuracy and loss on the validation images."""
        return evaluate(self.network, self.x, self.y)


def find_last_layer(network: nn.Module) -> tuple[str | None, nn.Module | None]:
    """The last dense or convolutional layer in order of definition: the one whose inputs are probed."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = [(name, module) for name, module in network.named_modules() if isinstance(module, kinds)]
    return found[-1] if found else (None, None)


def probe(network: nn.Module, layer: nn.Module | None, x: Tensor) -> tuple[float | None, float | None]:
    """Mean and standard deviation of a layer's inputs for fixed samples, computed as in training."""
    if layer is None:
        return None, None
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        with untouched(network):
            network.train()
            network(x)
    finally:
        hook.remove()
    return (finite(seen[-1].mean().item()), finite(seen[-1].std().item())) if seen else (None, None)


def compare_modes(network: nn.Module, x: Tensor, y: Tensor, batch: int) -> dict[str, float | None]:
    """The same samples in training mode, in batches as in training, and in evaluation mode."""
    whole = len(x) // batch * batch
    if not whole:
        return {}
    train_accuracy, train_loss = evaluate(network, x[:whole], y[:whole], batch=batch, training=True)
    accuracy, loss = evaluate(network, x[:whole], y[:whole])
    return {
        "training_accuracy": train_accuracy,
        "training_loss": train_loss,
        "evaluation_accuracy": accuracy,
        "evaluation_loss": loss,
    }
