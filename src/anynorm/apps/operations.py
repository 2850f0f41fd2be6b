"""`anynorm fold`, `convert` and `freeze`: an operation on a model, its proof, and the weights after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from anynorm.apps.models.load import load_model
from anynorm.apps.terminal import open_console
from anynorm.apps.weights import check_target, load_weights, write_weights
from anynorm.surgery.report import SurgeryReport


@dataclass(frozen=True)
class Files:
    """What a command reads and writes.

    Attributes:
        model: as for `anynorm try`.
        weights: loaded into it first; None for those that the factory gives.
        out: where the state_dict goes; None for nowhere.
        force: write over a file that is there.
    """

    model: str
    weights: str | None
    out: Path | None
    force: bool = False


def perform(name: str, files: Files, operation: Callable[..., SurgeryReport], **options: Any) -> None:
    """Load a model, change it, print what was done and proved, and write its weights.

    Args:
        name: of the command, for messages.
        files: see above.
        operation: takes the model in evaluation mode, an example and `options`.
    """
    if files.out is not None:
        check_target(f"{name} --out", files.out, files.force)
    loaded = load_model(files.model)
    model: nn.Module = loaded.model.eval()
    if files.weights is not None:
        load_weights(f"{name} --weights", model, files.weights)
    example = loaded.call.args or dict(loaded.call.kwargs)
    report = operation(model, example=example, **options)
    console = open_console()
    made_up = " (made up; let the factory return (model, example))" if loaded.guessed else ""
    console.print(f"{files.model}, on an example of {loaded.call.describe()}{made_up}", markup=False, highlight=False)
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    if files.out is not None:
        write_weights(f"{name} --out", report.model, files.out, files.force)
        console.print(f"wrote {files.out}", markup=False, highlight=False)
