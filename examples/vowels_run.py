"""One job of the study: train a network, test it, and pad the test utterances further."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vowels_data import Utterances, load_vowels
from vowels_models import Network

BATCH, TEST_BATCH = 30, 37  # both leave no smaller last batch
HELD_OUT = 60
SIZES = (30, 60, 120)


@dataclass(frozen=True)
class Job:
    """An arm, trained once and tested on the first `tested` utterances; with `held_out` on 210 training utterances, to
    choose a rate by the other 60."""

    arm: str
    rate: float
    seed: int
    epochs: int
    tested: int = 370
    held_out: bool = False


@dataclass
class Outcome:
    """Loss and accuracy in percent, and the largest changes of logits by mode and size."""

    loss: float
    accuracy: float
    changes: dict[tuple[str, int], float] = field(default_factory=dict)
    alone: float = 0.0


def run_job(job: Job) -> Outcome:
    """Train and measure; the test utterances are not looked at where a rate is being chosen."""
    train, test = load_vowels()
    test = test.take(torch.arange(job.tested))
    if job.held_out:
        train, test = train.take(torch.arange(HELD_OUT, len(train.x))), train.take(torch.arange(HELD_OUT))
    network = fit(train, job)
    outcome = evaluate(network, test)
    if not job.held_out:
        watch_padding(network, test, outcome)
    return outcome


def fit(train: Utterances, job: Job) -> Network:
    """Adam with batches padded to their longest; weights and order depend on the seed alone."""
    torch.manual_seed(job.seed)
    network = Network(job.arm)
    optimizer = torch.optim.Adam(network.parameters(), job.rate)
    generator = torch.Generator().manual_seed(job.seed)
    for _ in range(job.epochs):
        for chosen in torch.randperm(len(train.x), generator=generator).split(BATCH):
            batch = train.take(chosen)
            loss = F.cross_entropy(network(batch.x, batch.lengths), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


@torch.no_grad()
def evaluate(network: Network, test: Utterances) -> Outcome:
    """In batches padded to their longest, as in training."""
    batches = [test.take(chosen) for chosen in torch.arange(len(test.x)).split(TEST_BATCH)]
    logits = torch.cat([network(batch.x, batch.lengths) for batch in batches])
    right = (logits.argmax(1) == test.labels).double().mean()
    return Outcome(float(F.cross_entropy(logits, test.labels)), 100 * float(right))


@torch.no_grad()
def watch_padding(network: Network, test: Utterances, outcome: Outcome) -> None:
    """Evaluation from utterances of one length without padding; training from a batch padded to its longest."""
    mixed = torch.arange(len(test.x)).split(TEST_BATCH)
    equal = [torch.nonzero(test.lengths == length)[:, 0] for length in test.lengths.unique()]
    for mode, groups in (("eval", equal), ("train", mixed)):
        network.train(mode == "train")
        for batch in map(test.take, groups):
            # Copies: in training each call moves the running averages, and single sequences are normalized by them.
            logits = deepcopy(network)(batch.x, batch.lengths)
            for size in SIZES:
                change = float((deepcopy(network)(pad(batch.x, size), batch.lengths) - logits).abs().max())
                outcome.changes[mode, size] = max(outcome.changes.get((mode, size), 0.0), change)
    batches = map(test.take, mixed)
    outcome.alone = max(change_alone(network, batch.x, batch.lengths, SIZES[-1]) for batch in batches)


def change_alone(network: Network, x: Tensor, lengths: Tensor, size: int) -> float:
    """How much the norms' own outputs change at real steps, when padding alone differs in their inputs."""
    short, long = record(network, x, lengths), record(network, pad(x, size), lengths)
    real = (torch.arange(x.shape[-1]) < lengths[:, None])[:, None]
    largest = 0.0
    for part, (before, output), (after, _) in zip(deepcopy(network).parts, short, long, strict=True):
        given = after.clone()
        given[..., : x.shape[-1]] = before.where(real, after[..., : x.shape[-1]])
        change = (part(given, lengths)[..., : x.shape[-1]] - output).where(real, 0)
        largest = max(largest, float(change.abs().max()))
    return largest


def record(network: Network, x: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Input and output of every part of a copy."""
    network = deepcopy(network)
    seen: list[tuple[Tensor, Tensor]] = []
    for part in network.parts:
        part.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    network(x, lengths)
    return seen


def pad(x: Tensor, size: int) -> Tensor:
    """(N, C, L) with zeros behind, as many steps as `size`."""
    return F.pad(x, (0, size - x.shape[-1]))
