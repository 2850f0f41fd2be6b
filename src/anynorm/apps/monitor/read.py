"""A file of `anynorm.Monitor`, read with care: it may be another program's, or broken off."""

from __future__ import annotations

import csv
import io
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anynorm.doctor.monitor.files import FORMAT
from anynorm.doctor.monitor.record import COLUMNS, NAN, VERSION, Record
from anynorm.errors import UserError

SQLITE_BEGINS = b"SQLite format 3\0"


@dataclass(frozen=True)
class History:
    """A run's records.

    Attributes:
        facts: of the run, empty where the file has none, as CSV.
        records: by layer, in the order in which the norms were called; each layer's by step.
    """

    facts: dict[str, str]
    records: dict[str, list[Record]]

    @property
    def steps(self) -> list[int]:
        """The measured steps."""
        return sorted({record.step for own in self.records.values() for record in own})

    def choose(self, layer: str) -> History:
        """One layer alone.

        Raises:
            UserError: there is none of this name.
        """
        if layer not in self.records:
            names = ", ".join(list(self.records)[:8]) + (", ..." if len(self.records) > 8 else "")
            raise UserError(f"monitor: there is no layer {layer!r} in the file; it has {names}.")
        return History(self.facts, {layer: self.records[layer]})


def read_history(file: Path) -> History:
    """Read either format; what the file is, its content says.

    Raises:
        UserError: it cannot be read, is no file of `anynorm.Monitor`, or of another version of the format.
    """
    try:
        begin = file.open("rb").read(len(SQLITE_BEGINS))
        facts, rows = read_sqlite(file) if begin == SQLITE_BEGINS else read_csv(file)
        records = [make_record(row) for row in rows]
    except OSError as problem:
        raise UserError(f"monitor: {str(file)!r} cannot be read: {problem.strerror or problem}.") from None
    except (sqlite3.Error, csv.Error, UnicodeDecodeError, ValueError, TypeError) as problem:
        if isinstance(problem, UserError):
            raise
        raise UserError(f"monitor: {str(file)!r} is no file of anynorm.Monitor, or is damaged: {problem}.") from None
    if not records:
        raise UserError(f"monitor: {str(file)!r} has no records yet: no training step was measured.")
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.step):
        found.setdefault(record.layer, []).append(record)
    return History(facts, found)


def read_sqlite(file: Path) -> tuple[dict[str, str], Iterable[Sequence[Any]]]:
    """Facts and rows of a database, which is opened for reading alone."""
    with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        facts = {str(key): str(value) for key, value in connection.execute("SELECT key, value FROM meta")}
        if facts.get("format") != FORMAT:
            raise ValueError(f"its table meta says no format {FORMAT!r}")
        check_version(file, facts.get("version"))
        columns = ", ".join(f'"{name}"' for name in COLUMNS)
        return facts, connection.execute(f"SELECT {columns} FROM records ORDER BY rowid").fetchall()


def read_csv(file: Path) -> tuple[dict[str, str], Iterable[Sequence[Any]]]:
    """Rows of a CSV; a last line that was broken off is left out."""
    text = file.read_text(encoding="utf-8")
    whole = text if text.endswith("\n") else text[: text.rfind("\n") + 1]
    rows = list(csv.reader(io.StringIO(whole), strict=True))
    if not rows or rows[0][:1] != ["version"]:
        raise ValueError("its first line is not that of a file of anynorm.Monitor")
    for row in rows[1:2]:
        check_version(file, row[0] if row else None)
    if rows[0][1:] != [*COLUMNS]:
        raise ValueError("its columns are others")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(rows[0]):
            raise ValueError(f"line {number} has {len(row)} values, and {len(rows[0])} columns")
    return {}, [[None if value == "" else value for value in row[1:]] for row in rows[1:]]


def check_version(file: Path, version: Any) -> None:
    """Refuse what another version of the library wrote."""
    if version != str(VERSION):
        raise UserError(
            f"monitor: {str(file)!r} is of version {version} of the format, and this anynorm reads {VERSION}; use the "
            "anynorm that wrote it."
        )


def make_record(values: Sequence[Any]) -> Record:
    """A record of the values of a row, in the order of the columns."""
    empty: dict[type, Any] = {int: 0, float: NAN, str: ""}
    given: dict[str, Any] = {
        name: empty[kind] if value is None else kind(value)
        for (name, kind), value in zip(COLUMNS.items(), values, strict=True)
    }
    return Record(**given)
