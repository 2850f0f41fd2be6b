"""The page of `anynorm doctor`: counts, a map of the network, and each finding with its numbers, pictures and code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

import torch

from anynorm.apps.doctor.groups import Group, in_line, make_groups, shorten, write_key, write_layer, write_number
from anynorm.apps.doctor.map import SIGNS, STYLES, find_anchor, write_map
from anynorm.apps.doctor.pictures import draw_group
from anynorm.apps.doctor.table import (
    count,
    describe_effect,
    describe_findings,
    describe_measured,
    find_effects,
    list_repairs,
)
from anynorm.apps.document import write_document, write_figures
from anynorm.doctor.check import SEVERITIES, Finding, find_checks
from anynorm.doctor.diagnosis import Diagnosis, Repairs
from anynorm.version import __version__

LONGEST = 200  # characters of a name in a table
MOST_ROWS = 10  # of a table without a frame that scrolls
HEADINGS = {"ruled_out": "Ruled out"}  # of evidence in words


def write_page(name: str, diagnosis: Diagnosis, repairs: Repairs | None = None) -> str:
    """Return the page as text, with nothing to load from elsewhere.

    Args:
        name: of the model.
        diagnosis: what was found, before the repairs.
        repairs: what was done about it; None where nothing was to be.
    """
    groups = make_groups(diagnosis.findings)
    body = [
        write_header(name, diagnosis),
        f"<section><h2>The norms, in the order of the model</h2>{write_map(diagnosis.layers, groups)}"
        f"{write_whole(diagnosis, groups)}</section>\n",
        *(write_group(group) for group in groups),
        "" if repairs is None else write_repairs(repairs),
        write_checks(diagnosis),
        f"<footer>Written by <code>anynorm doctor --html</code>, anynorm {__version__}, torch {torch.__version__}"
        "</footer>",
    ]
    style = files("anynorm.apps.doctor").joinpath("page.css").read_text(encoding="utf-8")
    return write_document("anynorm doctor", body, style)


def safe(text: str) -> str:
    """Text that came from a model, for a page."""
    return escape(in_line(text))


def capitalize(text: str) -> str:
    """Text that begins with a large letter, unless it begins with code."""
    return text[:1].upper() + text[1:] if text.partition(" ")[0].isalpha() else text


def write_header(name: str, diagnosis: Diagnosis) -> str:
    """What was looked at, the verdict, and how much was found."""
    found = Counter(finding.severity for finding in diagnosis.findings)
    verdict = "Neither errors nor warnings" if diagnosis.is_healthy else describe_findings(diagnosis.findings)
    styles = {each: STYLES[each if found[each] else "fine"] for each in SEVERITIES}
    counts = "".join(
        f'<li class="{styles[each]}"><b>{found[each]}</b>{each}{"s" * (found[each] != 1)}</li>' for each in SEVERITIES
    )
    facts = [f"{count(len(diagnosis.layers), 'norm')}, {count(len(diagnosis.checked), 'check')} ran"]
    lines = "".join(f'<p class="facts">{safe(line)}</p>' for line in [*facts, *describe_measured(diagnosis)])
    return (
        f'<header><h1>{safe(shorten(name, LONGEST))}</h1>\n<p class="verdict">{safe(verdict)}</p>\n{lines}\n'
        f'<ul class="counts">{counts}</ul></header>\n'
    )


def write_whole(diagnosis: Diagnosis, groups: Sequence[Group]) -> str:
    """What was found at places that are no norms."""
    others = [group for group in groups if not set(group.layers) <= set(diagnosis.layers)]
    links = "".join(f'<li><a href="#{group.key}">{safe(group.first.title)}</a></li>' for group in others)
    return f"<p>Elsewhere in the model:</p><ul>{links}</ul>" if links else ""


def write_group(group: Group) -> str:
    """One finding, or the same at several norms."""
    first, style = group.first, STYLES[group.first.severity]
    effects = find_effects(group)
    check = find_checks().get(first.check)
    why = "" if check is None else f"<p>{safe(check.fault)}</p>"
    places = f"At {len(group.layers)} norms; the first: " if len(group.layers) > 1 else ""
    parts = [
        f'<section class="finding {style}" id="{group.key}"><h2>{safe(capitalize(first.title))}</h2>\n',
        f'<p><span class="tag">{SIGNS[first.severity]} {first.severity}</span><code>{safe(first.check)}</code></p>\n',
        f"<p>{safe(places + first.message)}</p>\n",
        why,
        write_evidence(group),
        "".join(write_words(name, parts) for name, parts in group.words.items()),
        write_figures(plots) if (plots := draw_group(group, effects)) else "",
        write_advice(group),
        f"<h3>Code to paste</h3><pre><code>{write_code(group.code)}</code></pre>\n" if group.code else "",
        "</section>\n",
    ]
    return "".join(parts)


def write_evidence(group: Group) -> str:
    """A row for each place, a column for each number; effects as rows of their own."""
    names = list(group.numbers)
    if not names and len(group.findings) == 1:
        return ""
    head = "".join(f'<th scope="col">{safe(write_key(name))}</th>' for name in names)
    rows, anchored = "", set()
    for finding in group.findings:
        anchor = "" if finding.layer in anchored or len(group.layers) < 2 else find_anchor(group, finding.layer)
        anchored.add(finding.layer)
        rows += write_row(finding, names, f' id="{anchor}"' if anchor else "")
    long = " long" if len(group.findings) > MOST_ROWS else ""
    return (
        f'<h3>Measured</h3><div class="scroll{long}" tabindex="0"><table><thead><tr><th scope="col">norm</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>\n"
    )


def write_row(finding: Finding, names: Iterable[str], anchor: str) -> str:
    """The numbers of one place."""
    values = (finding.evidence.get(name) for name in names)
    cells = "".join(f"<td>{'' if isinstance(v, str) or v is None else escape(write_number(v))}</td>" for v in values)
    name = write_layer(finding.layer)
    shown = escape(shorten(name, LONGEST))
    return f'<tr{anchor}><th scope="row" title="{escape(name)}">{shown}</th>{cells}</tr>\n'


def write_words(name: str, parts: Sequence[str]) -> str:
    """Evidence in words."""
    heading = HEADINGS.get(name, capitalize(write_key(name)))
    if len(parts) == 1:
        return f"<h3>{safe(heading)}</h3><p>{safe(parts[0])}</p>\n"
    items = "".join(f"<li>{safe(part)}</li>" for part in parts)
    return f"<h3>{safe(heading)}</h3><ul>{items}</ul>\n"


def write_advice(group: Group) -> str:
    """What to do, and what it would give."""
    effects = "; ".join(describe_effect(effect) for effect in find_effects(group))
    items = "".join(f"<p>{safe(capitalize(advice))}</p>\n" for advice in group.advice)
    gain = f"<p>Measured with the fault and without it: {safe(effects)}.</p>\n" if effects else ""
    return f"<h3>What to do</h3>{items}{gain}" if items or gain else ""


def write_code(code: str) -> str:
    """Code line by line; names in it are quoted by Python, which shows what is not for print."""
    return "\n".join(safe(line) for line in code.splitlines())


def write_repairs(repairs: Repairs) -> str:
    """What was done, refused and left."""
    listed = "".join(f"<dt>{label}</dt><dd>{safe(text)}</dd>" for label, text in list_repairs(repairs))
    return f'<section id="repairs"><h2>Repairs</h2><dl>{listed}</dl></section>\n'


def write_checks(diagnosis: Diagnosis) -> str:
    """Which checks ran, and which did not and why."""
    found = {finding.check for finding in diagnosis.findings}
    known = find_checks()
    clear = [check for check in diagnosis.checked if check not in found]
    ran = "".join(f"<dt>{safe(each)}</dt><dd>{safe(known[each].title)}</dd>" for each in clear if each in known)
    skipped = "".join(f"<dt>{safe(each)}</dt><dd>{safe(why)}</dd>" for each, why in diagnosis.skipped.items())
    parts = [f"<h2>Looked for and not found</h2><dl>{ran}</dl>"] if ran else []
    parts += [f"<h2>Not looked at</h2><dl>{skipped}</dl>"] if skipped else []
    return f'<section id="checks">{"".join(parts)}</section>\n'
