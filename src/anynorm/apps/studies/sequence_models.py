"""Networks for padded sequences, whose norms count the padding or do not, and what further padding does to them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import anynorm

from .fit import finite, untouched
from .norms import NORMS

WIDTH = 32
EVALUATION_BATCH = 37  # sequences; leaves no smaller last batch of 370
MOST = 90  # steps to which sequences are padded further


class ByLengths(nn.Module):
    """A norm between convolutions, (N, C, L), that is told the lengths: its output is 0 at padding."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if isinstance(self.norm, nn.Identity):
            return x.where(find_real(x, lengths), 0)
        if isinstance(self.norm, anynorm.LayerNorm):
            y: Tensor = self.norm(x.mT, lengths=lengths).mT
        else:
            y = self.norm(x, lengths=lengths)
        return y


class ByPadding(nn.Module):
    """A norm between convolutions, (N, C, L), that takes padding for steps."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


class Gru(nn.Module):
    """A GRU with a norm inside, (N, C, L); "counted" is batch norm over all steps, those of the padding too."""

    def __init__(self, channels: int, norm: str | None, steps: int) -> None:
        super().__init__()
        self.counted: bool = norm == "counted"
        kind = "batch-sequence" if self.counted else norm
        most = steps if norm == "batch-per-step" else None
        self.gru: nn.GRU = anynorm.GRU(channels, WIDTH, batch_first=True, norm=kind, max_steps=most)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        output, _ = self.gru(x.mT, lengths=None if self.counted else lengths)
        y: Tensor = output.mT
        return y


class SequenceNetwork(nn.Module):
    """Two convolutions of 5 steps with norms, or a GRU; the mean of the real steps; a dense output.

    Args:
        sample_shape: (channels, most steps).
        classes: outputs.
        norm: makes a module of (x, lengths) for a convolution's output; or what norm a GRU has inside, see `Gru`.
    """

    def __init__(self, sample_shape: tuple[int, ...], classes: int, norm: Callable[[], nn.Module] | str | None) -> None:
        super().__init__()
        channels, steps = sample_shape
        sizes = (channels, WIDTH, WIDTH) if callable(norm) else ()
        self.convolutions: nn.ModuleList = nn.ModuleList(nn.Conv1d(a, b, 5, padding=2) for a, b in pairwise(sizes))
        for convolution in self.convolutions:
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")  # type: ignore[arg-type]
        parts = [norm() for _ in self.convolutions] if callable(norm) else [Gru(channels, norm, steps)]
        self.parts: nn.ModuleList = nn.ModuleList(parts)
        self.head: nn.Linear = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(N, C, L) and (N,) to logits (N, classes)."""
        if not self.convolutions:
            x = self.parts[0](x, lengths)
        for convolution, norm in zip(self.convolutions, self.parts):
            x = norm(convolution(x), lengths).relu()
        # Cut at the longest: a sum over more zeros is rounded in another order.
        x = x[..., : int(lengths.max())]
        y: Tensor = self.head(x.where(find_real(x, lengths), 0).sum(-1) / lengths[:, None])
        return y


class Reader(nn.Module):
    """A network as studies train it, which is called with the numbers of its samples: (N,) to logits.

    Args:
        network: takes (N, C, L) and lengths.
        x: all sequences, (N, C, L), 0 at padding.
        lengths: of each.
        most: batches are padded to a random length from their longest to this; to their longest where None.
        seed: of those lengths.
    """

    network: SequenceNetwork
    x: Tensor
    lengths: Tensor
    most: int | None

    def __init__(
        self, network: SequenceNetwork, x: Tensor, lengths: Tensor, most: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.network, self.x, self.lengths, self.most = network, x, lengths, most
        self.generator: np.random.Generator = np.random.default_rng([seed, 3])

    def forward(self, chosen: Tensor) -> Tensor:
        x, lengths = self.take(chosen)
        if self.most is not None:
            x = pad(x, int(self.generator.integers(x.shape[2], self.most, endpoint=True)))
        y: Tensor = self.network(x, lengths)
        return y

    def take(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Some sequences, padded to their longest, and their lengths."""
        lengths = self.lengths[chosen]
        return self.x[chosen, :, : int(lengths.max())].contiguous(), lengths


def find_real(x: Tensor, lengths: Tensor) -> Tensor:
    """Which steps of (N, C, L) are there, (N, 1, L)."""
    return (torch.arange(x.shape[-1]) < lengths[:, None])[:, None]


def pad(x: Tensor, size: int) -> Tensor:
    """(N, C, L) with zeros behind, as many steps as `size`."""
    return functional.pad(x, (0, size - x.shape[-1]))


def choose_norm(norm: str) -> Callable[[], nn.Module]:
    """What makes a norm for convolutions: "counted" and "masked" batch norm, "layer" of each step, "none"."""
    if norm == "counted":
        return lambda: ByPadding(NORMS["batch"](WIDTH, 1))
    if norm == "layer":
        return lambda: ByLengths(anynorm.LayerNorm(WIDTH))
    return lambda: ByLengths(NORMS["batch" if norm == "masked" else norm](WIDTH, 1))


def watch_padding(reader: Reader) -> dict[str, float | None]:
    """The largest change of a logit when sequences are padded further, in both modes; and of the norms alone.

    Evaluation is held against sequences of one length without padding, training against batches padded to their
    longest. None stands for a change that is not finite.
    """
    mixed = torch.arange(len(reader.x)).split(EVALUATION_BATCH)
    equal = [torch.nonzero(reader.lengths == length)[:, 0] for length in reader.lengths.unique()]
    changes: dict[str, float | None] = {}
    with untouched(reader.network):
        for mode, groups in (("evaluation", equal), ("training", mixed)):
            reader.network.train(mode == "training")
            changes[mode] = finite(max(change_logits(reader.network, *reader.take(chosen)) for chosen in groups))
        changes["alone"] = finite(max(change_alone(reader.network, *reader.take(chosen)) for chosen in mixed))
    return changes


def change_logits(network: SequenceNetwork, x: Tensor, lengths: Tensor) -> float:
    """How much the logits change when a batch is padded further."""
    # Copies: in training each call moves running averages, and single sequences are normalized by them.
    return find_largest(deepcopy(network)(pad(x, MOST), lengths) - deepcopy(network)(x, lengths))


def change_alone(network: SequenceNetwork, x: Tensor, lengths: Tensor) -> float:
    """How much the norms' own outputs change at real steps, when padding alone differs in their inputs.

    Of a GRU it is the whole layer, which has the norm inside.
    """
    short, long = record_parts(network, x, lengths), record_parts(network, pad(x, MOST), lengths)
    real, steps = find_real(x, lengths), x.shape[-1]
    largest = 0.0
    for part, (before, output), (after, _) in zip(deepcopy(network).parts, short, long, strict=True):
        given = after.clone()
        given[..., :steps] = before.where(real, after[..., :steps])
        largest = max(largest, find_largest((part(given, lengths)[..., :steps] - output).where(real, 0)))
    return largest


def record_parts(network: SequenceNetwork, x: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Input and output of every part of a copy."""
    network = deepcopy(network)
    seen: list[tuple[Tensor, Tensor]] = []
    for part in network.parts:
        part.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    network(x, lengths)
    return seen


def find_largest(difference: Tensor) -> float:
    """The largest magnitude, infinite where one is no number."""
    return float(difference.abs().nan_to_num(torch.inf).max())
