"""Gamma, beta, and the bias before a norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn as nn

from ...surgery.fold.passing import MAX_POOLS
from ..check import Check, Finding, Repair
from ..facts import Facts, NormFacts
from .neighbours import find_source

ZERO = 1e-6


class UselessBias(Check):
    id = "bias-useless"
    title = "a bias that the norm behind it takes away again"
    severity = "note"
    fault = (
        "Batch and instance norm subtract the mean of each channel, and with it whatever a bias before them "
        "added: it has no gradient but noise, and costs an addition."
    )
    evidence = "The layer right before the norm has a bias; its size."
    cure = "build the layer with bias=False"

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.norms:
            source = find_source(norm, facts)
            if norm.kind not in ("batch", "instance") or source is None or source.module is None:
                continue
            if norm.normalizes_by_averages or (facts.model.training and not norm.module.training):
                continue  # what it subtracts does not follow the bias
            bias = getattr(source.module, "bias", None)
            if isinstance(bias, nn.Parameter):
                yield self.find(
                    norm.name,
                    f"{source.said} has a bias of {bias.numel()}, which {norm.said} takes away",
                    repair=make_unbiased(norm, source.name, source.module),
                    parameters=bias.numel(),
                    largest=float(bias.detach().abs().max()),
                )


def make_unbiased(norm: NormFacts, name: str, layer: nn.Module) -> Repair:
    """Remove a layer's bias, and take it from the running mean."""
    given = norm.has_averages
    code = f"layer, norm = model.get_submodule({name!r}), {norm.path}\n"
    code += "norm.running_mean.sub_(layer.bias.detach())\n" if given else ""

    def perform() -> None:
        bias = layer.bias
        assert isinstance(bias, nn.Parameter)
        with torch.no_grad():
            if given:
                norm.module.running_mean.sub_(bias.detach())
        layer.register_parameter("bias", None)

    return Repair(code + "layer.bias = None", perform, is_exact=True)


class ZeroGammas(Check):
    id = "gamma-zero"
    title = "channels that gamma has switched off"
    fault = (
        "Where gamma is 0 the norm gives beta whatever comes in; weight decay on gamma, or pruning by L1, brings "
        "it there. What lies before such a channel gets no gradient."
    )
    evidence = "How many gammas are below 1e-6, after training; zeros that a residual branch starts with do not count."
    cure = "prune these channels, or train without weight decay on gamma: anynorm.param_groups(model, weight_decay)"

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.norms:
            gamma = norm.gamma
            if gamma is None or not len(gamma) or not norm.kind:
                continue  # a class of its own may scale by 1 + weight
            few = int((gamma.abs() < ZERO).sum())
            starts = few == len(gamma) and (norm.count or 0) < 100  # as zero-init of residual branches
            if few and not starts:
                yield self.find(
                    norm.name,
                    f"{norm.said}: gamma is 0 in {few} of {len(gamma)} channels",
                    severity="warning" if few > len(gamma) / 10 else "note",
                    channels=few,
                    of=len(gamma),
                )


class NegativeGammas(Check):
    id = "gamma-negative"
    title = "negative gammas before a max-pool"
    severity = "note"
    fault = (
        "Max-pooling and a scale below 0 do not change places: folding the norm past the pool, or pruning by the "
        "size of gamma as if it were positive, changes the function."
    )
    evidence = "How many gammas are negative, and the pool behind the norm."
    cure = "turn the sign round in the layer before the norm, where it stands right behind one; else do not fold"

    def run(self, facts: Facts) -> Iterator[Finding]:
        for norm in facts.norms:
            gamma = norm.gamma
            pool = next(iter(norm.around.after), None)
            if pool is None or not is_max_pool(pool.module, pool.function):
                continue  # behind an activation a pool is no hindrance: the norm is folded into the layer before it
            few = 0 if gamma is None else int((gamma < 0).sum())
            if few and gamma is not None:
                yield self.find(
                    norm.name,
                    f"{norm.said}: {few} of {len(gamma)} gammas are negative, and {pool.said} follows",
                    repair=make_positive(norm),
                    channels=few,
                    of=len(gamma),
                )


def is_max_pool(module: nn.Module | None, function: str) -> bool:
    return isinstance(module, MAX_POOLS) or function.startswith(("max_pool", "adaptive_max_pool"))


def make_positive(norm: NormFacts) -> Repair | None:
    """Turn the sign of channels round in the layer before a norm and in the norm; None where none stands there."""
    source = find_source(norm)
    if source is None or not isinstance(source.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
        return None
    layer = source.module
    code = (
        f"layer, norm = model.get_submodule({source.name!r}), {norm.path}\nsign = norm.weight.detach().sign()\n"
        "sign[sign == 0] = 1\nfor t in (layer.weight.data.movedim(0, -1), layer.bias, norm.running_mean, "
        "norm.weight):\n"
        "    if t is not None:\n        t.data.mul_(sign)"
    )

    def perform() -> None:
        with torch.no_grad():
            sign = norm.module.weight.detach().sign()
            sign[sign == 0] = 1
            tensors = (
                layer.weight.movedim(0, -1),
                layer.bias,
                norm.module._buffers.get("running_mean"),
                norm.module.weight,
            )
            for t in tensors:
                if t is not None:
                    t.mul_(sign)

    return Repair(code, perform, is_exact=True) if norm.kind in ("batch", "instance") else None
