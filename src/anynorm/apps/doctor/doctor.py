"""`anynorm doctor`: loads what is named, looks, prints, repairs where asked, and writes files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from anynorm.apps.doctor.load import open_loader, open_loss, open_model
from anynorm.apps.doctor.table import print_checks, print_diagnosis, print_repairs
from anynorm.apps.document import check_output
from anynorm.apps.terminal import open_console, say
from anynorm.apps.weights import check_target, write_weights
from anynorm.doctor.call import in_one_line
from anynorm.doctor.check import Check
from anynorm.doctor.diagnose import choose_checks, look, perform_repairs, take
from anynorm.doctor.diagnosis import Diagnosis, Repairs, make_finite
from anynorm.doctor.inputs import Inputs
from anynorm.errors import UserError

HEALTHY, FOUND = 0, 1  # exit codes; that it could not run is 2


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        model: as for `anynorm try`.
        data, loss: as module:name; None for none.
        weights: a file to load first.
        batches: the most to take.
        checks: ids; none for all.
        html, json: where the report goes, too; "-" for JSON alone on standard output.
        fix: perform the repairs.
        out: where the repaired weights go.
        force: write over `out`.
    """

    model: str
    data: str | None = None
    weights: str | None = None
    loss: str | None = None
    batches: int = 16
    checks: tuple[str, ...] = ()
    html: Path | None = None
    json: str | None = None
    fix: bool = False
    out: Path | None = None
    force: bool = False


def list_checks() -> int:
    """Print every check; the exit code."""
    print_checks(open_console())
    return HEALTHY


def examine_model(options: Options) -> int:
    """Look for what is wrong with a model, print and write it, and repair it where asked.

    Returns:
        0 where there is neither error nor warning (after the repairs, where some were asked for), else 1.

    Raises:
        UserError: it could not run, in one sentence; a report that could be made is printed before.
    """
    checks = check_options(options)
    if options.json != "-":
        return report(options, checks, open_console())
    # What a user's module prints must not stand among the JSON.
    out = sys.stdout
    with redirect_stdout(sys.stderr):
        return report(options, checks, None, out)


def check_options(options: Options) -> list[Check]:
    """Refuse, before any work, what cannot be done; the checks to run."""
    checks = choose_checks(options.checks or None)
    if options.html is not None:
        check_output("doctor --html", "a page", options.html, (".html",))
    if options.json not in (None, "-") and (Path(str(options.json)).is_dir() or not find_folder(options).is_dir()):
        raise UserError(f"doctor --json: {options.json!r} cannot be written; choose a file in a folder that is there.")
    if options.out is not None:
        if not options.fix:
            raise UserError("doctor --out: takes the repaired weights, and nothing is repaired without --fix; add it.")
        check_target("doctor --out", options.out, options.force)
    if options.loss is not None and options.data is None:
        raise UserError("doctor --loss: is of outputs and targets, and there are none without --data; add it.")
    return checks


def find_folder(options: Options) -> Path:
    """Where the JSON goes."""
    return Path(str(options.json)).resolve().parent


def report(options: Options, checks: Sequence[Check], console: Console | None, out: Any = None) -> int:
    """Everything behind the options; without a console JSON goes to `out`, and nothing else."""
    inputs = open_inputs(options)
    names = list(inputs.model.state_dict())
    diagnosis = look_or_say(inputs, checks)
    if console is not None:
        print_diagnosis(console, options.model, diagnosis)
    repairs = perform_repairs(inputs, checks, diagnosis) if options.fix else None
    if console is not None and repairs is not None:
        print_repairs(console, repairs)
    said = write_files(options, diagnosis, repairs, out)
    if options.out is not None and repairs is not None:
        said.append(write_repaired(options, inputs, repairs, names))
    if console is not None and said:
        say(console, "", *said)
    check_calls(options, diagnosis)
    last = diagnosis if repairs is None or repairs.remaining is None else repairs.remaining
    return HEALTHY if last.is_healthy else FOUND


def open_inputs(options: Options) -> Inputs:
    """The model, the first batches, and the loss."""
    model = open_model(options.model, options.weights)
    loader = None if options.data is None else open_loader(options.data)
    loss = None if options.loss is None else open_loss(options.loss)
    try:
        batches = take(loader, options.batches)
    except UserError:
        raise
    except Exception as problem:  # the user's loader
        raise UserError(f"doctor --data: {options.data} raised {in_one_line(problem)}") from problem
    return Inputs(model, batches, loader, None, loss)


def look_or_say(inputs: Inputs, checks: Sequence[Check]) -> Diagnosis:
    """What is found; what a check raises must not look like a finding to whoever reads the exit code."""
    try:
        return look(inputs, checks)
    except UserError:
        raise
    except Exception as problem:
        raise UserError(
            f"doctor: a check raised {in_one_line(problem)}; anynorm.diagnose(model, ...) in Python shows where."
        ) from problem


def write_files(options: Options, diagnosis: Diagnosis, repairs: Repairs | None, out: Any) -> list[str]:
    """Write JSON and the page; what was written, in lines."""
    said = []
    if options.json is not None:
        found = diagnosis.to_dict() | ({} if repairs is None else {"repairs": repairs.to_dict()})
        text = json.dumps(make_finite(found), indent=2, allow_nan=False) + "\n"
        said += write_text("--json", text, options.json, out)
    if options.html is not None:
        from anynorm.apps.doctor.page import write_page

        said += write_text("--html", write_page(options.model, diagnosis, repairs), str(options.html))
    return said


def write_text(option: str, text: str, path: str, out: Any = None) -> list[str]:
    """Write a file, or to a stream where the path is "-"."""
    if path == "-":
        out.write(text)
        return []
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as problem:
        raise UserError(f"doctor {option}: {path!r} cannot be written ({in_one_line(problem)}).") from problem
    return [f"wrote {path}"]


def write_repaired(options: Options, inputs: Inputs, repairs: Repairs, names: list[str]) -> str:
    """Write the weights of a model that was repaired."""
    assert options.out is not None
    if not repairs.done:
        return f"did not write {options.out}: nothing was repaired"
    write_weights("doctor --out", inputs.model, options.out, options.force)
    if list(inputs.model.state_dict()) != names:
        return (
            f"wrote {options.out}, whose tensors are others than the factory's: run the code of the repairs, then load"
        )
    return f"wrote {options.out}: tensors alone; what else a repair sets, such as momentum, its code says"


def check_calls(options: Options, diagnosis: Diagnosis) -> None:
    """Refuse to call healthy what could not be called with the batches."""
    problem = diagnosis.measured.get("evaluation problem")
    if problem is None and not any(each.severity == "error" for each in diagnosis.findings):
        problem = diagnosis.measured.get("training problem")
    if problem is not None:
        raise UserError(
            f"doctor --data: the model refuses a batch of {options.data} ({problem}), so that checks that need data "
            "saw nothing or little; a batch is what the model takes, or (input, targets), or a dict of arguments."
        )
