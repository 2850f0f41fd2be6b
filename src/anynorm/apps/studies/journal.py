"""Finished runs on disk: one JSON line each, so that an interrupted study goes on from where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from anynorm.errors import UserError

from .workers import Record, Run

JOURNAL, RESULTS, REPORT = "journal.jsonl", "results.json", "report.html"


class Journal:
    """The runs of one directory, found again by a key of everything that defines them.

    Args:
        directory: created where absent; held by one process at a time.
        identify: gives all that defines a run: its options, data, sources and versions, as JSON holds them.
        command: what the user called, for messages.
    """

    directory: Path
    identify: Callable[[Run], Any]
    command: str

    def __init__(self, directory: Path, identify: Callable[[Run], Any], command: str = "compare") -> None:
        self.directory, self.identify, self.command = directory, identify, command
        self.path: Path = directory / JOURNAL
        self.file: IO[bytes] = self.open()
        self.keys: dict[Run, str] = {}
        self.records: dict[str, Record] = read_records(self.path)

    def open(self) -> IO[bytes]:
        """The journal opened for appending and locked, with a torn last line closed off."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+b")
        except OSError as problem:
            raise UserError(
                f"{self.command} --out: takes a directory that can be written; {str(self.directory)!r} cannot "
                f"({problem.strerror}); give another --out."
            ) from problem
        lock(file, self.directory, self.command)
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        return file

    def key(self, run: Run) -> str:
        """Fingerprint of a run: equal where everything that defines it is equal."""
        if run not in self.keys:
            whole = json.dumps(self.identify(run), sort_keys=True)
            self.keys[run] = hashlib.sha256(whole.encode()).hexdigest()[:20]
        return self.keys[run]

    def find(self, run: Run) -> Record | None:
        """The record of a run, where it is finished."""
        return self.records.get(self.key(run))

    def add(self, run: Run, record: Record) -> None:
        """Write a finished run through to the disk; a record that failed is only kept in memory and tried again."""
        record = {"key": self.key(run), **record}
        self.records[record["key"]] = record
        if record["status"] != "failed":
            self.file.write(json.dumps(record).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Give the directory free."""
        self.file.close()


def read_records(path: Path) -> dict[str, Record]:
    """Records by key; a line that a killed process left half written is skipped."""
    records = {}
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            records[record["key"]] = record
        except (ValueError, KeyError, TypeError):
            continue
    return records


def lock(file: IO[bytes], directory: Path, command: str) -> None:
    """Keep a second process out of the directory; the lock ends with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; two processes at once are then the user's to avoid.
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        raise UserError(
            f"{command} --out: one process at a time may write a directory; another one is at work in "
            f"{str(directory)!r}; wait for it or give another --out."
        ) from problem


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader never sees half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def set_aside(directory: Path, configuration: str) -> list[str]:
    """Rename the report of another configuration, so that it is not overwritten.

    Returns:
        New names of the files that were moved.
    """
    try:
        earlier = json.loads((directory / RESULTS).read_text(encoding="utf-8"))["configuration"][:8]
    except (OSError, ValueError, KeyError, TypeError):
        earlier = "earlier" if (directory / REPORT).exists() or (directory / RESULTS).exists() else None
    if earlier is None or earlier == configuration[:8]:
        return []
    moved = []
    for name in (REPORT, RESULTS):
        source = directory / name
        stem, _, suffix = name.partition(".")
        target, count = directory / f"{stem}-{earlier}.{suffix}", 2
        while source.exists() and target.exists():
            target, count = directory / f"{stem}-{earlier}-{count}.{suffix}", count + 1
        if source.exists():
            os.replace(source, target)
            moved.append(target.name)
    return moved
