"""One row for each peer of each case in each mode, as CSV with the facts of the machine above it."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from anynorm.apps.timing.cases import Case
from anynorm.apps.timing.interleaved import InterleavedTimings, find_quartiles
from anynorm.apps.timing.limits import find_bytes, is_out_of_cache

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of a peer on a case in a mode.

    Attributes:
        median_us, q1_us, q3_us: microseconds of a call; half of the rounds lie between the quartiles.
        ratio, ratio_q1, ratio_q3: the peer's time over anynorm's, round by round; above 1 anynorm is faster. Of the
            kernels alone it is their share of anynorm's time.
        copy_us: microseconds of a copy of x in the same rounds.
        bytes: the fewest that must be moved, see `limits.find_bytes`.
        limit_us: the time of those bytes at the copy's bandwidth.
        share: limit_us / median_us; 1 is as fast as memory allows.
        kept: bytes kept for backward; 0 where there is no backward pass, and for JAX.
        out_of_cache: whether x alone is larger than the last-level cache.
    """

    place: str
    norm: str
    shape: str
    layout: str
    dtype: str
    mode: str
    peer: str
    rounds: int
    median_us: float
    q1_us: float
    q3_us: float
    ratio: float
    ratio_q1: float
    ratio_q3: float
    copy_us: float
    bytes: int
    limit_us: float
    share: float
    kept: int
    out_of_cache: bool

    @property
    def name(self) -> str:
        """Norm, shape and, where it is not contiguous, layout."""
        return f"{self.norm} {self.shape}" + (" channels_last" if self.layout == "channels_last" else "")

    @property
    def key(self) -> tuple[str, ...]:
        """What the rows of one comparison have in common."""
        return self.place, self.name, self.dtype, self.mode


TUNED = "-tuned"  # behind the name of a peer that ran where the C allocator keeps memory


def make_rows(
    case: Case, mode: str, rounds: InterleavedTimings, kept: dict[str, int], cache: int, *, suffix: str = ""
) -> list[Row]:
    """The rows of one case in one mode, from its rounds; `suffix` is added to the names of peers."""
    copy = rounds.median("copy")
    least = find_bytes(case, mode, cache)
    limit = copy * least / (2 * case.size)
    rows = []
    for peer in rounds.seconds:
        if peer == "copy":
            continue
        median, (q1, q3) = rounds.median(peer), rounds.quartiles(peer)
        ratio_q1, ratio_q3 = find_quartiles(rounds.ratios(peer, "anynorm"))
        times = [round(1e6 * seconds, 3) for seconds in (median, q1, q3)]
        ratios = [round(ratio, 4) for ratio in (rounds.ratio(peer, "anynorm"), ratio_q1, ratio_q3)]
        rows.append(
            Row(
                *(
                    case.place,
                    case.norm,
                    "x".join(map(str, case.shape)),
                    case.layout,
                    case.dtype_name,
                    mode,
                    peer + suffix,
                ),
                len(rounds.seconds[peer]),
                *times,
                *ratios,
                round(1e6 * copy, 3),
                least,
                round(1e6 * limit, 3),
                round(limit / median, 4),
                kept.get(peer, 0),
                is_out_of_cache(case, cache),
            )
        )
    return rows


def write_csv(rows: Iterable[Row], facts: dict[str, str], path: Path) -> None:
    """Write `# fact: value` lines, the header, and a line for each row."""
    write_table(rows, Row, facts, path)


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """What `write_csv` wrote."""
    return read_table(path, Row)


def write_table(rows: Iterable[Any], kind: type, facts: dict[str, str], path: Path) -> None:
    """Write rows that are of a dataclass, with the facts above."""
    text = io.StringIO()
    for name, value in facts.items():
        text.write(f"# {name}: {value}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(kind)])
    for row in rows:
        writer.writerow(dataclasses.astuple(row))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.getvalue())


def read_table(path: Path, kind: type[T]) -> tuple[list[T], dict[str, str]]:
    """What `write_table` wrote of this dataclass."""
    lines = path.read_text().splitlines()
    facts = dict(line.removeprefix("# ").split(": ", 1) for line in lines if line.startswith("# "))
    fields = dataclasses.fields(kind)  # type: ignore[arg-type] # T is a dataclass, which typing cannot say
    kinds = {field.name: READERS[str(field.type)] for field in fields}
    table = csv.DictReader(line for line in lines if not line.startswith("# "))
    return [kind(**{name: kinds[name](value) for name, value in line.items()}) for line in table], facts


READERS = {"str": str, "int": int, "float": float, "bool": lambda text: text == "True"}
