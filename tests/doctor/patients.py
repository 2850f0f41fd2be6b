"""What the cases of the ward have in common: small data, small networks, and how harm is measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import anynorm


@dataclass
class Patient:
    """What `diagnose` is given."""

    model: nn.Module
    loader: Any = None
    optimizer: torch.optim.Optimizer | None = None
    loss_fn: Callable[[Any, Any], Any] | None = F.cross_entropy
    forward_fn: Callable[[nn.Module, Any], Any] | None = None

    def diagnose(self, check: str | None = None, **options: Any) -> anynorm.Diagnosis:
        """With one check, or with all."""
        checks = None if check is None else [check]
        return anynorm.diagnose(
            self.model, self.loader, self.optimizer, self.loss_fn, forward_fn=self.forward_fn, checks=checks, **options
        )

    def copy(self) -> Patient:
        """Another of the same; the optimizer's parameters stay the model's."""
        memo: dict[int, Any] = {id(self.loader): self.loader}
        return copy.deepcopy(self, memo)


Maker = Callable[[int], Patient]


@dataclass(frozen=True)
class Case:
    """One check's: who has the disease, and who only looks like it.

    Attributes:
        check: its id.
        layer: that must be named.
        sick: makes the one who has it, from a seed.
        lookalikes: those that have it not, by what they are.
        no_repair: why there is none.
        harm: a number that the repair must lower; the loss in evaluation unless the case has its own.
        template: why the code to paste is not complete as it is; `names` then completes it.
        names: what it speaks of beside model, loader, optimizer and loss_fn.
    """

    check: str
    layer: str
    sick: Maker
    lookalikes: Mapping[str, Maker]
    no_repair: str = ""
    harm: Callable[[Patient], float] | None = None
    template: str = ""
    names: Mapping[str, Any] = field(default_factory=dict)


def make_blobs(size: int = 512, scale: float = 1.0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Four classes of points in eight dimensions, from the present state of the generator."""
    centres = 2 * torch.randn(4, 8)
    y = torch.randint(4, (size,))
    return scale * (centres[y] + torch.randn(size, 8) + shift), y


def load(x: Tensor, y: Tensor | None = None, size: int = 32, **options: Any) -> DataLoader[Any]:
    """Shuffled batches."""
    return DataLoader(TensorDataset(x, x[:, 0] if y is None else y), size, **{"shuffle": True, **options})


def make_mlp(norm: Callable[[], nn.Module] | None = None, bias: bool = False) -> nn.Sequential:
    """A layer, the norm, an activation and a head: the norm's name is 1."""
    made = nn.BatchNorm1d(16) if norm is None else norm()
    return nn.Sequential(nn.Linear(8, 16, bias=bias), made, nn.ReLU(), nn.Linear(16, 4))


def make_cnn(*behind: nn.Module, norm: nn.Module | None = None) -> nn.Sequential:
    """A convolution of images (1, 8, 8), the norm, whose name is 1, what stands behind it, and a head."""
    made = nn.BatchNorm2d(8) if norm is None else norm
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), made, *(behind or (nn.ReLU(),)), *pooled)


def make_images(size: int = 256) -> tuple[Tensor, Tensor]:
    """Four classes of noisy images (1, 8, 8)."""
    y = torch.randint(4, (size,))
    patterns = torch.randn(4, 1, 8, 8)
    return patterns[y] + 0.5 * torch.randn(size, 1, 8, 8), y


def train(
    model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer, loss_fn: Callable[[Any, Any], Tensor], steps: int
) -> None:
    """In the usual way."""
    model.train()
    while steps > 0:
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
            if (steps := steps - 1) == 0:
                return


def make_patient(
    seed: int,
    build: Callable[[], nn.Module] = make_mlp,
    after: Callable[[Any], object] | None = None,
    *,
    data: Callable[[], tuple[Tensor, Tensor]] = make_blobs,
    steps: int = 45,
    **options: Any,
) -> Patient:
    """A model that is built, trained and then changed.

    Args:
        seed: of everything.
        build: makes the model.
        after: changes it when it is trained.
        data: makes (x, y).
        steps: of SGD.
        options: of the loader.
    """
    torch.manual_seed(seed)
    x, y = data()
    loader, model = load(x, y, **options), build()
    optimizer = torch.optim.SGD(anynorm.param_groups(model, 1e-4), lr=0.05, momentum=0.9)
    train(model, loader, optimizer, F.cross_entropy, steps)
    optimizer.zero_grad()
    if after is not None:
        with torch.no_grad():
            after(model)
    return Patient(model, loader, optimizer)


def find_loss(patient: Patient) -> float:
    """In evaluation, over the loader; infinite where it is NaN."""
    model = copy.deepcopy(patient.model).eval()
    assert patient.loss_fn is not None
    with torch.no_grad():
        found = sum(float(patient.loss_fn(model(x), y)) for x, y in patient.loader) / len(patient.loader)
    return found if found == found else float("inf")


def find_norm(patient: Patient) -> Any:
    """The first that keeps running averages."""
    return next(module for module in patient.model.modules() if getattr(module, "running_mean", None) is not None)


def find_gradient(patient: Patient) -> float:
    """How much gradient the first parameter lacks: less than 0 where it has some."""
    model = copy.deepcopy(patient.model)
    x, y = next(iter(patient.loader))
    F.cross_entropy(model(x), y).backward()
    first = next(model.parameters()).grad
    assert first is not None
    return -float(first.abs().max()) if float(first.abs().max()) > 1e-6 else 0.0


def find_dependence(patient: Patient) -> float:
    """How far the output of a sample moves with other batch mates, in the mode that the model is in."""
    model = copy.deepcopy(patient.model)
    x, _ = next(iter(patient.loader))
    with torch.no_grad():
        one = model(x)[0]
        return float((model(torch.cat((x[:1], 3 * x[1:] + 1)))[0] - one).abs().max() / one.abs().max())


def find_movement(patient: Patient) -> float:
    """How far the running mean moves with a batch in training."""
    patient = Patient(copy.deepcopy(patient.model).train(), patient.loader)
    norm = find_norm(patient)
    before = norm.running_mean.clone()
    patient.model(next(iter(patient.loader))[0])
    return float((norm.running_mean - before).abs().max())


def count_parameters(patient: Patient) -> float:
    """Of the model."""
    return float(sum(p.numel() for p in patient.model.parameters()))
