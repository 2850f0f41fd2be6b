"""What is learned: targets told apart as classes, labels (several may hold) or values, and checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anynorm.errors import UserError

KINDS = ("classes", "labels", "values")
LEAST_SAMPLES = 10  # of labels and values, so that every part of the split has some


@dataclass(frozen=True)
class Targets:
    """Checked targets.

    Attributes:
        kind: `classes`, one of several for each sample; `labels`, each of several may hold; `values`, as in regression.
        y: int64 (N,) in 0 .. outputs - 1, float32 (N, labels) of 0 and 1, or float64 (N, values).
        outputs: how many outputs a network needs.
        about: them in words.
    """

    kind: str
    y: np.ndarray
    outputs: int
    about: str


def find_targets(source: str, y: np.ndarray, samples: int, kind: str = "auto") -> Targets:
    """Targets of this kind, or of the kind that they look like.

    `auto` reads text, bools and whole numbers as classes; whole numbers of which most are different, and fractions, as
    values; several columns of 0 and 1 as labels, or as classes where each row has a single 1; other columns as values.
    """
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim not in (1, 2) or len(y) != samples or y.size == 0:
        raise UserError(
            f"compare --data: y must have one row for each sample; {source!r} has x of length {samples:,} and y of "
            f"shape {y.shape}; give y the shape ({samples},), or ({samples}, K) for K labels or values."
        )
    if y.dtype.kind not in "biufUS":
        raise UserError(
            f"compare --data: y must be numbers or text; {source!r} has dtype {y.dtype}; save it as one of them."
        )
    if y.dtype.kind == "f" and not np.all(np.isfinite(y)):
        raise UserError(
            f"compare --data: y must be finite; {source!r} has {np.count_nonzero(~np.isfinite(y)):,} values that are "
            f"NaN, infinite or empty; remove those samples."
        )
    kind = guess_kind(y) if kind == "auto" else kind
    read = {"classes": read_classes, "labels": read_labels, "values": read_values}[kind]
    return read(source, y)


def guess_kind(y: np.ndarray) -> str:
    """What targets look like."""
    if y.dtype.kind in "USb" and y.ndim == 1:
        return "classes"
    if y.ndim == 2:
        if is_binary(y):
            return "classes" if is_one_hot(y) else "labels"
        return "values"
    if np.any(y != np.round(y)):
        return "values"
    counts = np.unique(y, return_counts=True)[1]
    return "values" if counts.min() < 3 and len(counts) > len(y) / 3 else "classes"


def is_binary(y: np.ndarray) -> bool:
    """Whether all that is there is 0 and 1."""
    return y.dtype.kind in "biuf" and bool(np.all((y == 0) | (y == 1)))


def is_one_hot(y: np.ndarray) -> bool:
    """Whether every row of zeros and ones has a single 1."""
    return bool(np.all(y.astype(int).sum(1) == 1))


def read_classes(source: str, y: np.ndarray) -> Targets:
    """Classes numbered from 0, where each can be split; a single 1 in each row stands for its place."""
    if y.ndim == 2:
        if not (is_binary(y) and is_one_hot(y)):
            raise UserError(
                f"compare --data: classes are one for each sample; y of {source!r} has shape {y.shape}; give one "
                f"number or word for each sample, or --task labels where several may hold."
            )
        y = y.argmax(1)
    if y.dtype.kind == "f" and np.any(y != np.round(y)):
        raise UserError(
            f"compare --data: classes must be whole numbers or text; y of {source!r} holds fractions, as targets of a "
            f"regression do; give --task values, or cut them into classes, as with numpy.digitize."
        )
    names, labels, counts = np.unique(y, return_inverse=True, return_counts=True)
    said = [f"{name:g}" if y.dtype.kind == "f" else str(name) for name in names.tolist()]
    if len(names) < 2:
        raise UserError(
            f"compare --data: y must hold at least 2 classes; {source!r} holds only {said[0]}; "
            f"check which column was saved as y."
        )
    if counts.min() < 3:
        rare = int(counts.argmin())
        raise UserError(
            f"compare --data: every class needs 3 samples, one each for training, validation and test; class "
            f"{said[rare]} of {source!r} has {counts[rare]}; add samples, leave the class out, or give --task values "
            f"where y is a quantity."
        )
    shown = f"{', '.join(said[:10])}{', ...' if len(said) > 10 else ''}"
    return Targets("classes", labels.astype(np.int64), len(names), f"{len(names)} classes ({shown})")


def read_labels(source: str, y: np.ndarray) -> Targets:
    """Zeros and ones for each label."""
    y = y[:, None] if y.ndim == 1 else y
    if not is_binary(y):
        raise UserError(
            f"compare --task labels: y must hold 0 and 1 for each label; {source!r} has y of dtype {y.dtype} with "
            f"other values; give one column of 0 and 1 for each label."
        )
    check_count(source, y)
    ones = y.astype(int).sum(0)
    rare = np.flatnonzero((ones < 3) | (len(y) - ones < 3))
    if len(rare):
        raise UserError(
            f"compare --data: every label must hold for 3 samples and fail for 3; label {rare[0] + 1} of {source!r} "
            f"holds for {ones[rare[0]]} of {len(y):,}; leave its column out."
        )
    return Targets("labels", y.astype(np.float32), y.shape[1], f"{y.shape[1]} labels, of which several may hold")


def read_values(source: str, y: np.ndarray) -> Targets:
    """Numbers as in a regression."""
    y = y[:, None] if y.ndim == 1 else y
    if y.dtype.kind not in "biuf":
        raise UserError(
            f"compare --task values: y must be numbers; {source!r} has dtype {y.dtype}; text can only be classes."
        )
    check_count(source, y)
    y = y.astype(np.float64)
    constant = np.flatnonzero(y.min(0) == y.max(0))
    if len(constant):
        raise UserError(
            f"compare --data: values to learn must differ; column {constant[0] + 1} of y of {source!r} is always "
            f"{y[0, constant[0]]:g}; leave it out."
        )
    count = y.shape[1]
    return Targets("values", y, count, "a value" if count == 1 else f"{count} values")


def check_count(source: str, y: np.ndarray) -> None:
    """Raise where there are too few samples to split."""
    if len(y) < LEAST_SAMPLES:
        raise UserError(
            f"compare --data: a regression or labels need {LEAST_SAMPLES} samples; {source!r} has {len(y)}; add some."
        )
