"""What is said of whole models and of goals, as tables; and the whole report in the terminal."""

from __future__ import annotations

from rich.console import Console

from anynorm.apps.timing.forms import AGAIN, BUILT

from .causes import PARTS, Parts
from .results import Row
from .steps import ModelRow
from .summaries import write_time
from .tables import Cells, as_table, list_limits, list_means, list_peers, write_parts
from .verdicts import Verdict


def list_models(models: list[ModelRow]) -> tuple[list[str], Cells]:
    """A line for each form of each model in each mode; of torch.nn's its time, of the others the ratio."""
    titles = ["model", "mode", BUILT, f"{AGAIN} (95 %)", "form", "fused", "ratio (95 %)"]
    titles += ["its norms", "ours", *PARTS, "disturbed"]
    groups: dict[tuple[str, str], dict[str, ModelRow]] = {}
    for row in models:
        groups.setdefault((row.model, row.mode), {})[row.form] = row
    cells = []
    for (model, mode), forms in groups.items():
        built, again = forms[BUILT], write_ratio(forms[AGAIN])
        for form, row in forms.items():
            if form not in (BUILT, AGAIN):
                first = [f"{model}, {row.shape}", mode, write_time(built.median_us), again]
                fused = f"{row.fused} of {row.norms}"
                cells.append([*first, form, fused, write_ratio(row), *write_norms(row), "yes" if row.disturbed else ""])
    return titles, cells


def list_disturbed(models: list[ModelRow]) -> list[str]:
    """What disturbed each model in each mode, in words."""
    return [*dict.fromkeys(f"{row.model}, {row.mode}: {row.disturbed}." for row in models if row.disturbed)]


def print_models(console: Console, models: list[ModelRow]) -> None:
    """Print their table, and what disturbed them."""
    console.print(as_table(*list_models(models)))
    for sentence in list_disturbed(models):
        console.print(sentence)


def write_norms(row: ModelRow) -> list[str]:
    """What torch.nn's norms and ours take by themselves, and where ours spend it."""
    parts = Parts(row.kernel_us, row.memory_us, row.call_us, 0.0)
    if not parts.whole:
        return [""] * (2 + len(PARTS))
    return [write_time(row.torch_norms_us), write_time(parts.whole), *write_parts(parts)]


def write_ratio(row: ModelRow) -> str:
    """torch.nn's time over the form's, and the interval; of fewer than six rounds there is none."""
    interval = "few rounds" if row.low == 0 else f"{row.low:.2f} to {row.high:.2f}"
    return f"{row.ratio:.2f} ({interval})"


def list_verdicts(verdicts: list[Verdict]) -> tuple[list[str], Cells]:
    """A line for each goal."""
    titles = ["goal", "found", "verdict", "worst cases, and where their time goes"]
    return titles, [[verdict.goal, verdict.found, verdict.result, verdict.causes] for verdict in verdicts]


def print_report(console: Console, rows: list[Row], models: list[ModelRow], verdicts: list[Verdict]) -> None:
    """Means of each dtype, whole models, then the goals."""
    for dtype in dict.fromkeys(row.dtype for row in rows):
        console.rule(f"{dtype}: geometric means, above 1 anynorm is faster", align="left")
        chosen = [row for row in rows if row.dtype == dtype]
        for table in (list_means, list_peers, list_limits):
            console.print(as_table(*table(chosen)))
    if models:
        console.rule("whole models: torch.nn's time over the form's", align="left")
        print_models(console, models)
    console.rule("goals, on the float32 cases and the models of this run", align="left")
    console.print(as_table(*list_verdicts(verdicts), wrap=True))
