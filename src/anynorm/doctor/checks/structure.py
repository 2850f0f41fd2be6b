"""Where norms stand: what is before them, whether they are shared, and what they are to be of."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import reduce
from math import prod

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from ...statistics import Moments
from ...surgery.accelerate import plan_swaps
from ...surgery.adapters import Finder
from ...surgery.fold.layers import is_layer
from ...surgery.report import SurgeryReport
from ...surgery.sync import sync
from ..check import Check, Finding, Repair
from ..facts import Facts, NormFacts
from ..passes import Seen
from .neighbours import has_weights
from .repairs import make_recalibration

SMALL_BATCH = 16  # samples of one process
ALIKE = 0.25  # std: a difference that evaluation hardly notices


class NormAfterActivation(Check):
    id = "norm-after-activation"
    title = "the norm stands behind the activation"
    severity = "note"
    fault = (
        "Batch normalization was made to stand before the activation. Behind a ReLU it sees values of one sign, "
        "and cannot be folded into the layer before; trained networks work with it, so it is no fault by itself."
    )
    evidence = "The activation between the layer and the norm."
    cure = "in a new network put the norm before the activation; leave a trained one as it is"

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.norms:
            step = next((each for each in norm.around.before if each.activation or has_weights(each.module)), None)
            behind = norm.kind == "batch" and step is not None and step.activation
            layer = behind and any(is_layer(each.module) for each in norm.around.before if each.module is not None)
            if layer and step is not None:
                yield self.find(norm.name, f"{norm.said} takes the output of {step.said}", activation=step.said)


class SharedNorm(Check):
    id = "norm-shared"
    title = "one norm with running averages is used in several places"
    fault = (
        "Its averages are a mixture of what flows through both places, which neither of them sees; and each step "
        "moves them several times. In training both are normalized by their own batch, so it shows in evaluation "
        "only."
    )
    evidence = (
        "The names it has, or the calls in one forward; with data, how far apart their statistics are: up to "
        "0.25 std they may share their averages, as the views of a siamese network do."
    )
    cure = "give each place a norm of its own"
    threads = ("pytorch#104593",)

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.averaging:
            seen = facts.evaluation.seen.get(norm.name) if facts.has_data else None
            calls = max(len(norm.names), norm.around.calls, seen.calls if seen is not None else 0)
            apart = None if seen is None else find_distance(seen)
            if calls > 1 and norm.kind == "batch" and (apart is None or apart > ALIKE):
                yield self.find(
                    norm.name,
                    f"{norm.said} is used {calls} times in a forward ({', '.join(norm.names)})",
                    repair=make_copies(facts, norm) if len(norm.names) > 1 else None,
                    severity="warning" if apart is not None or len(norm.names) > 1 else "note",
                    calls=calls,
                    distance=-1.0 if apart is None else apart,
                )


def find_distance(seen: Seen) -> float | None:
    """How far apart the statistics of the calls are, in std of all, for the median channel; None for one call."""
    if len(seen.by_call) < 2:
        return None
    whole = reduce(Moments.merge, seen.by_call)
    assert whole.mean is not None
    std = (whole.m2 / int(whole.count)).sqrt().clamp_min(1e-30)
    means = torch.stack([each.mean for each in seen.by_call if each.mean is not None])
    stds = torch.stack([(each.m2 / int(each.count)).sqrt() for each in seen.by_call])
    spread = torch.maximum(means.amax(0) - means.amin(0), stds.amax(0) - stds.amin(0))
    return float((spread / std).median())


def make_copies(facts: Facts, norm: NormFacts) -> Repair:
    """A norm of its own at each place, which begins as the shared one."""
    model = facts.model
    code = "".join(f"model.set_submodule({name!r}, copy.deepcopy({norm.path}))\n" for name in norm.names[1:])

    def perform() -> None:
        for name in norm.names[1:]:
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent)._modules[key] = copy.deepcopy(norm.module)

    own = Repair(code.rstrip(), perform)
    return make_recalibration(facts, own) or own


class OneElementByShape(Check):
    id = "norm-of-one-feature"
    title = "the norm is over one feature: its output is beta"
    severity = "error"
    fault = (
        "(x - mean) is 0 where the mean is of x alone. Such a layer or group norm outputs beta whatever comes in, "
        "and passes no gradient."
    )
    evidence = "The number of elements that normalized_shape names."
    cure = "normalize over more features, or take the norm out"
    threads = ("pytorch#19250", "opacus#567")

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.norms:
            shape = getattr(norm.module, "normalized_shape", None)
            if norm.kind == "layer" and shape is not None and prod(shape) == 1:
                yield self.find(
                    norm.name,
                    f"{norm.said}: normalized_shape is {tuple(shape)}, a single element",
                    repair=make_identity(facts, norm),
                    elements=1,
                )


def make_identity(facts: Facts, norm: NormFacts) -> Repair:
    """No norm at this place."""

    def perform() -> None:
        for name in norm.names:
            parent, _, key = name.rpartition(".")
            facts.model.get_submodule(parent)._modules[key] = nn.Identity()

    code = "\n".join(f"model.set_submodule({name!r}, torch.nn.Identity())" for name in norm.names)
    return Repair(code, perform, needs_training=True)


class Unsynchronized(Check):
    id = "batch-norm-unsynchronized"
    title = "batch norm under DistributedDataParallel without synchronization"
    fault = (
        "Each process normalizes by its own few samples, and the averages that are saved are those of the first. "
        "Worse on two devices than on one."
    )
    evidence = "The wrapper, the class of the norm, and the samples of a process where batches were given."
    cure = "anynorm.sync(model) merges statistics over processes, on any device"
    threads = ("pytorch#78081", "mmsegmentation#2147", "pytorch#187298", "timm#1254")

    def run(self, facts: Facts) -> Iterator[Finding]:
        model = facts.inputs.model
        groups = [each.process_group for each in model.modules() if isinstance(each, DistributedDataParallel)]
        if not any(dist.get_world_size(group) > 1 for group in groups):
            return
        size = facts.evaluation.size if facts.has_data else 0
        if size > SMALL_BATCH:
            return
        for norm in facts.averaging:
            synced = isinstance(norm.module, nn.SyncBatchNorm) or "Sync" in type(norm.module).__name__
            if norm.kind == "batch" and not synced and norm.frozen is None:
                said = f"{size} samples" if size else "its own samples"
                yield self.find(
                    norm.name,
                    f"{norm.said} normalizes by {said} of one process",
                    repair=Repair("anynorm.sync(model)", lambda: sync(model), is_exact=True),
                    samples=size,
                )


class LeftByAccelerate(Check):
    id = "left-by-accelerate"
    title = "a norm that anynorm.accelerate leaves as it is"
    severity = "note"
    fault = (
        "Its code is its own, so that what is known of torch's norms may not hold for it, and it gets none of the "
        "exact and fast kernels."
    )
    evidence = "The reason that accelerate gives."
    cure = "anynorm.register(Class, ...) tells what such a class computes"

    def run(self, facts: Facts) -> Iterator[Finding]:
        report = SurgeryReport()
        plan_swaps(facts.model, False, report, Finder())
        for entry in report.left:
            if type(facts.model.get_submodule(entry.name)).__module__.startswith("torch.nn."):
                continue  # torch's own code is known; where it stands is why it is left
            said = f"{entry.name or 'the model'} ({entry.kind}): {entry.reason}"
            yield self.find(entry.name, said, reason=entry.reason)
