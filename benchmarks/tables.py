"""The rows as tables: cells are made once, and printed in the terminal or written as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from anynorm.apps.terminal import plain_table
from anynorm.apps.timing.cases import MODES

from .causes import PARTS, Parts, find_causes
from .results import Row
from .summaries import BOTH, Summary, find_best_others, mean_over_limit, summarize, write_time

Cells = list[list[str]]
OTHERS = ("torch", "torch-tuned", "compile", "jax", "best", "anynorm-compile")
WORDS = {
    "torch": "torch eager",
    "torch-tuned": "torch eager, memory kept by both",
    "compile": "torch.compile",
    "jax": "JAX",
    "best": "the better of compile and JAX",
}
AT_THE_LIMIT = {
    "kernel": "anynorm's kernels alone, same memory",
    "fresh": "the same, new memory",
    "anynorm": "anynorm's layer",
    "anynorm-tuned": "anynorm's layer, memory kept",
    "torch": "torch.nn's layer",
    "torch-tuned": "torch.nn's layer, memory kept",
}


def group(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """The rows of each comparison by peer, in their order."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.key, {})[row.peer] = row
    return found


def find_peers(rows: Iterable[Row]) -> list[str]:
    """The peers that were measured, anynorm aside."""
    found = {row.peer for row in rows}
    return [peer for peer in OTHERS if peer in found]


def write_spread(row: Row) -> str:
    """How far the quartiles lie from the median, in percent."""
    return f"-{100 * (1 - row.q1_us / row.median_us):.0f} +{100 * (row.q3_us / row.median_us - 1):.0f} %"


def write_bytes(count: int) -> str:
    """Three digits, in bytes, kB or MB."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.3g} kB" if count < 1e6 else f"{count / 1e6:.4g} MB"


def write_kept(peers: dict[str, Row]) -> str:
    """Bytes kept for backward, and torch's."""
    ours, theirs = peers["anynorm"].kept, peers.get("torch")
    text = write_bytes(ours) if ours else ""
    return text + (f" ({write_bytes(theirs.kept)})" if text and theirs else "")


def list_measured(rows: list[Row]) -> tuple[list[str], Cells]:
    """A line for each case in each mode, for the terminal."""
    others = find_peers(rows)
    titles = ["case", "mode", "anynorm", "spread", *others, *PARTS, "of limit", "kept (torch)"]
    causes = find_causes(rows)
    cells = []
    for key, peers in group(rows).items():
        ours = peers["anynorm"]
        ratios = [f"{peers[peer].ratio:.2f}" if peer in peers else "" for peer in others]
        name = ours.name.replace("channels_last", "cl")
        first = [name, ours.mode, write_time(ours.median_us), write_spread(ours)]
        parts = write_parts(causes.get(key))
        cells.append([*first, *ratios, *parts, f"{100 * ours.share:.0f} %", write_kept(peers)])
    return titles, cells


def write_parts(parts: Parts | None) -> list[str]:
    """The shares of kernel, memory and call, in percent."""
    return [""] * len(PARTS) if parts is None else [f"{100 * share:.0f} %" for share in parts.shares]


def list_cases(rows: list[Row]) -> tuple[list[str], Cells]:
    """A line for each case with all modes, for the page."""
    others = [peer for peer in find_peers(rows) if peer != "torch"]
    titles = ["from", "case", *MODES, *(WORDS.get(peer, peer) for peer in others), "anynorm", "spread"]
    titles += [*PARTS, "of limit, training", BOTH, "kept (torch)"]
    causes = find_causes(rows)
    lines: dict[tuple[str, ...], dict[str, dict[str, Row]]] = {}
    for (*case, mode), peers in group(rows).items():
        lines.setdefault(tuple(case), {})[mode] = peers
    cells = []
    for (place, name, _), modes in lines.items():
        if set(modes) != set(MODES):
            continue
        ratios = [f"{modes[mode]['torch'].ratio:.2f}" if "torch" in modes[mode] else "" for mode in MODES]
        both = modes[BOTH]
        ratios += [f"{both[peer].ratio:.2f}" if peer in both else "" for peer in others]
        ours = both["anynorm"]
        shares = [f"{100 * modes[mode]['anynorm'].share:.0f} %" for mode in ("training", BOTH)]
        shares = [*write_parts(causes.get(ours.key)), *shares]
        cells.append([place, name, *ratios, write_time(ours.median_us), write_spread(ours), *shares, write_kept(both)])
    return titles, cells


def list_means(rows: list[Row]) -> tuple[list[str], Cells]:
    """The means over torch eager, by where the layers come from and by layout, and over everything."""
    titles = ["torch eager / anynorm", *MODES]
    eager = [row for row in rows if row.peer == "torch"]
    places: dict[str, list[Row]] = {}
    for row in eager:
        layout = ", channels_last" if row.layout == "channels_last" else ""
        places.setdefault(f"{row.place}, {row.norm}{layout}", []).append(row)
    places["larger than the last cache"] = [row for row in eager if row.out_of_cache]
    places["**all**"] = eager
    return titles, [[place, *(write_mean(found, mode) for mode in MODES)] for place, found in places.items() if found]


def list_peers(rows: list[Row]) -> tuple[list[str], Cells]:
    """The means over each peer on all cases."""
    rows = rows + find_best_others(rows)
    titles = ["peer / anynorm", *MODES]
    cells = []
    for peer in find_peers(rows):
        found = [row for row in rows if row.peer == peer]
        cells.append([WORDS.get(peer, peer), *(write_mean(found, mode) for mode in MODES)])
    return titles, cells


def write_mean(rows: list[Row], mode: str) -> str:
    """Geometric mean, worst case and losses in one cell."""
    summary: Summary | None = summarize(row for row in rows if row.mode == mode)
    if summary is None:
        return ""
    return f"{summary.mean:.2f}, worst {summary.worst:.2f}, lost {summary.losses}/{summary.count}"


def list_limits(rows: list[Row]) -> tuple[list[str], Cells]:
    """Times over the limit, on average and at worst, in the last cache and beyond it."""
    titles = ["time over the limit", *(f"{mode}, {place}" for place in ("in cache", "beyond") for mode in MODES)]
    cells = []
    for peer, words in AT_THE_LIMIT.items():
        own = [row for row in rows if row.peer == peer]
        line = [
            write_over([row for row in own if row.mode == mode and row.out_of_cache == beyond])
            for beyond in (False, True)
            for mode in MODES
        ]
        cells += [[words, *line]] if any(line) else []
    return titles, cells


def write_over(rows: list[Row]) -> str:
    """Mean and worst case in one cell."""
    if not rows:
        return ""
    return f"{mean_over_limit(rows):.2f}, worst {max(1 / row.share for row in rows):.2f}"


def as_markdown(titles: list[str], cells: Cells) -> str:
    """A Markdown table."""
    head = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in cells)])


def as_table(titles: list[str], cells: Cells, wrap: bool = False) -> Table:
    """A table for the terminal; `wrap` lets long words take several lines."""
    table = plain_table(*titles)
    for column in table.columns if wrap else ():
        column.no_wrap, column.justify, column.overflow = False, "left", "fold"
    for line in cells:
        table.add_row(*(cell.replace("**", "") for cell in line))
    return table
