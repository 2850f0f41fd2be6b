"""One run: a network trained from a seeded start on a seeded order of images, and what was seen on the way."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import load_checkpoint
from ..fit import draw_order, find_status, finite, fit_steps, predict
from ..models import build
from ..norms import NORMS
from ..task import Task

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


def train(run: Run, task: Task) -> dict[str, Any]:
    """Train one network and measure it; equal arguments give equal numbers on one machine, times aside.

    Returns:
        A record for the journal: what defines the run, `status` (finished, diverged or hopeless), `seconds` of
        training, validation score and loss; for a final run also test score, curves and both modes.
    """
    network = make_network(run, task)
    x, y, lengths = task.part("train")
    sizes = find_steps(run.batch, run.images)
    order = torch.from_numpy(draw_order(len(x), run.images, run.seed))[: sum(sizes)]
    recorder = CurveRecorder(network, task, len(sizes) if run.final else 0)
    optimizer, guessing = task.make_optimizer(network, run.rate), task.guessing_loss()
    steps = fit_steps(network, x, y, order.split(sizes), optimizer, task.loss_function, lengths=lengths)
    status, step, seconds, started = "finished", 0, 0.0, time.perf_counter()
    for step, loss in enumerate(steps, 1):
        status = find_status(loss)
        wanted = status == "finished" and recorder.wants(step, loss)
        if status == "finished" and not run.final and is_hopeless(recorder.losses, len(sizes), guessing):
            status = "hopeless"
            break
        if wanted:
            seconds += time.perf_counter() - started
            recorder.look(step, sum(sizes[:step]), seconds)
            started = time.perf_counter()
    seconds += time.perf_counter() - started
    record = {**asdict(run), "status": status, "steps": step, "seen": sum(sizes[:step]), "seconds": seconds}
    return record | measure(run, recorder)


def make_network(run: Run, task: Task) -> nn.Module:
    """The network of a run in training mode, from its seed, and from the checkpoint as far as that goes."""
    torch.manual_seed(run.seed)
    network = build(run.model, NORMS[run.norm], task.data.sample_shape, task.data.classes, task.example())
    if task.checkpoint:
        load_checkpoint(network, task.checkpoint)
    return network.train()


def measure(run: Run, recorder: CurveRecorder) -> dict[str, Any]:
    """Return what is measured after training: validation, and for a final run also test, both modes and curves."""
    task, network = recorder.task, recorder.network
    record: dict[str, Any] = dict(zip(("validation_score", "validation_loss"), recorder.validate(), strict=True))
    if run.final:
        record["test_score"], record["test_loss"] = task.measure(network, task.part("test"))
        record["modes"] = compare_modes(network, task, parse_batch(run.batch)[-1])
        record["curve"], record["probed_layer"] = recorder.curve, recorder.layer
    return record


def is_hopeless(losses: list[float], steps: int, guessing: float) -> bool:
    """Whether a search run should be dropped: a quarter through, and still far worse than guessing.

    A run is dropped once, at a quarter of its steps (at least HOPELESS_STEPS), where the mean training loss of the
    last HOPELESS_STEPS steps is above HOPELESS_LOSS times the loss of guessing, where that is above 0.
    """
    if len(losses) != max(steps // 4, HOPELESS_STEPS) or not guessing > 0:
        return False
    return sum(losses[-HOPELESS_STEPS:]) / HOPELESS_STEPS > HOPELESS_LOSS * guessing


class CurveRecorder:
    """Measures a network at evenly spaced steps of its training, and leaves it as it was."""

    network: nn.Module
    task: Task
    layer: str | None
    module: nn.Module | None

    def __init__(self, network: nn.Module, task: Task, steps: int) -> None:
        self.network, self.task = network, task
        self.validation: tuple[Tensor, Tensor, Tensor | None] = task.part("validation")
        self.layer, self.module = find_last_layer(network)
        self.curve: dict[str, list[float | None]] = {
            name: [] for name in ("step", "images", "seconds", "loss", "score", "probe_mean", "probe_std")
        }
        self.steps: set[int] = {round(steps * k / CHECKPOINTS) for k in range(1, CHECKPOINTS + 1)} if steps else set()
        self.losses: list[float] = []
        if steps:
            self.look(0, 0, 0.0)

    def wants(self, step: int, loss: float) -> bool:
        """Note the loss of a step; True where the network should be measured after it."""
        self.losses.append(loss)
        return step in self.steps

    def look(self, step: int, images: int, seconds: float) -> None:
        """Add a point to the curve: mean training loss since the last point, validation score, probe."""
        loss = sum(self.losses) / len(self.losses) if self.losses else None
        self.losses = []
        mean, std = probe(self.network, self.module, self.validation)
        point = (step, images, seconds, loss, self.validate()[0], mean, std)
        for column, value in zip(self.curve.values(), point, strict=True):
            column.append(value)

    def validate(self) -> tuple[float | None, float | None]:
        """Score and loss on the validation samples."""
        return self.task.measure(self.network, self.validation)


def find_last_layer(network: nn.Module) -> tuple[str | None, nn.Module | None]:
    """The last dense or convolutional layer in order of definition: the one whose inputs are probed."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = [(name, module) for name, module in network.named_modules() if isinstance(module, kinds)]
    return found[-1] if found else (None, None)


def probe(
    network: nn.Module, layer: nn.Module | None, part: tuple[Tensor, Tensor, Tensor | None]
) -> tuple[float | None, float | None]:
    """Mean and standard deviation of a layer's inputs for the first PROBE samples, computed as in training."""
    if layer is None:
        return None, None
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    x, _, lengths = part
    try:
        predict(network, x[:PROBE], batch=PROBE, training=True, lengths=lengths)
    finally:
        hook.remove()
    return (finite(seen[-1].mean().item()), finite(seen[-1].std().item())) if seen else (None, None)


def compare_modes(network: nn.Module, task: Task, batch: int) -> dict[str, float | None]:
    """The same validation samples in training mode, in batches as in training, and in evaluation mode."""
    x, y, lengths = task.part("validation")
    whole = len(x) // batch * batch
    if not whole:
        return {}
    part = x[:whole], y[:whole], None if lengths is None else lengths[:whole]
    train_score, train_loss = task.measure(network, part, batch=batch, training=True)
    score, loss = task.measure(network, part)
    return {
        "training_score": train_score,
        "training_loss": train_loss,
        "evaluation_score": score,
        "evaluation_loss": loss,
    }
