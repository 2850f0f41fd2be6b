"""What all checks look at, each part found once and when it is first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..modules.frozen import Frozen
from ..surgery.adapters import find_adapters
from .inputs import Inputs
from .norms import find_kind, find_norms, find_plain_class
from .passes import Pass, keeping_modes, run_pass
from .structure import Surroundings, find_surroundings

NOTHING = Surroundings((), (), 0)


@dataclass(frozen=True, eq=False)
class NormFacts:
    """One norm of the model, and what can be read off it.

    Attributes:
        name: its first name.
        module: itself.
        kind: its name in the family: batch, layer ...; "" for classes outside it.
        names: all places that it stands at.
        around: what stands before and behind it.
    """

    name: str
    module: Any
    kind: str
    names: tuple[str, ...]
    around: Surroundings

    @property
    def said(self) -> str:
        """Name and class, for sentences."""
        return f"{self.name or 'the model'} ({type(self.module).__name__})"

    @property
    def path(self) -> str:
        """An expression for it, in code to paste."""
        return f"model.get_submodule({self.name!r})"

    def read(self, name: str) -> Tensor | None:
        """A parameter or buffer as flat float64 on the CPU; None where there is none, or it is lazy."""
        t = self.module._buffers.get(name)
        t = getattr(self.module, name, None) if t is None else t
        if not isinstance(t, Tensor) or nn.parameter.is_lazy(t) or t.is_meta:
            return None
        return t.detach().to("cpu", torch.float64).flatten()

    @cached_property
    def mean(self) -> Tensor | None:
        """The running mean."""
        return self.read("running_mean")

    @cached_property
    def var(self) -> Tensor | None:
        """The running variance."""
        return self.read("running_var")

    @property
    def gamma(self) -> Tensor | None:
        """The weight."""
        return self.read("weight")

    @property
    def beta(self) -> Tensor | None:
        """The bias."""
        return self.read("bias")

    @property
    def count(self) -> int | None:
        """How many batches have moved the averages."""
        t = self.read("num_batches_tracked")
        return None if t is None or not t.numel() else int(t[0])

    @property
    def has_averages(self) -> bool:
        """Whether it keeps running averages."""
        return self.mean is not None and self.var is not None and len(self.mean) > 0

    @property
    def is_trained(self) -> bool:
        """Whether something of it has moved from where it began.

        Gammas alone do not tell: residual branches begin with 0, and DCGAN's initialization draws them.
        """
        beta = self.beta
        return bool(self.count) or (beta is not None and len(beta) > 0 and bool((beta != beta[0]).any()))

    @property
    def begun(self) -> float:
        """The share of the running averages that is still the mean 0 and variance 1 that they began with; 0 if none.

        A share s of 1 in the variance leaves none below s. One that is smaller began elsewhere: with a checkpoint, or
        with the data, as after `anynorm.recalibrate`, whose counter is small too.
        """
        momentum, var = getattr(self.module, "momentum", None), self.var
        if not isinstance(momentum, float) or not 0 < momentum < 1 or not self.count or var is None:
            return 0.0
        share = (1 - momentum) ** self.count
        return 0.0 if bool((var < 0.99 * share).any()) else float(share)

    @property
    def normalizes_by_averages(self) -> bool:
        """Whether it is frozen so that it normalizes by its averages in training too."""
        return self.frozen is not None and self.frozen.statistics

    @property
    def frozen(self) -> Frozen | None:
        """What `anynorm.freeze` stopped of it."""
        state = vars(self.module).get("frozen")
        return state if isinstance(state, Frozen) else None

    @property
    def moves(self) -> bool:
        """Whether a call in its present mode moves its averages."""
        return self.has_averages and self.module.training and not (self.frozen is not None and self.frozen.updates)


class Facts:
    """What is known of a model.

    Args:
        inputs: what `diagnose` was given.
    """

    inputs: Inputs

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    @property
    def model(self) -> nn.Module:
        """The model that is examined."""
        return self.inputs.inside

    @cached_property
    def norms(self) -> list[NormFacts]:
        """Every norm, also of other packages."""
        found = find_norms(self.model)
        found |= {name: each for name, each in self.model.named_modules() if find_adapters(each) is not None}
        places: dict[int, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            places.setdefault(id(module), []).append(name)
        order = [name for name, _ in self.model.named_modules() if name in found]
        around = find_surroundings(self.model, order) if order else {}
        return [
            NormFacts(
                name,
                found[name],
                find_kind(find_plain_class(found[name])) or "",
                tuple(places[id(found[name])]),
                around.get(name, NOTHING),
            )
            for name in order
        ]

    @property
    def averaging(self) -> list[NormFacts]:
        """Those that keep running averages."""
        return [norm for norm in self.norms if norm.has_averages]

    @property
    def has_data(self) -> bool:
        """Whether there are batches."""
        return bool(self.inputs.batches)

    @cached_property
    def trains(self) -> set[str]:
        """The norms that ``model.train()`` sets to training, by name: a model's own `train` may leave some out."""
        with keeping_modes(self.model):
            self.model.train()
            return {norm.name for norm in self.norms if norm.module.training}

    @cached_property
    def evaluation(self) -> Pass:
        """The batches in evaluation."""
        return run_pass(self.inputs, training=False)

    @cached_property
    def training(self) -> Pass:
        """The batches as in training; nothing is updated."""
        return run_pass(self.inputs, training=True)

    @cached_property
    def undropped(self) -> Pass:
        """The same without dropout; the training pass itself where the model has none."""
        return run_pass(self.inputs, training=True, dropout=False) if self.drops else self.training

    @cached_property
    def drops(self) -> bool:
        """Whether the model has dropout that drops something."""
        return any(isinstance(each, nn.modules.dropout._DropoutNd) and each.p > 0 for each in self.model.modules())
