"""What a comparison starts from: its task, the plan with what cannot exist left out, and the facts that identify it."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from anynorm.errors import UserError

from ..checkpoint import find_digest, load_checkpoint, read_checkpoint, say_checkpoint
from ..data import load_data
from ..describe import find_machine, find_versions
from ..guessing import find_metric
from ..task import LOSS_TAKES, METRIC_TAKES, OPTIMIZER_TAKES, Task, split_direction
from ..user_code import find_fingerprint
from .options import Options
from .plan import Plan
from .train import Run, make_network, parse_batch

if TYPE_CHECKING:
    from ..models import Model


def load_task(options: Options) -> Task:
    """Return the data with the loss, metric, optimizer and checkpoint that were asked for, each looked up once."""
    data = load_data(options.data, options.reading)
    return Task(data, options.loss, options.metric, options.optimizer, options.checkpoint)


def prepare(options: Options, task: Task) -> tuple[Plan, dict[str, Any]]:
    """Return the plan with what cannot exist left out, and what identifies and describes the study."""
    from ..models import find_model
    from .check import find_impossible

    data, functions = task.data, find_functions(task)
    models = [find_model(name, data.sample_shape, data.classes, task.example()) for name in options.models]
    check_sizes(options, task)
    plan = Plan(
        options.models, options.norms, options.batches, options.rates, options.seeds, options.images,
        higher=not task.metric or split_direction(task.metric)[1],
    )  # fmt: skip
    plan.impossible.update(find_impossible(plan, task))
    if not plan.cells:
        reasons = "; ".join(dict.fromkeys(plan.impossible.values()))
        raise UserError(f"compare: nothing can be run, because {reasons}; change --model, --norms or --data.")
    context = describe_study(options, task, models, functions)
    return plan, context | {"start": find_start(plan, task)}


def find_functions(task: Task) -> dict[str, str]:
    """Return what identifies the user's functions and checkpoint; a bad one raises a UserError."""
    own = {
        "loss": ("--loss", task.loss, LOSS_TAKES),
        "metric": ("--metric", split_direction(task.metric)[0], METRIC_TAKES),
        "optimizer": ("--optimizer", task.optimizer, OPTIMIZER_TAKES),
    }
    found = {name: find_fingerprint(*rest) for name, rest in own.items() if rest[1]}
    if task.metric:
        found["direction"] = str(split_direction(task.metric)[1])
    if task.checkpoint:
        read_checkpoint(task.checkpoint)
        found["checkpoint"] = find_digest(task.checkpoint)
    return found


def find_start(plan: Plan, task: Task) -> list[str]:
    """Return what was loaded from a checkpoint, a sentence for each network; nothing loaded raises a UserError."""
    said = []
    for model in plan.models if task.checkpoint else ():
        arms = {norm: batch for name, batch, norm in plan.cells if name == model}
        loaded = {
            norm: load_checkpoint(make_network(Run(model, norm, batch, 0.0, 0, 0, False), task), task.checkpoint)
            for norm, batch in arms.items()
        }
        if loaded and not any(found.loaded for found in loaded.values()):
            first = next(iter(loaded.values()))
            raise UserError(
                f"compare --checkpoint: nothing in {task.checkpoint!r} has a name and shape of {model!r}; it holds "
                f"{', '.join(first.not_taken[:3])}, and the network {', '.join(first.not_given[:3])}."
            )
        if loaded:
            said.append(f"{model}: {say_checkpoint(task.checkpoint, loaded)}")
    return said


def check_sizes(options: Options, task: Task) -> None:
    """Raise where a batch does not fit in the training samples, or a run has too few images for its batches."""
    sizes = [size for batch in options.batches for size in parse_batch(batch)]
    samples = len(task.data.train_x)
    if max(sizes) > samples:
        raise UserError(
            f"compare --batch-sizes: a batch must fit in the {samples:,} training samples of "
            f"{options.data!r}; got {max(sizes)}; try a smaller size."
        )
    least = max(sum(parse_batch(batch)) if ":" in batch else int(batch) for batch in options.batches)
    if options.images < 2 * max(sizes) or options.images < least:
        raise UserError(
            f"compare --images: a run must have 2 batches of the largest size at least; got {options.images} images "
            f"with batch {max(sizes)}; try --images {16 * max(sizes)}."
        )


def describe_study(options: Options, task: Task, models: list[Model], functions: dict[str, str]) -> dict[str, Any]:
    """Return the facts for the journal and the report; runs of an equal `configuration` belong to one study."""
    versions, data = find_versions(), task.data
    fingerprints = {model.name: model.fingerprint for model in models}
    identity = {
        "data": data.fingerprint,
        "models": fingerprints,
        "functions": functions,
        "versions": {name: versions[name] for name in ("anynorm", "torch")},
        "options": [options.norms, options.batches, options.rates, options.seeds, options.images],
    }
    return {
        "configuration": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        "data": data.fingerprint,
        "data_sizes": [len(data.train_x), len(data.validation_x), len(data.test_x)],
        "functions": functions,
        "metric": find_metric(task),
        "learned": {**task.describe(), "kind": data.kind, "targets": data.about},
        "sample_shape": list(data.sample_shape),
        "classes": data.classes,
        "models": fingerprints,
        "about": {model.name: model.about for model in models},
        "versions": versions,
        "machine": find_machine(),
    }
