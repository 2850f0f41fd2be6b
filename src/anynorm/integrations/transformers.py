"""Callbacks of transformers' Trainer: `Recalibrate` gives batch norms the statistics of the weights that they have, and
`Monitor` watches the norms of a model while it trains."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..doctor.monitor import monitor
from ..surgery.recalibration.recalibrate import recalibrate
from .measuring import check_batch_norms, evaluating


class Recalibrate(TrainerCallback):
    """Calls `anynorm.recalibrate` when training ends, and before evaluations and checkpoints where asked.

    At the end it is the best checkpoint's weights that are measured, where the Trainer loads those.

    Args:
        validation: also before every evaluation and checkpoint during training.
        loader: its batches instead of those of the Trainer's training loader.
        **options: as of `anynorm.recalibrate`.
    """

    validation: bool
    loader: Iterable[Any] | None
    options: dict[str, Any]

    def __init__(self, validation: bool = False, loader: Iterable[Any] | None = None, **options: Any) -> None:
        self.validation, self.loader, self.options = validation, loader, options

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **now: Any) -> None:
        """Faults of a long training's end are said before it begins."""
        check_batch_norms(now["model"])
        if self.validation and self.loader is None and "steps" in (args.eval_strategy, args.save_strategy):
            raise ValueError(
                "Recalibrate: the training loader must not be read anew within an epoch; got validation=True with "
                "evaluations or checkpoints by steps; pass loader=, or eval_strategy and save_strategy 'epoch'"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **now: Any) -> None:
        if self.validation and self.loader is not None and (control.should_evaluate or control.should_save):
            self.run(now)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **now: Any) -> None:
        if self.validation and (control.should_evaluate or control.should_save):
            self.run(now)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **now: Any) -> None:
        self.run(now)

    def run(self, now: dict[str, Any]) -> None:
        """The Trainer's loader moves its batches to the device itself."""
        loader = now["train_dataloader"] if self.loader is None else self.loader
        with evaluating(now["model"]):
            recalibrate(now["model"], loader, **self.options)


class Monitor(TrainerCallback):
    """`anynorm.Monitor` from the start of training to its end; a step is a forward of the model, of which gradient
    accumulation has several for each step of the Trainer.

    Args:
        file: as of `anynorm.Monitor`; a second `train` wants another one, or ``overwrite=True``.
        every: forwards from one measured forward to the next.
        **options: as of `anynorm.Monitor`.

    Attributes:
        monitor: of the present or last training; None before.
    """

    monitor: monitor.Monitor | None

    def __init__(self, file: str | Path | None = None, every: int = 50, **options: Any) -> None:
        self.file, self.every, self.options = file, every, options
        self.monitor = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **now: Any) -> None:
        self.monitor = monitor.Monitor(now["model"], self.file, self.every, **self.options)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **now: Any) -> None:
        if self.monitor is not None:
            self.monitor.close()
