"""Where records go: SQLite or CSV, by the file's name, and TensorBoard; and how the files are laid out.

SQLite: a table `meta` (key, value) with `format` = "anynorm-monitor", `version`, and the facts of the run; and a table
`records` with the columns of `record.COLUMNS`, NULL where a number does not apply. CSV: those columns behind one named
`version`, empty where a number does not apply.
"""

from __future__ import annotations

import csv
import datetime
import math
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn as nn

from ...surgery.report import describe
from ...version import __version__
from .record import COLUMNS, QUANTITIES, VERSION, Record

FORMAT = "anynorm-monitor"
SQLITE, CSV = (".sqlite", ".sqlite3", ".db"), (".csv",)
TYPES = {int: "INTEGER", float: "REAL", str: "TEXT"}


class Output(Protocol):
    """Somewhere records are written to."""

    def write(self, records: Sequence[Record]) -> None:
        """Write them so that a reader finds them at once."""

    def close(self) -> None:
        """Write no more."""


def open_output(file: Any, facts: dict[str, str], overwrite: bool) -> Output:
    """Create a file for records.

    Raises:
        ValueError: another suffix.
        FileExistsError: it is there, and is not to be written over.
    """
    path = Path(file)
    suffix = path.suffix.lower()
    if suffix not in SQLITE + CSV:
        raise ValueError(f"Monitor: file must end in {', '.join(SQLITE)} or .csv; got {str(file)!r}; rename it")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"Monitor: file must be new; {str(file)!r} is there already; choose another name, or pass overwrite=True"
        )
    path.unlink(missing_ok=True)
    return CsvFile(path) if suffix in CSV else SqliteFile(path, facts)


class SqliteFile:
    """Records in a table, beside one of facts."""

    def __init__(self, path: Path, facts: dict[str, str]) -> None:
        # Backward may end in another thread than the one that made the monitor; writes never overlap.
        self.connection: sqlite3.Connection = sqlite3.connect(path, check_same_thread=False)
        # Not waiting for the disk saves milliseconds of a training step; a crash of the machine may cost the file, one
        # of the process costs nothing.
        self.connection.execute("PRAGMA synchronous = OFF")
        columns = ", ".join(f'"{name}" {TYPES[kind]}' for name, kind in COLUMNS.items())
        with self.connection:
            self.connection.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT)")
            self.connection.execute(f"CREATE TABLE records ({columns}, PRIMARY KEY (step, layer))")
            rows = {"format": FORMAT, "version": str(VERSION), **facts}.items()
            self.connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)

    def write(self, records: Sequence[Record]) -> None:
        places = ", ".join("?" * len(COLUMNS))
        with self.connection:
            self.connection.executemany(f"INSERT INTO records VALUES ({places})", map(list_values, records))

    def close(self) -> None:
        self.connection.close()


class CsvFile:
    """Records as lines."""

    def __init__(self, path: Path) -> None:
        self.stream: Any = path.open("x", newline="", encoding="utf-8")
        self.writer: Any = csv.writer(self.stream)
        self.writer.writerow(["version", *COLUMNS])
        self.stream.flush()

    def write(self, records: Sequence[Record]) -> None:
        self.writer.writerows([VERSION, *list_values(record)] for record in records)
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


def list_values(record: Record) -> list[Any]:
    """The fields in the order of the columns, None for NaN."""
    values = (getattr(record, name) for name in COLUMNS)
    return [None if isinstance(value, float) and math.isnan(value) else value for value in values]


class Scalars:
    """Records as TensorBoard shows them: one line for each number that applies, grouped by quantity."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            for quantity in QUANTITIES:
                value = getattr(record, quantity)
                if not math.isnan(value):
                    self.writer.add_scalar(f"norm_{quantity}/{record.layer or 'model'}", value, record.step)

    def close(self) -> None:
        """The writer is the caller's."""


def list_facts(model: nn.Module, every: int) -> dict[str, str]:
    """What the file says of the run."""
    return {
        "anynorm": __version__,
        "torch": torch.__version__,
        "model": describe(type(model)),
        "every": str(every),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
