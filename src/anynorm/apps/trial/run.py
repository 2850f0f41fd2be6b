"""`anynorm try`: run every part of the trial and print what came out."""

import copy
import textwrap
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.padding import Padding
from torch import nn

from anynorm.apps.terminal import open_console, plain_table
from anynorm.apps.trial.accuracy import Accuracy, compare_outputs
from anynorm.apps.trial.call import in_one_line
from anynorm.apps.trial.dependence import Finding, find_batch_dependence, find_padding_dependence
from anynorm.apps.trial.target import Target, find_norms, resolve
from anynorm.apps.trial.timing import Timing, time_steps
from anynorm.apps.trial.words import describe_finding, describe_speed
from anynorm.errors import UserError

MOST_LEFT = 6  # lines about norms that were left; the rest is counted


def print_trial(
    spec: str,
    seconds: float = 6.0,
    threads: int | None = None,
    batch: int | None = None,
    console: Console | None = None,
) -> None:
    """Try anynorm on a model and print speed, differences, and what a sample's output depends on.

    Args:
        spec: a built-in name or module:factory, see `anynorm.apps.trial.target.resolve`.
        seconds: how long to measure speed.
        threads: CPU threads; where None, as many as torch is set to.
        batch: samples of an example that anynorm makes up.
        console: where to print; where None, standard output.
    """
    console = console or open_console()
    usual = torch.get_num_threads()
    torch.set_num_threads(threads or usual)
    try:
        target = resolve(spec, batch)
        _print_target(console, target)
        norms = find_norms(target.model)
        if norms:
            _print_parts(console, target, norms, seconds)
        else:
            console.print("\nThis model holds no normalization layer, so there is nothing for anynorm to change.")
    finally:
        torch.set_num_threads(usual)


def _print_parts(console: Console, target: Target, norms: dict[str, nn.Module], seconds: float) -> None:
    """Measure and print part after part."""
    after, report = _accelerate(target.model)
    _print_norms(console, norms, report)
    if report.changed:
        _print_change(console, target, after, seconds)
    with console.status("replacing the other samples"):
        across = find_batch_dependence(target.model, target.call)
    _print_findings(console, "Does a sample's output depend on the other samples of its batch?", across, "samples")
    with console.status("appending padding"):
        padding = find_padding_dependence(target.model, target.call)
    if padding:
        _print_findings(console, "Does it depend on padding appended to its sequence?", padding, "padding")
    _print_advice(console, report)


def _print_change(console: Console, target: Target, after: nn.Module, seconds: float) -> None:
    """Time both models and compare their outputs; where nothing was replaced noise alone would decide."""
    with console.status("measuring speed"):
        try:
            timing = time_steps(copy.deepcopy(target.model), copy.deepcopy(after), target.call, seconds)
        except Exception as problem:
            raise UserError(f"{target.name}: a training step raised {in_one_line(problem)}") from problem
    _print_speed(console, timing)
    with console.status("comparing outputs"):
        accuracies = [compare_outputs(target.model, after, target.call, mode) for mode in (False, True)]
    _print_accuracies(console, accuracies)


def _accelerate(model: nn.Module) -> tuple[nn.Module, Any]:
    """Return an accelerated copy and accelerate's report."""
    from anynorm import accelerate

    after = copy.deepcopy(model)
    report = accelerate(after)
    return after, report


def _print_target(console: Console, target: Target) -> None:
    """Print the model's size and the input it is tried on."""
    count = sum(parameter.numel() for parameter in target.model.parameters())
    console.print(f"{target.name}: {count:,} parameters", style="bold")
    origin = "made up by anynorm" if target.guessed else "the model's own example"
    console.print(f"  input {target.call.describe()} ({origin})")


def _heading(console: Console, text: str) -> None:
    """Print the title of a part."""
    console.print(f"\n{text}", style="bold cyan")


def _line(console: Console, text: str, indent: int = 2, style: str | None = None) -> None:
    """Print a sentence, its further lines as far in as its first."""
    space = " " * indent
    for line in textwrap.wrap(text, console.width, initial_indent=space, subsequent_indent=space):
        console.print(line, style=style)


def _print_norms(console: Console, norms: dict[str, nn.Module], report: Any) -> None:
    """Print the norms per class, how many accelerate replaced, and why it left the others."""
    _heading(console, "Norms")
    replaced = Counter(entry.kind.rpartition(".")[2] for entry in report.changed)
    held = Counter(type(module).__name__ for module in norms.values())
    for kind, count in (held | replaced).items():
        _line(console, f"{count:4d} {kind}: {_share(replaced[kind], count)}")
    for entry in report.left[:MOST_LEFT]:
        _line(console, f"left {entry.name} ({entry.kind}): {entry.reason}", indent=7)
    if len(report.left) > MOST_LEFT:
        _line(console, f"and {len(report.left) - MOST_LEFT} more were left", indent=7)


def _share(replaced: int, count: int) -> str:
    """Return how many of a class accelerate replaced, in words."""
    if replaced == 0:
        return "left as it is" if count == 1 else "left as they are"
    return "replaced" if replaced == count else f"{replaced} replaced, {count - replaced} left"


def _print_speed(console: Console, timing: Timing) -> None:
    """Print the medians, the ratio with its spread, and a verdict."""
    threads = timing.threads
    _heading(console, "A training step (forward and backward)")
    for name, text in describe_speed(timing):
        _line(console, f"{name:<11}{text}")
    pairs = len(timing.before)
    words = f"{pairs} pairs of steps, in turn, on {threads} CPU thread{'s' if threads > 1 else ''}"
    _line(console, words)


def _print_accuracies(console: Console, accuracies: list[Accuracy]) -> None:
    """Print how far the outputs of the two models are apart, and how far each is from float64."""
    _heading(console, "Outputs before and after, largest difference")
    table = plain_table("", "difference", "largest output", "error before", "error after")
    for accuracy in accuracies:
        errors = ["", ""] if accuracy.errors is None else [f"{error.largest:.1e}" for error in accuracy.errors]
        name = "training" if accuracy.training else "evaluation"
        difference = accuracy.difference
        table.add_row(name, f"{difference.largest:.1e}", f"{difference.scale:.3g}", *errors)
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
    if any(accuracy.errors for accuracy in accuracies):
        _line(console, "error: largest distance from the same model in float64")
    elif accuracies:
        _line(console, "error: not measured, the model does not run in float64")


def _print_findings(console: Console, question: str, findings: list[Finding], topic: str) -> None:
    """Print the answer of each mode, then reason and remedy once."""
    _heading(console, question)
    said: list[str] = []
    for finding in findings:
        mode = "training" if finding.training else "evaluation"
        answer, *reasons = describe_finding(finding, topic)
        style = "yellow" if finding.depends else None
        _line(console, f"{mode:<11}{answer}", style=style)
        for reason in reasons:
            if reason not in said:
                _line(console, reason, indent=13)
                said.append(reason)


def _print_advice(console: Console, report: Any) -> None:
    """Print the line to paste."""
    if not report.changed:
        console.print("\nNothing was replaced, so there is nothing to time, to compare or to paste.")
        return
    _heading(console, "To use it, after the model is built")
    console.print("  import anynorm; anynorm.accelerate(model)", style="bold")
