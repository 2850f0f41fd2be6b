"""`Recalibrate`: a Lightning callback that gives batch norms the statistics of the weights they are evaluated with."""

from __future__ import annotations

from collections.abc import Iterable
from math import isinf
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

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
