"""What the optimizer does to gamma and beta, and how its steps compare with the batches that norms counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..check import Check, Finding, Repair
from ..facts import Facts, NormFacts
from .neighbours import has_weights

FEWEST_STEPS = 20
MOST_MICRO_BATCHES = 64


class DecayedNorms(Check):
    id = "norms-decayed"
    title = "weight decay on gamma and beta"
    severity = "note"
    needs = "optimizer"
    fault = (
        "Decay pulls gamma to 0. Behind it nothing becomes smaller that matters, since the next norm undoes the "
        "scale; what is lost are channels, and the learning rate that a norm sets by the size of weights."
    )
    evidence = "The decay of the optimizer's group that holds the norm's parameters."
    cure = "give norms a group without decay: anynorm.param_groups(model, weight_decay)"

    def run(self, facts: Facts) -> Iterator[Finding]:
        optimizer: Any = facts.inputs.optimizer
        for norm in facts.norms:
            own = {id(p) for p in norm.module.parameters(recurse=False) if p.requires_grad}
            decays = [
                group.get("weight_decay", 0)
                for group in optimizer.param_groups
                if own & {id(p) for p in group["params"]}
            ]
            if any(decays):
                yield self.find(
                    norm.name,
                    f"{norm.said}: gamma and beta are in a group with weight_decay {max(decays):g}",
                    repair=make_undecayed(optimizer, norm),
                    weight_decay=float(max(decays)),
                )


def make_undecayed(optimizer: Any, norm: NormFacts) -> Repair:
    """Move a norm's parameters to a group of their own, without decay and else the same."""

    def perform() -> None:
        own = {id(p) for p in norm.module.parameters(recurse=False)}
        for group in list(optimizer.param_groups):
            held = [p for p in group["params"] if id(p) in own]
            if held and group.get("weight_decay", 0):
                group["params"] = [p for p in group["params"] if id(p) not in own]
                optimizer.param_groups.append({**group, "params": held, "weight_decay": 0.0})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]

    return Repair(
        "optimizer = type(optimizer)(anynorm.param_groups(model, weight_decay), lr=lr)", perform, is_exact=True
    )


class MissingFromOptimizer(Check):
    id = "norms-not-optimized"
    title = "gamma and beta want gradients, and the optimizer does not have them"
    needs = "optimizer"
    fault = (
        "The optimizer was made before the norm was put in (by a conversion, or a lazy layer), or its groups "
        "leave norms out: gamma and beta stay where they are."
    )
    evidence = "The norm's parameters that want a gradient and are in no group, while others of the model are."
    cure = "make the optimizer after the model is complete, or optimizer.add_param_group"

    def run(self, facts: Facts) -> Iterator[Finding]:
        optimizer: Any = facts.inputs.optimizer
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in facts.model.parameters()):
            return  # another model's
        for norm in facts.norms:
            missing = [p for p in norm.module.parameters(recurse=False) if p.requires_grad and id(p) not in held]
            if missing and has_held_neighbours(facts, norm, held):
                code = f"optimizer.add_param_group({{'params': list({norm.path}.parameters()), 'weight_decay': 0.0}})"
                yield self.find(
                    norm.name,
                    f"{norm.said}: {len(missing)} parameters want gradients and are in no group of the optimizer",
                    repair=Repair(code, make_added(optimizer, missing), is_exact=True),
                    parameters=len(missing),
                )


def has_held_neighbours(facts: Facts, norm: NormFacts, held: set[int]) -> bool:
    """Whether the layer before a norm is in the optimizer; where none is known, most of the model beside norms.

    Where only a head is trained, norms are left out with the layers around them.
    """
    layers = [step.module for step in norm.around.before if step.module is not None and has_weights(step.module)]
    before = list(layers[0].parameters()) if layers else []
    if not before:
        norms = {id(p) for each in facts.norms for p in each.module.parameters(recurse=False)}
        before = [p for p in facts.model.parameters() if id(p) not in norms and p.requires_grad]
    return sum(id(p) in held for p in before) > len(before) / 2


def make_added(optimizer: Any, missing: list[Any]) -> Any:
    def perform() -> None:
        group: dict[str, Any] = {"params": missing}
        if "weight_decay" in optimizer.defaults:
            group["weight_decay"] = 0.0
        optimizer.add_param_group(group)

    return perform


class CountedMoreThanOnce(Check):
    id = "batches-counted-more-than-once"
    title = "the averages have moved several times for each step of the optimizer"
    needs = "optimizer"
    fault = (
        "Under gradient accumulation batch norm sees micro-batches: its statistics are of a part of the batch, "
        "and its averages move several times a step. Activation checkpointing and GAN-like training move them "
        "twice for the same batch."
    )
    evidence = "num_batches_tracked divided by the optimizer's steps: a whole number from 2 on."
    cure = (
        "anynorm.accumulate(model, ...) computes statistics over all micro-batches; `with "
        "anynorm.update_once(model):` counts a repeated batch once"
    )
    threads = ("lightning#17446", "pytorch#96136", "fairscale#1035")

    def run(self, facts: Facts) -> Iterator[Finding]:
        steps = find_steps(facts.inputs.optimizer)
        if steps < FEWEST_STEPS:
            return
        ratios = {norm.name: norm.count / steps for norm in facts.averaging if norm.count}
        usual = Counter(round(ratio) for ratio in ratios.values()).most_common(1)
        for norm in facts.averaging:
            ratio = ratios.get(norm.name, 0.0)
            times = round(ratio)
            if 2 <= times <= MOST_MICRO_BATCHES and times == usual[0][0] and is_multiple(norm.count or 0, steps):
                yield self.find(
                    norm.name,
                    f"{norm.said}: {norm.count} batches counted in {steps} steps of the optimizer, {times} for each",
                    batches=norm.count or 0,
                    steps=steps,
                    ratio=ratio,
                )


def is_multiple(count: int, steps: int) -> bool:
    """Whether a counter is so many times the steps; micro-batches of a step that is not done may be counted, too.

    A counter that came with a checkpoint has any number: the steps divide it with a chance of 1 / steps, and with the
    allowance with one of times / steps, which is therefore made only where steps are many.
    """
    times, rest = divmod(count, steps)
    return times >= 2 and (rest == 0 or (rest < times and steps >= FEWEST_STEPS * times))


def find_steps(optimizer: Any) -> int:
    """The steps that an optimizer has made, by its state; 0 where it does not say."""
    found = [int(state["step"]) for state in optimizer.state.values() if isinstance(state, dict) and "step" in state]
    return max(found, default=0)
