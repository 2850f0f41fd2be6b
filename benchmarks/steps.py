"""Whole models, before and after one line: what is timed, the rows, and their CSV."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from anynorm.apps.timing.forms import BUILT, FUSED, Forms, make_forms
from anynorm.apps.timing.interleaved import InterleavedTimings
from anynorm.apps.zoo import Model
from anynorm.doctor.call import in_one_line

from .model_norms import NormTimes, find_norm_cases, time_norms
from .results import read_table, write_table
from .summaries import BOTH

SECONDS = {"step": 6.0, "evaluation": 3.0}  # over all forms of a model; half as many when it is repeated
ATTEMPTS = 3
TOLERANCE = 1e-3  # of the largest output, in evaluation


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """What was measured of a form of a model in a mode.

    Attributes:
        mode: "step" is forward and backward in training, "evaluation" is forward.
        form: as in `Forms`.
        norms, fused: how many norms the model has, and how many of this form are fused with what follows.
        median_us, q1_us, q3_us: microseconds of a call; half of the rounds lie between the quartiles.
        ratio, low, high: torch.nn's time over the form's, round by round: the median and its 95 % interval.
        disturbed: what says that other work disturbed the rounds, in words; empty where nothing does.
        torch_norms_us: microseconds of all of torch.nn's norms by themselves, each on its shape in the model.
        kernel_us, memory_us, call_us: the same of ours, in parts, see `causes.Parts`; all 0 where kernels are off.
    """

    model: str
    shape: str
    mode: str
    form: str
    norms: int
    fused: int
    rounds: int
    median_us: float
    q1_us: float
    q3_us: float
    ratio: float
    low: float
    high: float
    disturbed: str
    torch_norms_us: float
    kernel_us: float
    memory_us: float
    call_us: float


def measure_models(
    models: dict[str, Callable[[], Model]], share: float, complain: Callable[[str], None]
) -> Iterator[list[ModelRow]]:
    """The rows of each model, as they come.

    Args:
        models: by name; each is made with an input.
        share: of the usual seconds.
        complain: is told of a model that could not be timed.
    """
    for name, make in models.items():
        rows: list[ModelRow] = []
        try:
            torch.manual_seed(0)
            model, x = make()
            forms = make_forms(model, x)
            check_forms(forms)
            cases = find_norm_cases(model, forms.call)
            for mode, seconds in SECONDS.items():
                timings, disturbed = forms.time_undisturbed([*forms.models], share * seconds, mode == "step", ATTEMPTS)
                norms = time_norms(cases, BOTH if mode == "step" else mode)
                rows += make_model_rows(name, mode, forms, timings, disturbed=disturbed, norms=norms)
        except Exception as problem:
            complain(f"{name} was not timed: {in_one_line(problem)}")
        yield rows


def check_forms(forms: Forms) -> None:
    """All forms return the same in evaluation, up to rounding.

    Raises:
        ValueError: one does not, so that its time means nothing.
    """
    with torch.no_grad():
        found = {name: forms.call.of(model.eval()) for name, model in forms.models.items()}
    expected = found[BUILT]
    for name, output in found.items():
        difference, scale = float((output - expected).abs().max()), float(expected.abs().max())
        if not difference <= TOLERANCE * scale:
            raise ValueError(f"{name} is {difference:.2g} off, the largest output is {scale:.2g}")


def make_model_rows(
    name: str, mode: str, forms: Forms, timings: InterleavedTimings, *, disturbed: str, norms: NormTimes | None
) -> Iterator[ModelRow]:
    """A row for each form."""
    alone = (norms.torch, norms.ours.kernel, norms.ours.memory, norms.ours.call) if norms else (0.0,) * 4
    shape = "x".join(map(str, forms.call.tensors()[0].shape))
    for form, seconds in timings.seconds.items():
        fused = forms.fused if form == FUSED else 0
        alone = tuple(round(us, 3) for us in alone)
        times = (round(1e6 * t, 3) for t in (timings.median(form), *timings.quartiles(form)))
        ratios = (round(r, 4) for r in (timings.ratio(BUILT, form), *timings.interval(BUILT, form)))
        yield ModelRow(name, shape, mode, form, forms.norms, fused, len(seconds), *times, *ratios, disturbed, *alone)


def find_path(path: Path) -> Path:
    """Where the models' rows stand, beside those of the cases."""
    return path.with_name(f"{path.stem}-models.csv")


def write_models(rows: list[ModelRow], facts: dict[str, str], path: Path) -> None:
    """Write them beside the rows of the cases, whose CSV is `path`."""
    write_table(rows, ModelRow, facts, find_path(path))


def read_models(path: Path) -> list[ModelRow]:
    """What `write_models` wrote; nothing where no models were measured, as before December 2026."""
    found = find_path(path)
    return read_table(found, ModelRow)[0] if found.exists() else []
