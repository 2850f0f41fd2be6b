"""A map of the network: a cell for each norm, in the model's order, with its worst finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby

from anynorm.apps.doctor.groups import Group, in_line, shorten, write_layer
from anynorm.doctor.check import SEVERITIES

SIGNS = {"error": "\u2717", "warning": "!", "note": "i", "fine": "\u2713"}
STYLES = {"error": "error", "warning": "warning", "note": "note-level", "fine": "fine"}  # `note` is a paragraph's
WORDS = {"error": "error", "warning": "warning", "note": "note", "fine": "nothing found"}
MANY = 60  # norms, from where cells are small
LONGEST, LONGEST_OF_MANY = 22, 16  # characters of a name
LONGEST_TOOLTIP = 400


@dataclass
class Cell:
    """One norm.

    Attributes:
        layer: its name.
        kind: its class.
        found: groups that have it, the worst first.
    """

    layer: str
    kind: str
    found: list[Group] = field(default_factory=list)

    @property
    def level(self) -> str:
        """Its worst severity; "fine" for none."""
        return self.found[0].first.severity if self.found else "fine"


def make_cells(layers: Mapping[str, str], groups: Sequence[Group]) -> list[Cell]:
    """A cell for every norm."""
    cells = {layer: Cell(layer, kind) for layer, kind in layers.items()}
    for severity in SEVERITIES:
        for group in groups:
            for layer in group.layers if group.first.severity == severity else ():
                if layer in cells:
                    cells[layer].found.append(group)
    return list(cells.values())


def write_map(layers: Mapping[str, str], groups: Sequence[Group]) -> str:
    """The map as HTML, in parts by where names part."""
    cells = make_cells(layers, groups)
    if not cells:
        return "<p>The model has no norms.</p>"
    parts = split(cells)
    many, most = (" many", LONGEST_OF_MANY) if len(cells) > MANY else ("", LONGEST)
    written = []
    for name, own in parts:
        heading = f"<h3>{escape(shorten(write_layer(name), 80))}</h3>" if len(parts) > 1 else ""
        prefix = f"{name}." if len(parts) > 1 else ""
        items = "".join(f"<li>{write_cell(cell, prefix, most)}</li>" for cell in own)
        written.append(f'<div class="part">{heading}<ol class="map{many}">{items}</ol></div>\n')
    return write_key(cells) + "".join(written)


def write_key(cells: Sequence[Cell]) -> str:
    """The signs in words, of those that are there."""
    levels = [level for level in SIGNS if any(cell.level == level for cell in cells)]
    items = "".join(f'<li class="{STYLES[each]}"><b>{SIGNS[each]}</b>{WORDS[each]}</li>' for each in levels)
    return f'<ul class="key">{items}</ul>'


def write_cell(cell: Cell, prefix: str, most: int) -> str:
    """One norm, with a link to its worst finding."""
    found = "; ".join(f"{group.first.severity}: {group.first.title}" for group in cell.found) or WORDS["fine"]
    name = write_layer(cell.layer)
    title = escape(f"{shorten(name, LONGEST_TOOLTIP)} ({in_line(cell.kind)}): {in_line(found)}")
    shown = write_layer(cell.layer.removeprefix(prefix)) if prefix else name
    inside = (
        f'<b aria-hidden="true">{SIGNS[cell.level]}</b><span>{escape(shorten(shown, most))}</span>'
        f"<small>{escape(shorten(in_line(cell.kind), most))}</small>"
    )
    style = f'class="cell {STYLES[cell.level]}" title="{title}"'
    if not cell.found:
        return f'<div {style} role="img" aria-label="{title}">{inside}</div>'
    return f'<a {style} aria-label="{title}" href="#{find_anchor(cell.found[0], cell.layer)}">{inside}</a>'


def find_anchor(group: Group, layer: str) -> str:
    """Where a layer's finding stands on the page; names have no place in it."""
    return f"{group.key}-{group.layers.index(layer)}" if len(group.layers) > 1 else group.key


def split(cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    """Cells by the first part of their names that not all have; all in one where that tells little."""
    paths = [cell.layer.split(".") for cell in cells]
    depth = 0
    while paths and all(len(path) > depth + 1 and path[depth] == paths[0][depth] for path in paths):
        depth += 1
    places = [".".join(path[: depth + 1]) for path in paths]
    parts = [(name, [cell for _, cell in own]) for name, own in groupby(zip(places, cells), key=lambda pair: pair[0])]
    return parts if 1 < len(parts) <= len(cells) / 2 else [("", list(cells))]
