"""The report: one HTML file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from anynorm.apps.document import Plot, write_document, write_figures

from ..plots import COLOURS, MARKERS
from .curves import plot_curves, plot_drift
from .findings import WORKING_SHARE, Findings
from .judge import Choice
from .method import say_limits, write_method
from .plots import plot_batches, plot_modes, plot_rates
from .sentences import say_batch, say_choice
from .tables import group_reasons, write_cell_text
from .train import PROBE

# The markers of the plots, drawn in a box of 30 x 14.
SHAPES = {
    "x": '<path d="M11.5 3.5l7 7m0-7l-7 7" stroke-width="2"/>',
    "o": '<circle cx="15" cy="7" r="4"/>',
    "s": '<rect x="11" y="3" width="8" height="8"/>',
    "v": '<path d="M10.5 3h9l-4.5 8z"/>',
    "D": '<path d="M15 2l5 5-5 5-5-5z"/>',
    "^": '<path d="M10.5 11h9L15 3z"/>',
}


def write_report(findings: Findings, choices: Sequence[Choice], results: dict[str, Any]) -> str:
    """The page as text.

    Args:
        findings, choices: what was found and chosen.
        results: the content of results.json, for the verdict, the options and the machine's facts.
    """
    body = [
        write_head(findings, results),
        write_tables(findings, choices),
        write_list("What stands out", results["effects"]),
        write_list(
            "Each batch size for itself",
            [say_choice(findings, choice) for choice in choices],
            f"The leader has the best mean validation {findings.metric.name}; the differences are of test "
            f"{findings.metric.name}, and a positive one is better.",
        ),
        *write_plots(findings, min(PROBE, results["data_sizes"][1])),
        write_method(findings, results),
        write_list("Limits", say_limits(findings, results)),
        f"<footer>anynorm {escape(results['versions']['anynorm'])} · every run is in "
        f"<code>results.json</code> beside this page</footer>",
    ]
    return write_document(f"anynorm compare: {results['options']['data']}", body)


def write_head(findings: Findings, results: dict[str, Any]) -> str:
    """Question, verdict and how much evidence there is."""
    sizes, seeds = results["data_sizes"], {len(found) for found in findings.finals.values() if found}
    counts = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else f"{max(seeds, default=0)}"
    facts = (
        f"{results['finished_runs']} of {results['planned_runs']} planned runs finished; {counts} "
        f"{'seed' if counts == '1' else 'seeds'} in each cell of the table; {sizes[0]:,} training, "
        f"{sizes[1]:,} validation and {sizes[2]:,} test samples of {results['options']['data']}."
    )
    return (
        "<header><h1>Which normalization should this network use, on this data, at this batch size?</h1>\n"
        f'<p class="verdict">{escape(results["verdict"])}</p>\n'
        f'<p class="facts">{escape(results["not_judged"])} {escape(facts)}</p></header>\n'
    )


def write_tables(findings: Findings, choices: Sequence[Choice]) -> str:
    """Test score, one table for each network, with the reasons for cells that are not numbers."""
    plan = findings.plan
    tables = []
    for model in plan.models:
        if not any(cell[0] == model for cell in plan.cells):
            continue
        here = {choice.batch: choice for choice in choices if choice.model == model}
        head = "".join(f'<th scope="col">{escape(say_batch(batch))}</th>' for batch in plan.batches)
        rows = "".join(
            f'<tr><th scope="row">{norm}</th>'
            + "".join(write_cell(findings, (model, batch, norm), here.get(batch)) for batch in plan.batches)
            + "</tr>\n"
            for norm in plan.norms
        )
        tables.append(
            f'<div class="scroll"><table><caption>{escape(model)}: test {escape(findings.metric.title)}</caption>'
            f'<thead><tr><th scope="col">norm</th>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n'
        )
    notes = [f"n/a, {cells}: {reason}." for reason, cells in group_reasons(plan.impossible).items()]
    notes += [f"Failed, {cells}: {reason}." for reason, cells in group_reasons(findings.failures).items()]
    key = (
        "▲ green: leads on validation. ▼ tinted: clearly worse than the leader, its interval of paired "
        "differences lies below 0. Unmarked: no clear difference, or not judged. ± is half of the 95 % interval "
        "over seeds, wide where that is more than what was learned; lr is the chosen learning rate; an empty cell was "
        "not finished."
    )
    small = "".join(f'<p class="note">{escape(note)}</p>\n' for note in [key, *notes])
    return f'<section id="table"><div class="tables">{"".join(tables)}</div>\n{small}</section>\n'


def write_cell(findings: Findings, cell: tuple[str, str, str], choice: Choice | None) -> str:
    """One cell of the table."""
    text = write_cell_text(findings, cell, choice).plain
    kind = {"▲": "lead", "▼": "worse", "n": "none"}.get(text[:1], "")
    rate = findings.rates.get(cell)
    small = f"<br><small>lr {rate:g}</small>" if rate is not None and findings.finals.get(cell) else ""
    diverged = findings.diverged(cell)
    small += f"<br><small>{diverged} diverged</small>" if diverged else ""
    return f'<td class="{kind}">{escape(text)}{small}</td>' if kind else f"<td>{escape(text)}{small}</td>"


def write_list(heading: str, items: Iterable[str], lead: str = "") -> str:
    """A section that is a list of sentences; nothing where there are none."""
    # A number and its % stay on one line.
    listed = "".join(f"<li>{escape(item).replace(' %', '&nbsp;%')}</li>\n" for item in items)
    start = f"<p>{escape(lead)}</p>" if lead else ""
    return f"<section><h2>{escape(heading)}</h2>{start}<ul>{listed}</ul></section>\n" if listed else ""


def write_plots(findings: Findings, probed: int) -> list[str]:
    """Every section of plots that has something to show; `probed` samples made the probe."""
    plan = findings.plan
    return [
        write_panels(
            f"{findings.metric.name[0].upper()}{findings.metric.name[1:]} against batch size",
            keep(plot_batches(findings, model) for model in plan.models),
            findings,
            lead="Lines join the means; bars are 95 % intervals over seeds; each pale dot is one seed.",
        ),
        write_panels(
            "Batch norm: the same images in two modes",
            keep(plot_modes(findings, model) for model in plan.models),
            None,
            lead="In training mode batch norm uses the statistics of the batch, in evaluation mode its running "
            "averages. Both lines are the same trained networks on the same validation images, in batches of the "
            "training size.",
        ),
        write_curves(findings),
        write_rates(findings),
        write_panels(
            "How the last layer's inputs drift",
            [plot for model in plan.models for plot in plot_drift(findings, model)],
            findings,
            lead=f"Mean and standard deviation, over all features, of what the last layer receives for the same "
            f"{probed} validation images while the layers below it learn; computed "
            "as in training, mean over seeds.",
        ),
    ]


def write_curves(findings: Findings) -> str:
    """The section of training curves, at the first and the last batch size; empty where no run is finished."""
    plan = findings.plan
    panels = [
        write_panels(
            f"{model}, {say_batch(batch)}", plot_curves(findings, model, batch), findings, (model, batch), level=3
        )
        for model in plan.models
        for batch in dict.fromkeys((plan.batches[0], plan.batches[-1]))
    ]
    if not any(panels):
        return ""
    return (
        "<section><h2>Training, step by step</h2><p>Means over seeds at the chosen learning rate of each norm; "
        "a run that diverged is no part of the mean but a thin line of its own, which ends in a cross. Seconds are of "
        "training alone, with another run beside it.</p>"
        f"{''.join(panels)}</section>\n"
    )


def write_rates(findings: Findings) -> str:
    """The section of learning rates, a panel for each network and batch size."""
    plan = findings.plan
    return write_panels(
        "The range of learning rates that work",
        keep(plot_rates(findings, model, batch) for model in plan.models for batch in plan.batches),
        None,
        lead=f"Validation {findings.metric.title}, after the first short run of every rate, one seed, so neighbours "
        f"may swap by chance. Bold: works, {100 * WORKING_SHARE:.0f} % of the way from guessing to the best of any "
        "norm or more. × diverged; a dash was dropped as hopeless.",
    )


def keep(plots: Iterable[Plot | None]) -> list[Plot]:
    """The plots that exist."""
    return [plot for plot in plots if plot is not None]


def write_panels(
    heading: str,
    plots: Sequence[Plot],
    findings: Findings | None,
    place: tuple[str, str] | None = None,
    *,
    lead: str = "",
    level: int = 2,
) -> str:
    """A grid of plots under one heading; with `findings`, a key of the norms that occur (at `place`)."""
    if not plots:
        return ""
    key = write_key(findings, place) if findings is not None else ""
    start = f"<p>{escape(lead)}</p>" if lead else ""
    tag = "section" if level == 2 else "div"
    return f"<{tag}><h{level}>{escape(heading)}</h{level}>{start}{key}{write_figures(plots)}</{tag}>\n"


def write_key(findings: Findings, place: tuple[str, str] | None) -> str:
    """Colour and marker of every norm that has final runs."""
    present = [
        norm
        for norm in findings.plan.norms
        if any(found and cell[2] == norm and place in (None, cell[:2]) for cell, found in findings.finals.items())
    ]
    items = "".join(
        f'<li><svg viewBox="0 0 30 14" aria-hidden="true" fill="{COLOURS[norm]}" stroke="{COLOURS[norm]}">'
        f'<path d="M0 7h30" stroke-width="2"/>{SHAPES[MARKERS[norm]]}</svg>{norm}</li>'
        for norm in present
    )
    return f'<ul class="key">{items}</ul>'
