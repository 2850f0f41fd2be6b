"""The model with graphs for what only a graph can fuse: one for the whole model, or one for each block that has one."""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import torch.nn as nn

from .fuse import fuse_graph, report_unfused
from .report import Entry, SurgeryReport, describe
from .rewrite import apply_graph, find_methods
from .sequential import is_norm
from .trace import Traces, copy_sharing, is_hooked, trace

READS = ("LOAD_ATTR", "LOAD_METHOD")


def make_graph_model(
    model: nn.Module, swap: Callable[[nn.Module], None], traces: Traces, report: SurgeryReport
) -> nn.Module:
    """A copy that runs graphs, or the model itself where there is nothing to fuse or no graph.

    Args:
        swap: gives the norms of a copy their classes.
        traces: of the whole model.
    """
    reported = {entry.name for entry in (*report.left, *report.fused)} | {""}
    norms = {name for name, module in model.named_modules() if is_norm(module)} - reported
    if not traces.reason:
        return make_whole(model, swap, traces, norms, report)
    if not norms:
        return model
    twin, fused = model, False
    with suppress(Exception):  # what cannot be copied has no graphs; that it cannot, the trace has said
        twin = copy_sharing(model)
    if twin is not model:
        swap(twin)
        fused = fuse_blocks(twin, "", norms - find_norms_read_elsewhere(twin, norms), report)
    left = norms - {entry.name for entry in (*report.fused, *report.left)}
    if left:
        reason = f"not fused beyond Sequentials: {traces.reason}"
        if fused:
            reason = f"{len(left)} norms not fused beyond Sequentials and blocks: {traces.reason}"
        report.left.append(Entry("", describe(type(model)), reason=reason))
    return twin if fused else model


def make_whole(
    model: nn.Module, swap: Callable[[nn.Module], None], traces: Traces, norms: set[str], report: SurgeryReport
) -> nn.Module:
    """A copy whose `forward` is one graph."""
    for name, module in model.named_modules():
        inside = {norm for norm in norms if norm.startswith(f"{name}.")}
        if is_hooked(module) and inside:
            reason = "not fused beyond Sequentials: it has hooks, so it stays a call of its own in a graph"
            report.left.append(Entry(name, describe(type(module)), reason=reason))
            norms -= inside
    twin, graph = copy_sharing(model), traces.graphs[0]
    swap(twin)
    fused = fuse_graph(twin, graph, report)
    report_unfused(twin, graph, norms, report)
    return apply_graph(twin, graph, fused) if fused else model


def fuse_blocks(model: nn.Module, prefix: str, norms: set[str], report: SurgeryReport) -> bool:
    """Let the largest parts that can be traced run their graphs, in place; whether any was fused.

    Args:
        model: a copy, or a part of it, whose norms are ours.
        prefix: its name in the model, with a dot behind.
        norms: names, in the model, of what is to be fused.
    """
    any_fused = False
    for key, block in model.named_children():
        name = f"{prefix}{key}"
        if not any(norm.startswith(f"{name}.") for norm in norms):
            continue
        traces = Traces(reason="a container") if isinstance(block, nn.ModuleList | nn.ModuleDict) else trace(block)
        if traces.reason:
            any_fused |= fuse_blocks(block, f"{name}.", norms, report)
            continue
        part = SurgeryReport()
        fused = fuse_graph(block, traces.graphs[0], part)
        inside = {norm.removeprefix(f"{name}.") for norm in norms if norm.startswith(f"{name}.")}
        report_unfused(block, traces.graphs[0], inside, part)
        report.fused += [replace(entry, name=f"{name}.{entry.name}") for entry in part.fused]
        report.left += [replace(entry, name=f"{name}.{entry.name}") for entry in part.left]
        if fused:
            apply_graph(block, traces.graphs[0], fused)
            any_fused = True
    return any_fused


def find_norms_read_elsewhere(model: nn.Module, norms: set[str]) -> set[str]:
    """Norms that code of another module may call by themselves, as in `self.stem.norm(x)`, past the block's graph.

    Fused, such a call would apply the activation too. What tells is a method that reads an attribute of this name from
    something else than itself.
    """
    read = {name for kind in {type(module) for module in model.modules()} for name in find_foreign_reads(kind)}
    return {norm for norm in norms if norm.rpartition(".")[2] in read}


def find_foreign_reads(kind: type[nn.Module]) -> Iterator[str]:
    """Names that the methods of a user's class read from anything but `self`, and not for an attribute of theirs."""
    if kind.__module__.partition(".")[0] in ("torch", "anynorm"):
        return
    codes = [inspect.unwrap(method).__code__ for _, method in find_methods(kind)]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "PRECALL")]
        for before, step, behind in zip(steps, steps[1:], steps[2:], strict=False):
            if step.opname in READS and before.argval != "self" and behind.opname not in READS:
                yield str(step.argval)
