"""`anynorm try`: speed, outputs and dependence of a model before and after `anynorm.accelerate`, printed."""

import copy
import textwrap
from collections import Counter
from typing import Any

from rich.console import Console
from rich.padding import Padding
from torch import nn

from anynorm.apps.models.load import LoadedModel, load_model
from anynorm.apps.terminal import open_console, plain_table
from anynorm.apps.timing.steps import PairedTimings, time_steps
from anynorm.apps.timing.threads import use_threads
from anynorm.apps.try_model.accuracy import Accuracy, compare_outputs
from anynorm.apps.try_model.sentences import describe_finding, describe_speed
from anynorm.doctor.call import in_one_line
from anynorm.doctor.dependence import Finding, find_batch_dependence, find_padding_dependence
from anynorm.doctor.norms import find_norms
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
        spec: a built-in name or module:factory, see `anynorm.apps.models.load.load_model`.
        seconds: how long to measure speed.
        threads: CPU threads; where None, as many as torch is set to.
        batch: samples of an example that anynorm makes up.
        console: where to print; where None, standard output.
    """
    console = console or open_console()
    with use_threads(threads):
        loaded = load_model(spec, batch)
        _print_model(console, loaded)
        norms = find_norms(loaded.model)
        if norms:
            _print_parts(console, loaded, norms, seconds)
        else:
            console.print("\nThis model holds no normalization layer, so there is nothing for anynorm to change.")


def _print_parts(console: Console, loaded: LoadedModel, norms: dict[str, nn.Module], seconds: float) -> None:
    """Measure and print part after part."""
    after, report = _accelerate(loaded.model)
    _print_norms(console, norms, report)
    if report.changed:
        _print_change(console, loaded, after, seconds)
    with console.status("replacing the other samples"):
        batch = find_batch_dependence(loaded.model, loaded.call)
    _print_findings(console, "Does a sample's output depend on the other samples of its batch?", batch, "samples")
    with console.status("appending padding"):
        padding = find_padding_dependence(loaded.model, loaded.call)
    if padding:
        _print_findings(console, "Does it depend on padding appended to its sequence?", padding, "padding")
    _print_advice(console, report)


def _print_change(console: Console, loaded: LoadedModel, after: nn.Module, seconds: float) -> None:
    """Time both models and compare their outputs; where nothing was replaced noise alone would decide."""
    with console.status("measuring speed"):
        try:
            timing = time_steps(copy.deepcopy(loaded.model), copy.deepcopy(after), loaded.call, seconds)
        except Exception as problem:
            raise UserError(f"{loaded.name}: a training step raised {in_one_line(problem)}") from problem
    _print_speed(console, timing)
    with console.status("comparing outputs"):
        accuracies = [compare_outputs(loaded.model, after, loaded.call, mode) for mode in (False, True)]
    _print_accuracies(console, accuracies)


def _accelerate(model: nn.Module) -> tuple[nn.Module, Any]:
    """Return an accelerated copy and accelerate's report."""
    from anynorm import accelerate

    after = copy.deepcopy(model)
    report = accelerate(after)
    return after, report


def _print_model(console: Console, loaded: LoadedModel) -> None:
    """Print the model's size and the input it is tried on."""
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    console.print(f"{loaded.name}: {count:,} parameters", style="bold")
    origin = "made up by anynorm" if loaded.guessed else "the model's own example"
    console.print(f"  input {loaded.call.describe()} ({origin})")


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
    counts = Counter(type(module).__name__ for module in norms.values())
    for kind, count in (counts | replaced).items():
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


def _print_speed(console: Console, timing: PairedTimings) -> None:
    """Print the medians, the ratio with its spread, and a verdict."""
    threads = timing.threads
    _heading(console, "A training step (forward and backward)")
    for name, text in describe_speed(timing):
        _line(console, f"{name:<11}{text}")
    pairs = len(timing.before)
    _line(console, f"{pairs} pairs of steps, in turn, on {threads} CPU thread{'s' if threads > 1 else ''}")


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
    printed: list[str] = []
    for finding in findings:
        mode = "training" if finding.training else "evaluation"
        answer, *reasons = describe_finding(finding, topic)
        style = "yellow" if finding.depends else None
        _line(console, f"{mode:<11}{answer}", style=style)
        for reason in reasons:
            if reason not in printed:
                _line(console, reason, indent=13)
                printed.append(reason)


def _print_advice(console: Console, report: Any) -> None:
    """Print the line to paste."""
    if not report.changed:
        console.print("\nNothing was replaced, so there is nothing to time, to compare or to paste.")
        return
    _heading(console, "To use it, after the model is built")
    console.print("  import anynorm; anynorm.accelerate(model)", style="bold")
