"""Arrays from the user's file: an .npz of arrays, or a table as .csv or .parquet."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anynorm.errors import UserError

TARGETS = ("y", "label", "target")  # columns that are the target if the user names none


@dataclass(frozen=True)
class Arrays:
    """What a file holds: samples, their targets, and how long each is where it is a padded sequence."""

    x: np.ndarray
    y: np.ndarray
    lengths: np.ndarray | None = None


def read_file(source: str, target: str = "") -> Arrays:
    """Arrays of an .npz, .csv or .parquet file.

    Args:
        source: path of the file.
        target: the array or column that is to be learned, or several columns with commas between; where empty, an
            .npz file's y, and a table's column called y, label or target, or else its last.
    """
    path = Path(source)
    if not path.is_file():
        raise UserError(
            f"compare --data: takes mnist, digits or the path of an .npz, .csv or .parquet file; "
            f"there is no file {source!r}; check the path."
        )
    if path.suffix.lower() == ".csv":
        return pick_columns(source, read_csv(source), target)
    if path.suffix.lower() in (".parquet", ".pq"):
        return pick_columns(source, read_parquet(source), target)
    return read_npz(source, target or "y")


def read_npz(source: str, target: str) -> Arrays:
    """Arrays x, y (or another name) and perhaps lengths of an .npz file."""
    try:
        with np.load(source, allow_pickle=False) as file:
            names = list(getattr(file, "files", []))
            if "x" not in names or target not in names:
                raise UserError(
                    f"compare --data: the file must hold arrays named x and {target}; {source!r} holds "
                    f"{', '.join(names) or 'none'}; write it with numpy.savez(path, x=x, y=y)."
                )
            return Arrays(file["x"], file[target], file["lengths"] if "lengths" in names else None)
    except UserError:
        raise
    # np.load raises these and zipfile's own for what is no .npz file, is torn, or holds pickled objects.
    except Exception as problem:
        raise UserError(
            f"compare --data: {source!r} cannot be read as an .npz file of plain arrays "
            f"({type(problem).__name__}); write it with numpy.savez(path, x=x, y=y)."
        ) from problem


def read_csv(source: str) -> dict[str, np.ndarray]:
    """Columns of a text table by name; without a line of names they are called by their numbers, from 1."""
    try:
        # utf-8-sig, because spreadsheets put a mark at the front that would become part of the first name.
        with open(source, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            separator = max(",;\t", key=first.count)
            rows = [row for row in csv.reader(file, delimiter=separator) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise UserError(
            f"compare --data: {source!r} cannot be read as a table of text ({type(problem).__name__}); save it as "
            f"UTF-8 with a comma between columns."
        ) from problem
    if not rows:
        raise UserError(f"compare --data: {source!r} is empty; a table needs a line for each sample.")
    width = len(rows[0])
    uneven = next((number for number, row in enumerate(rows, 1) if len(row) != width), None)
    if uneven is not None:
        raise UserError(
            f"compare --data: every line of a table must have as many cells as the first; in {source!r} line {uneven} "
            f"has {len(rows[uneven - 1])} where the first has {width}; repair that line."
        )
    named = not all(is_number(cell) for cell in rows[0])
    names = [cell.strip() for cell in rows.pop(0)] if named else [str(number) for number in range(1, width + 1)]
    check_names(source, names)
    return {name: read_column(cells) for name, cells in zip(names, zip(*rows, strict=True), strict=False)}


def read_column(cells: Sequence[str]) -> np.ndarray:
    """Numbers where every cell is one or is empty, which is NaN; else text."""
    try:
        return np.array([float(cell) if cell.strip() else np.nan for cell in cells])
    except ValueError:
        return np.array([cell.strip() for cell in cells])


def is_number(cell: str) -> bool:
    """Whether a cell reads as a number."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def check_names(source: str, names: list[str]) -> None:
    """Raise where two columns share a name."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"compare --data: {source!r} has two columns {twice!r}; give each a name of its own.")


def read_parquet(source: str) -> dict[str, np.ndarray]:
    """Columns of a .parquet file by name."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"compare --data: {source!r} is read with pyarrow, which is not installed; run "
            f"pip install 'anynorm[files]', or save it as .csv or .npz."
        ) from None
    try:
        table = parquet.read_table(source)
    except Exception as problem:  # pyarrow's own, and what the file system raises
        raise UserError(
            f"compare --data: {source!r} cannot be read as a .parquet file ({type(problem).__name__}); write it again."
        ) from problem
    check_names(source, table.column_names)
    return {name: as_array(table.column(name).to_pylist()) for name in table.column_names}


def as_array(cells: list[Any]) -> np.ndarray:
    """Numbers, or text where any cell is text; a missing cell is NaN, or empty text."""
    if any(isinstance(cell, str) for cell in cells):
        return np.array(["" if cell is None else str(cell) for cell in cells])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.array([np.nan if cell is None else cell for cell in cells])


def pick_columns(source: str, columns: dict[str, np.ndarray], target: str) -> Arrays:
    """A table as features and targets."""
    names = list(columns)
    wanted = [name.strip() for name in target.split(",")] if target else []
    absent = next((name for name in wanted if name not in columns), None)
    if absent is not None:
        raise UserError(
            f"compare --target: {source!r} has no column {absent!r}; it has {', '.join(names[:12])}"
            f"{' and more' if len(names) > 12 else ''}."
        )
    if not wanted:
        wanted = [next((name for name in names if name.lower() in TARGETS), names[-1])] if names else []
    features = [name for name in names if name not in wanted]
    if not features:
        raise UserError(f"compare --data: a table needs a column beside its target; {source!r} has only {names}.")
    for name in features:
        check_feature(source, name, columns[name])
    y = [columns[name] for name in wanted]
    return Arrays(np.stack([columns[name] for name in features], 1), y[0] if len(y) == 1 else np.stack(y, 1))


def check_feature(source: str, name: str, column: np.ndarray) -> None:
    """Raise where a column that is to be learned from holds something else than numbers."""
    if column.dtype.kind not in "biuf":
        cell = next((cell for cell in column.tolist() if not is_number(str(cell))), column.tolist()[0])
        raise UserError(
            f"compare --data: columns to learn from must be numbers; column {name!r} of {source!r} holds {cell!r}; "
            f"encode it as numbers or leave it out (or learn it: --target {name})."
        )
    empty = int(np.count_nonzero(np.isnan(column.astype(float))))
    if empty:
        raise UserError(
            f"compare --data: column {name!r} of {source!r} has {empty:,} cells that are empty or NaN; fill or leave "
            f"them out."
        )
