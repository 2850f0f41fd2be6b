"""Does a sample's output depend on its batch mates, or on padding, where it should not?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn

from ...modules.norm import Norm
from ...surgery.recalibration.data import find_device, move
from ..call import Call
from ..causes import find_padding
from ..check import Check, Finding, Repair
from ..dependence import Finding as Dependence
from ..dependence import find_batch_dependence, find_padding_dependence
from ..facts import Facts, NormFacts
from ..outputs import find_outputs
from .repairs import make_recalibration


class LeakBetweenSamples(Check):
    id = "samples-leak"
    title = "in evaluation a sample's output depends on its batch mates"
    severity = "error"
    needs = "data"
    fault = (
        "A batch norm without running averages (track_running_stats=False) uses the batch in evaluation, too: "
        "predictions change with what else is in the batch, and a single sample gives beta or an error."
    )
    evidence = (
        "The other samples of a batch are replaced, and the change of the first one's output is measured, in "
        "float64 where the model allows it; with the norms' statistics held fixed, what remains is not theirs."
    )
    cure = "give the norm running averages, and find them from data"
    threads = ("pytorch#20967", "pytorch#44415")

    def run(self, facts: Facts) -> Iterator[Finding]:
        call = find_call(facts)
        culprits = [norm for norm in facts.norms if norm.kind == "batch" and not norm.has_averages]
        if call is None or not culprits or facts.evaluation.problem or not moves_with_mates(facts.model, call):
            return  # in float32 nothing is to be seen: the search in float64 would take long
        found = next(iter(find_batch_dependence(facts.model, call)), None)
        if found is None or not found.depends:
            return
        # Where no norm does it, the first axis may be no batch: a model of sequences may take time first.
        for norm in culprits:
            share = describe_remaining(found)
            yield self.find(
                norm.name,
                f"{norm.said}: the output of a sample moves by {found.change:.2g} of the largest with other batch "
                f"mates{share}",
                repair=make_tracking(facts, norm),
                change=found.change or 0.0,
                remaining=-1.0 if found.remaining is None else found.remaining,
            )


def find_call(facts: Facts) -> Call | None:
    """The first batch as a call; None where only the user's forward_fn knows how."""
    if facts.inputs.forward_fn is not None:
        return None
    batch = move(facts.inputs.batches[0], find_device(facts.model))
    if isinstance(batch, dict):
        return Call((), batch)
    first = batch[0] if type(batch) in (tuple, list) and batch else batch
    return Call((first,)) if isinstance(first, torch.Tensor) else None


def moves_with_mates(model: nn.Module, call: Call) -> bool:
    """Whether the first sample's output is another one beside other samples, by more than rounding."""
    twice = call.change(lambda t: t[[0, *range(len(t) - 1)]] if t.dim() and len(t) > 1 else t)
    one, other = (find_outputs(model, each, training=False) for each in (call, twice))
    pairs = [(a[:1], b[:1]) for a, b in zip(one, other, strict=False) if a.dim() and a.shape == b.shape and len(a)]
    return any(float((a - b).abs().max()) > 1e-4 * float(a.abs().max()) for a, b in pairs)


def describe_remaining(found: Dependence) -> str:
    return "; all of it through the norms" if found.only_norms else ""


def make_tracking(facts: Facts, norm: NormFacts) -> Repair | None:
    """Averages where there were none, found from the batches."""
    module: Any = norm.module
    if not isinstance(module, (nn.modules.batchnorm._BatchNorm, Norm)):
        return None

    def perform() -> None:
        size, device = norm.module.num_features, find_device(facts.model)
        module.track_running_stats = True
        module.register_buffer("running_mean", torch.zeros(size, dtype=torch.float32, device=device))
        module.register_buffer("running_var", torch.ones(size, dtype=torch.float32, device=device))
        module.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))

    code = (
        f"norm = {norm.path}\nnorm.track_running_stats = True\n"
        "norm.register_buffer('running_mean', torch.zeros(norm.num_features))\n"
        "norm.register_buffer('running_var', torch.ones(norm.num_features))\n"
        "norm.register_buffer('num_batches_tracked', torch.tensor(0))"
    )
    return make_recalibration(facts, Repair(code, perform))


def has_padding(facts: Facts) -> bool:
    """Whether samples are padded, or batches of unlike lengths."""
    firsts = [batch[0] if type(batch) in (tuple, list) and batch else batch for batch in facts.inputs.batches]
    shapes = {tuple(x.shape[1:]) for x in firsts if isinstance(x, torch.Tensor)}
    return len(shapes) > 1 or find_padding(facts) > 0


class DependsOnPadding(Check):
    id = "output-depends-on-padding"
    title = "a sample's output depends on how far it was padded"
    needs = "data"
    fault = (
        "Appending zeros to a sequence changes what comes out at its real positions: through statistics that "
        "count padding, through convolutions at the end, or through pooling over all positions."
    )
    evidence = (
        "Half as many zeros again are appended; the change at the real positions in evaluation, and what of it "
        "remains with the norms' statistics fixed. Looked for where the data have padding, or are of several lengths."
    )
    cure = "anynorm.accelerate(model), then call it within anynorm.masked(mask, model=model)"
    threads = ("audio#4205", "NeMo#3229")

    def run(self, facts: Facts) -> Iterator[Finding]:
        call = find_call(facts)
        norms = [norm for norm in facts.norms if norm.kind in ("instance", "group")]
        if call is None or not norms or facts.evaluation.problem or not has_padding(facts):
            return  # of data without padding it says nothing
        found = next(iter(find_padding_dependence(facts.model, call)), None)
        if found is not None and found.depends and (found.remaining or 0.0) < 0.5 * (found.change or 0.0):
            yield self.find(
                norms[0].name,
                f"{norms[0].said}: with more padding the output moves by {found.change:.2g} of the largest"
                + describe_remaining(found),
                change=found.change or 0.0,
                remaining=found.remaining or 0.0,
            )
