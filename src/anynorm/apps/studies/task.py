"""A task: data with the loss, the metric and the optimizer that go with them; it is sent to the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from anynorm.errors import UserError

from .data import Data
from .fit import MOMENTUM, Loss, finite, predict
from .metrics import Metric, accuracy, explained, mean_auc
from .user_code import describe, find_function

Score = Callable[[Tensor, Tensor], float]

LOSS_TAKES = "module:function of (outputs, targets) that returns one number, as in torch.nn.functional:l1_loss"
METRIC_TAKES = LOSS_TAKES + "; where lower is better, module:function:lower"
OPTIMIZER_TAKES = "module:function of (parameters, rate) that returns an optimizer, as in torch.optim:AdamW"
DEFAULTS: dict[str, tuple[str, Loss, Metric, Score]] = {
    "classes": ("cross-entropy", functional.cross_entropy, Metric("accuracy"), accuracy),
    "labels": (
        "binary cross-entropy",
        functional.binary_cross_entropy_with_logits,
        Metric("mean AUC", guessing=50.0),
        mean_auc,
    ),
    "values": ("mean squared error", functional.mse_loss, Metric("R²", weight=0.0), explained),
}


@dataclass(frozen=True)
class Task:
    """What a network learns, and how it is trained and measured.

    Attributes:
        data: in three parts.
        loss, metric, optimizer: the user's own as `module:function`; where empty, those of the kind of targets and SGD.
        checkpoint: file of weights that every network starts from; where empty, none.
    """

    data: Data
    loss: str = ""
    metric: str = ""
    optimizer: str = ""
    checkpoint: str = ""

    def part(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x, y, lengths or None) of `train`, `validation` or `test`."""
        place = ("train", "validation", "test").index(name)
        lengths = torch.from_numpy(self.data.lengths[place]) if self.data.lengths else None
        x, y = getattr(self.data, f"{name}_x"), getattr(self.data, f"{name}_y")
        return torch.from_numpy(x), torch.from_numpy(y), lengths

    def example(self, size: int = 2) -> tuple[Tensor, ...]:
        """Arguments of a call of a network with the first training samples."""
        x, _, lengths = self.part("train")
        return (x[:size],) if lengths is None else (x[:size], lengths[:size])

    @property
    def loss_function(self) -> Loss:
        """The loss that is trained."""
        own = find_function("--loss", self.loss, LOSS_TAKES)[0] if self.loss else None
        found = own or DEFAULTS[self.data.kind][1]
        return lambda outputs, y: found(align(outputs, y), y)

    @property
    def score_function(self) -> Score:
        """What a network is judged by; the user's own gets values in the units of the file."""
        if not self.metric:
            default = DEFAULTS[self.data.kind][3]
            return lambda outputs, y: default(align(outputs, y), y)
        function = find_function("--metric", split_direction(self.metric)[0], METRIC_TAKES)[0]
        return lambda outputs, y: float(function(self.restore(align(outputs, y)).detach(), self.restore(y)))

    def restore(self, values: Tensor) -> Tensor:
        """Values in the units of the file; classes and labels as they are."""
        if not self.data.y_std:
            return values
        return values * torch.tensor(self.data.y_std) + torch.tensor(self.data.y_mean)

    def make_optimizer(self, network: nn.Module, rate: float) -> torch.optim.Optimizer | float:
        """The user's optimizer, or the rate of SGD with momentum."""
        if not self.optimizer:
            return rate
        found: torch.optim.Optimizer = find_function("--optimizer", self.optimizer, OPTIMIZER_TAKES)[0](
            network.parameters(), rate
        )
        return found

    def measure(
        self, network: nn.Module, part: tuple[Tensor, Tensor, Tensor | None], **options: Any
    ) -> tuple[float | None, float | None]:
        """(score, loss) on samples, None where they are no number; `options` go to `predict`."""
        x, y, lengths = part
        with torch.no_grad():
            outputs = predict(network, x, lengths=lengths, **options)
            return finite(self.score_function(outputs, y)), finite(float(self.loss_function(outputs, y)))

    def guessing_loss(self) -> float:
        """The loss of outputs that are all 0, for the training targets: of equal chances, or of the mean."""
        _, y, _ = self.part("train")
        with torch.no_grad():
            return float(self.loss_function(torch.zeros(len(y), self.data.classes), y))

    def describe(self) -> dict[str, str]:
        """Loss and optimizer in words."""
        return {
            "loss": self.loss or DEFAULTS[self.data.kind][0],
            "optimizer": f"{self.optimizer}(parameters, rate)"
            if self.optimizer
            else f"plain SGD with momentum {MOMENTUM}, no weight decay",
        }


def align(outputs: Tensor, y: Tensor) -> Tensor:
    """Outputs of shape (N,) as (N, 1) where targets are: subtracting one from the other would give (N, N)."""
    return outputs[:, None] if outputs.dim() == 1 and y.dim() == 2 and y.shape[1] == 1 else outputs


def split_direction(spec: str) -> tuple[str, bool]:
    """(module:function, whether higher is better) of a metric."""
    if spec.endswith(":lower"):
        return spec.removesuffix(":lower"), False
    return spec.removesuffix(":higher"), True


def check_functions(task: Task, outputs: Tensor, y: Tensor) -> None:
    """Raise where the user's loss or metric does not give one number for outputs of their network."""
    for option, spec in (("--loss", task.loss), ("--metric", task.metric)):
        if not spec:
            continue
        try:
            found = (task.loss_function if option == "--loss" else task.score_function)(outputs, y)
            number = float(found.detach() if isinstance(found, Tensor) else found)
        except UserError:
            raise
        except Exception as problem:
            raise UserError(
                f"compare {option}: {spec!r} fails on outputs of shape {tuple(outputs.shape)} and targets of shape "
                f"{tuple(y.shape)}, {str(y.dtype).removeprefix('torch.')} ({describe(problem)}); it must take both and "
                f"return one number."
            ) from problem
        if option == "--loss" and not (isinstance(found, Tensor) and found.requires_grad):
            raise UserError(
                f"compare --loss: {spec!r} must return a tensor with a gradient; it returned {number:.4g} without; "
                f"compute it with torch from the outputs."
            )


def check_optimizer(task: Task, parameters: Iterable[nn.Parameter]) -> None:
    """Raise where the user's optimizer cannot be made."""
    if not task.optimizer:
        return
    function = find_function("--optimizer", task.optimizer, OPTIMIZER_TAKES)[0]
    try:
        made = function(list(parameters), 0.01)
    except Exception as problem:
        raise UserError(
            f"compare --optimizer: {task.optimizer!r} fails when called with (parameters, rate) ({describe(problem)}); "
            f"let it take both."
        ) from problem
    if not isinstance(made, torch.optim.Optimizer):
        raise UserError(
            f"compare --optimizer: takes {OPTIMIZER_TAKES}; {task.optimizer!r} returned a {type(made).__name__}."
        )
