"""The report in the terminal: what is wrong in a table, then each finding with its numbers, its cure and its code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from anynorm.apps.doctor.groups import (
    Group,
    in_line,
    make_groups,
    shorten,
    write_key,
    write_layer,
    write_number,
    write_range,
)
from anynorm.apps.terminal import heading, join_words, say
from anynorm.doctor.check import SEVERITIES, Effect, Finding, find_checks
from anynorm.doctor.diagnosis import Diagnosis, Repairs

STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
NAMED = 4  # layers by name, where many have a finding
LONGEST = 60  # characters of a name
WAYS = {
    "a loader": "give --data module:loader, and the losses in training and evaluation are compared",
    "the optimizer": "anynorm.diagnose(model, optimizer=optimizer) takes it, in Python alone",
}
MOST_CODE = 40  # lines of code for one group


def print_diagnosis(console: Console, name: str, diagnosis: Diagnosis) -> None:
    """Print everything about a model.

    Args:
        console: where.
        name: of the model.
        diagnosis: what was found.
    """
    groups = make_groups(diagnosis.findings)
    say(console, f"{in_line(name)}: {describe_counts(diagnosis)}")
    say(console, *describe_measured(diagnosis))
    if groups:
        console.print()
        console.print(make_table(groups))
    for group in groups:
        print_group(console, group)
    skipped = describe_skipped(diagnosis)
    if skipped:
        heading(console, "Not looked at")
        say(console, *skipped)


def describe_counts(diagnosis: Diagnosis) -> str:
    """How many norms, checks and findings, in a line."""
    norms = count(len(diagnosis.layers), "norm")
    return f"{norms}, {count(len(diagnosis.checked), 'check')}: {describe_findings(diagnosis.findings)}"


def describe_findings(findings: Iterable[Finding]) -> str:
    """How many of each severity."""
    found = Counter(finding.severity for finding in findings)
    said = [count(found[each], each) for each in SEVERITIES if found[each]]
    return join_words(said) if said else "nothing found"


def count(number: int, word: str) -> str:
    """A number with its word, as 1 norm or 2 norms."""
    return f"{number} {word}{'s' * (number != 1)}"


def describe_measured(diagnosis: Diagnosis) -> list[str]:
    """Loss and accuracy in both modes, in lines; none without data."""
    measured = diagnosis.measured
    lines = []
    if "batches" in measured:
        said = []
        for kind in ("loss", "accuracy"):
            values = [(mode, measured.get(f"{mode} {kind}")) for mode in ("evaluation", "training")]
            known = [f"{write_number(value)} in {mode}" for mode, value in values if value is not None]
            said += [f"{kind} {join_words(known)}"] if known else []
        whole = count(int(measured["batches"]), "batch").replace("batchs", "batches")
        lines.append(f"{whole}: {'; '.join(said) or 'no loss is known, so that no effect on it is'}")
        lines += [
            f"In {mode} a batch raised {in_line(str(measured[f'{mode} problem']))}"
            for mode in ("evaluation", "training")
            if f"{mode} problem" in measured
        ]
    return lines


def describe_skipped(diagnosis: Diagnosis) -> list[str]:
    """Which checks did not run, by their reason."""
    by_reason: dict[str, list[str]] = {}
    for check, reason in diagnosis.skipped.items():
        by_reason.setdefault(reason, []).append(check)
    return [describe_reason(reason, checks) for reason, checks in by_reason.items()]


def describe_reason(reason: str, checks: list[str]) -> str:
    """Why some checks did not run, and the way to have them run."""
    way = next((way for what, way in WAYS.items() if reason == f"it needs {what}"), "")
    if way:
        needs = f"{'needs' if len(checks) == 1 else 'need'} {reason.removeprefix('it needs ')}"
        return f"{count(len(checks), 'check')} {needs}: {way}."
    return f"{join_words(checks)}: {reason}."


def make_table(groups: list[Group]) -> Table:
    """A row for each group."""
    table = Table(box=None, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("severity", no_wrap=True)
    table.add_column("what is wrong", ratio=3)
    table.add_column("where", ratio=2, overflow="fold")
    for group in groups:
        severity = Text(group.first.severity, style=STYLES[group.first.severity])
        table.add_row(severity, in_line(group.first.title), describe_layers(group.layers, 1))
    return table


def describe_layers(layers: list[str], most: int) -> str:
    """Some names, and how many more there are."""
    named = [shorten(write_layer(each), LONGEST) for each in layers[:most]]
    rest = len(layers) - most
    return join_words([*named, f"{rest} more"]) if rest > 0 else join_words(named)


def print_group(console: Console, group: Group) -> None:
    """One finding, or the same at several norms."""
    first = group.first
    heading(console, f"{first.severity}: {first.check}")
    console.print(make_rows(list_rows(group)))
    print_code(console, group.code)


def make_rows(rows: Iterable[tuple[str, str]]) -> Table:
    """Lines with labels; a label that comes again is left out."""
    table = Table(box=None, show_header=False, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    last = ""
    for label, text in rows:
        table.add_row("" if label == last else label, in_line(text))
        last = label
    return table


def list_rows(group: Group) -> list[tuple[str, str]]:
    """What is said of a group, each line with its label."""
    layers = group.layers
    rows = [("wrong", group.first.title)]
    if len(layers) > 1:
        rows.append(("where", f"{len(layers)} norms: {describe_layers(layers, NAMED)}"))
    rows.append(("found" if len(layers) == 1 else "first", group.first.message))
    measured = [f"{write_key(name)} {write_range(values)}" for name, values in group.numbers.items()]
    if measured:
        rows.append(("measured", ", ".join(measured)))
    rows += [(write_key(name), each) for name, parts in group.words.items() for each in label_once(parts)]
    others = list(group.shares.items())[1:]
    rows += [("others", f"{write_layer(layer)} alone costs {write_number(harm)}") for layer, harm in others[:NAMED]]
    effects = [describe_effect(each) for each in find_effects(group)]
    rows += [("without", "; ".join(effects))] if effects else []
    return rows + [("do", each) for each in group.advice[:NAMED]]


def label_once(parts: list[str]) -> list[str]:
    """The first few parts of evidence in words."""
    rest = len(parts) - 2 * NAMED
    return [*parts[: 2 * NAMED], f"and {rest} more"] if rest > 0 else parts


def find_effects(group: Group) -> list[Effect]:
    """Of the first finding that has some."""
    return next((finding.effects for finding in group.findings if finding.effects), [])


def describe_effect(effect: Effect) -> str:
    """An effect, and whether it is for the better."""
    before, after = write_number(effect.before), write_number(effect.after)
    word = "better" if effect.improves else "worse"
    return f"{effect.measure} stays {after}" if before == after else f"{effect.measure} {before} -> {after}, {word}"


def print_code(console: Console, code: str) -> None:
    """Code to paste; its lines are not broken."""
    lines = code.splitlines()
    if len(lines) > MOST_CODE:
        say(console, f"repair     {len(lines)} lines of code, which --html and --json show")
    elif lines:
        say(console, "repair, as code to paste; --fix performs and proves it:")
        for line in lines:
            console.print(f"    {line}", soft_wrap=True)


def print_repairs(console: Console, repairs: Repairs) -> None:
    """What was done, what was not and why, and what is left."""
    heading(console, "Repairs")
    console.print(make_rows(list_repairs(repairs)))


def list_repairs(repairs: Repairs) -> list[tuple[str, str]]:
    """The same in lines, each with its label."""
    if not repairs.done and not repairs.refused:
        return [("none", "nothing that was found has a repair; the advice says what to do")]
    rows = []
    for check, done in group_by(repairs.done).items():
        effects = "; ".join(map(describe_effect, join_effects(done))) or "no longer found"
        rows.append(("done", f"{check} at {describe_layers([each.layer for each in done], NAMED)}: {effects}"))
    for finding, reason in repairs.refused:
        rows.append(("refused", f"{finding.check} at {describe_layers([finding.layer], 1)}: {reason}"))
    if repairs.gone:
        rows.append(("gone", f"{count(len(repairs.gone), 'finding')} with the repair of another"))
    if repairs.remaining is not None:
        rows.append(("left", describe_findings(repairs.remaining.findings)))
        for group in make_groups(repairs.remaining.findings):
            rows.append(("left", f"{group.first.severity}: {group.first.check} at {describe_layers(group.layers, 1)}"))
    return rows


def group_by(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """Findings by their check."""
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        found.setdefault(finding.check, []).append(finding)
    return found


def join_effects(findings: list[Finding]) -> list[Effect]:
    """What repairs made one after the other have done together."""
    found: dict[str, Effect] = {}
    for finding in findings:
        for effect in finding.effects:
            first = found.get(effect.measure, effect)
            found[effect.measure] = Effect(effect.measure, first.before, effect.after, effect.better)
    return list(found.values())


def print_checks(console: Console) -> None:
    """Every check there is, for `anynorm doctor --list`."""
    table = Table(box=None, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("check", "severity", "needs"):
        table.add_column(title, no_wrap=True)
    table.add_column("finds")
    for check in find_checks().values():
        severity = Text(check.severity, style=STYLES[check.severity])
        table.add_row(check.id, severity, check.needs, in_line(check.title))
    console.print(table)
    say(console, "", "docs/doctor.md says of each what is wrong, what is measured, and the cure.")
