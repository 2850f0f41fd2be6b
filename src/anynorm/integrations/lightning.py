"""Lightning callbacks: `Recalibrate` gives batch norms the statistics of the weights that they are evaluated with, and
`Monitor` watches the norms of a module while it trains."""

from __future__ import annotations

from collections.abc import Iterable
from math import isinf
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from ..doctor.monitor import monitor
from ..surgery.recalibration.recalibrate import recalibrate
from .measuring import Moved, check_batch_norms, evaluating


class Recalibrate(Callback):
    """Calls `anynorm.recalibrate` when training ends, and before validations where asked.

    Behind `WeightAveraging` or `StochasticWeightAveraging` in the list of callbacks it sees the averaged weights.

    Args:
        validation: also before every validation during training.
        loader: its batches instead of those of the trainer's training loader.
        **options: as of `anynorm.recalibrate`; ``batches`` is the trainer's limit if not given.
    """

    validation: bool
    loader: Iterable[Any] | None
    options: dict[str, Any]

    def __init__(self, validation: bool = False, loader: Iterable[Any] | None = None, **options: Any) -> None:
        self.validation, self.loader, self.options = validation, loader, options

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_batch_norms(pl_module)
        later = trainer.callbacks[trainer.callbacks.index(self) :]
        behind = [each for each in later if isinstance(each, (WeightAveraging, StochasticWeightAveraging))]
        if behind:
            raise ValueError(
                f"Recalibrate: it must come behind {type(behind[0]).__name__} in callbacks; got it before; swap them"
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.validation and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.run(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run(trainer, pl_module)
        for each in trainer.callbacks:  # Whose copy is what `trainer.save_checkpoint` writes from now on.
            if isinstance(each, WeightAveraging) and each._average_model is not None:
                each._average_model.module.load_state_dict(pl_module.state_dict())

    def run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        limit = trainer.num_training_batches
        options = {"batches": None if self.loader is not None or isinf(limit) else int(limit)} | self.options

        def move(batch: Any) -> Any:
            batch = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
            return trainer.strategy.batch_to_device(batch)

        batches = Moved(trainer.train_dataloader if self.loader is None else self.loader, move)
        with evaluating(pl_module), trainer.precision_plugin.forward_context():
            recalibrate(pl_module, batches, **options)


class Monitor(Callback):
    """`anynorm.Monitor` from the start of training to its end; a step is a batch, and its forward ends at backward.

    Args:
        file: as of `anynorm.Monitor`; a second `fit` wants another one, or ``overwrite=True``.
        every: batches from one measured batch to the next.
        writer: as of `anynorm.Monitor`; True for that of the trainer's TensorBoardLogger.
        **options: as of `anynorm.Monitor`.

    Attributes:
        monitor: of the present or last training; None before.
    """

    monitor: monitor.Monitor | None

    def __init__(self, file: str | Path | None = None, every: int = 50, *, writer: Any = None, **options: Any) -> None:
        self.file, self.every, self.writer, self.options = file, every, writer, options
        self.monitor = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writer = getattr(trainer.logger, "experiment", None) if self.writer is True else self.writer
        if self.writer is True and not hasattr(writer, "add_scalar"):
            raise ValueError(
                f"Monitor: writer=True needs a TensorBoardLogger; got {type(trainer.logger).__name__}; pass a writer"
            )
        self.monitor = monitor.Monitor(pl_module, self.file, self.every, writer=writer, manual=True, **self.options)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if self.monitor is not None:
            self.monitor.begin_step()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        if self.monitor is not None:
            self.monitor.end_forward()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if self.monitor is not None:  # a step may have had no backward
            self.monitor.end_forward()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is not None:
            self.monitor.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.monitor is not None:
            self.monitor.close()
